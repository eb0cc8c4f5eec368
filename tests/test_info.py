"""Counts against those of the authors' released code (tests/golden/paper_models.json), and the memory of training."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest
import torch
from golden_files import GOLDEN

from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.config import Config, ModelConfig
from rin_video.config_files import load_config, presets
from rin_video.model.info import count_built, describe, model_info
from rin_video.tokenizers import TOKENIZERS
from rin_video.training.memory import LIBRARIES, MALLOC, PeakMemory, training_memory

COUNTS = GOLDEN / "paper_models.json"
RELEASED = json.loads(COUNTS.read_text(encoding="utf-8"))["from_released_configs"] if COUNTS.exists() else {}
PRESETS = {"cifar10": "cifar10_32", "imagenet64": "imagenet_64_patch8"} if RELEASED else {}
SIZES = {  # image size and patch size, which the file only mentions in names and comments
    "cifar10_32": (32, 2),
    "imagenet_64_patch8": (64, 8),
    "imagenet_64_patch4_per_comment": (64, 4),
    "imagenet_64_patch4_6666_per_comments": (64, 4),
    "base_default_tape_cifar10": (32, 8),
}


def from_release(name: str) -> ModelConfig:
    """Return our options for an entry of the file."""
    theirs, (image_size, patch_size) = RELEASED[name]["config"], SIZES[name]
    assert theirs["patch_volume"] == 3 * patch_size**2
    return ModelConfig(
        dim=theirs["tape_dim"],
        image_size=image_size,
        patch_size=patch_size,
        depth=len(theirs["num_layers"]),
        latent_self_attn_depth=theirs["num_layers"],
        num_latents=theirs["latent_slots"],
        dim_latent=theirs["latent_dim"],
        num_heads=theirs["rw_num_heads"],
        latent_num_heads=theirs["latent_num_heads"],
        mlp_ratio=theirs["tape_mlp_ratio"],
        latent_mlp_ratio=theirs["latent_mlp_ratio"],
        num_classes=theirs["num_classes"],
        time_conditioning="latent" if theirs["time_on_latent"] else "interface",
        class_conditioning="latent" if theirs["cond_on_latent"] else "interface",
        self_conditioning=theirs["self_cond"].replace("tape", "interface"),
    )


def check(config: ModelConfig, name: str) -> None:
    info, theirs = model_info(config), RELEASED[name]
    assert info.params == theirs["params"]
    assert round(info.gflops, 4) == theirs["gflops_madd_as_2"]
    assert round(info.gflops / 2, 4) == theirs["gmacs"]
    assert (info.tokens, info.latents) == (theirs["config"]["tape_tokens"], theirs["config"]["latent_slots"])
    assert info.shape == (3, SIZES[name][0], SIZES[name][0])


def test_every_entry_of_the_file_is_checked():
    assert set(RELEASED) in (set(SIZES), set())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_costs_what_the_released_model_costs(preset):
    check(load_config(preset).model, PRESETS[preset])


@pytest.mark.parametrize("name", RELEASED)
def test_our_options_cost_what_the_released_ones_cost(name):
    check(from_release(name), name)


def test_params_are_those_of_the_model_built():
    config = ModelConfig(dim=32, image_size=8, num_latents=6, depth=1, interface_mixing="linear_attention+conv")
    assert model_info(config).params == sum(p.numel() for p in RIN(config).parameters())


@pytest.mark.parametrize("preset", presets())
def test_the_formulas_count_what_torch_counts(preset):
    config = load_config(preset).model
    assert model_info(config) == count_built(config)


@pytest.mark.parametrize("seed", range(24))
def test_the_formulas_hold_for_any_options(seed):
    """Drawn at random, each option from its values; what cannot be built is refused with the same words."""
    choose = random.Random(seed).choice
    kinds: dict = choose(
        [
            {"image_size": choose([16, [16, 32]]), "patch_size": choose([4, [4, 8]])},
            {"image_size": 16, "frames": 4, "patch_size": [2, 4, 4], "tokenizer": choose(["auto", "tube+image"])},
            {"sequence_length": 32, "patch_size": 4},
        ]
    )
    config = ModelConfig(
        **kinds,
        dim=choose([32, 48]),
        dim_latent=choose([None, 64]),
        channels=choose([1, 3]),
        position=choose(["learned", "sincos", "sincos_learned", "coordinate"]),
        latent_position=choose(["learned", "sincos", "sincos_learned"]),
        dual_patchnorm=choose([False, True]),
        conv_width=choose([0, 5]),
        depth=2,
        latent_self_attn_depth=choose([1, [2, 0]]),
        num_latents=choose([5, 8]),
        num_heads=choose([2, 3]),
        latent_num_heads=choose([4, 5, 33]),
        mlp_ratio=choose([4, 1.3]),
        latent_mlp_ratio=choose([4, 2.7]),
        known_mask=choose([False, True]),
        num_classes=choose([0, 5]),
        embedding_dim=choose([0, 7]),
        embedding_tokens=choose([1, 2]),
        time_conditioning=choose(["latent", "interface", "adaln"]),
        class_conditioning=choose(["latent", "interface", "adaln"]),
        embedding_conditioning=choose(["latent", "interface"]),
        self_conditioning=choose(["none", "latent", "latent+x0", "latent+interface"]),
        interface_mixing=choose(
            ["none", "linear_attention", "linear_attention+conv", "dense_conv", "group", "local_attention"]
        ),
        interface_layers=choose([1, 2]),
        qk_norm=choose([False, True]),
        norm_context=choose([False, True]),
    )
    assert outcome(model_info, config) == outcome(count_built, config)


def outcome(count, config):
    try:
        return count(config)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 30},
        {"image_size": 16, "num_heads": 64},
        {"image_size": 16, "latent_num_heads": 64},
        {"image_size": 16, "num_latents": 1},
        {"image_size": 16, "dim": 36},
        {"image_size": 16, "dim": 33, "dim_latent": 32, "position": "sincos"},
        {"image_size": 16, "latent_position": "sincos", "dim_latent": 33, "time_conditioning": "interface"},
        {"image_size": 16, "tokenizer": "image+image"},
        {"image_size": 16, "tokenizer": "tube"},
        {"image_size": 16, "tokenizer": "nothing"},
        {"tokenizer": "image"},
        {"tokenizer": "sequence"},
        {"sequence_length": 30, "patch_size": 4},
        {"image_size": 16, "depth": 2, "latent_self_attn_depth": [1]},
    ],
)
def test_what_cannot_be_built_is_refused_with_the_words_of_the_model(options):
    config = ModelConfig(**{"dim": 32, "depth": 1, "num_latents": 8, "latent_num_heads": 4, **options})
    with pytest.raises(UsageError) as error:
        model_info(config)
    with pytest.raises(UsageError) as of_model:
        RIN(config)
    assert str(error.value) == str(of_model.value)


def test_a_tokenizer_of_others_is_built_to_be_counted(monkeypatch):
    monkeypatch.setitem(TOKENIZERS._objects, "own", TOKENIZERS.get("image"))
    config = ModelConfig(dim=32, image_size=16, num_latents=6, depth=1)
    assert model_info(dataclasses.replace(config, tokenizer="own")) == model_info(config)


def test_counting_imports_no_torch():
    code = "import sys; from rin_video import cli; cli.main(['info']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"
    assert len(done.stdout.splitlines()) == len(presets()) + 2


def test_counting_allocates_nothing():
    """A model of 300 GB can be counted."""
    info = model_info(ModelConfig(dim=16384, image_size=64, depth=24))
    assert info.params * 4 > 3e11


def test_flops_of_a_layer_are_two_a_weight_and_token():
    """One more channel costs 2 x patch volume x dim x tokens in each of the two patch projections."""
    one, two = (
        model_info(ModelConfig(dim=32, image_size=16, channels=c, num_latents=6, depth=1)).gflops * 1e9 for c in (1, 2)
    )
    assert round(two - one) == 2 * (2 * 16 * 32 * 16)


def test_training_memory_is_weights_and_a_linear_share_for_each_sample():
    config = Config(model=ModelConfig(dim=32, image_size=16, num_latents=16, depth=2))
    params = model_info(config.model).params
    needs = {}
    for batch in (16, 32, 64, 128):
        config.train.train_batch_size = batch
        needs[batch] = training_memory(config)
    assert all(bytes_ >= 4 * params * 4 for bytes_ in needs.values())
    each = [(needs[2 * b] - needs[b]) / b for b in (16, 32, 64)]
    assert each[0] == pytest.approx(each[1], rel=1e-3) == pytest.approx(each[2], rel=1e-3)
    assert each[0] > 0
    beyond = needs[16] - 16 * each[0] - LIBRARIES
    assert (
        6 * params * 4 <= beyond < 8 * params * 4
    )  # weights, two moments, three averages; gradients are allocated late


@pytest.mark.parametrize(("checkpointing", "conv_width"), [(False, 0), (True, 0), (False, 8)])
def test_training_memory_is_what_a_real_step_takes(checkpointing, conv_width):
    """Meta tensors give the same peak as real tensors."""
    config = Config(model=ModelConfig(dim=32, image_size=16, num_latents=16, depth=2, conv_width=conv_width))
    config.train.train_batch_size, config.train.gradient_checkpointing = 16, checkpointing
    with PeakMemory() as memory:
        model = RIN(config.model)
        model.core.gradient_checkpointing = checkpointing
        weights = sum(p.numel() * 4 for p in model.parameters())
        diffusion = GaussianDiffusion(model, config.diffusion)
        diffusion(torch.rand(16, 3, 16, 16)).backward()
    step = training_memory(config) - 5 * weights - LIBRARIES
    assert weights + (step - weights) / MALLOC == pytest.approx(memory.peak, rel=0.02)


def test_the_description_holds_the_counts():
    text = describe(load_config("cifar10").model)
    for word in ("30,951,180", "8.59", "256 tokens", "128 of width 512", "32x32", "10 classes", "2, 2, 2"):
        assert word in text


def test_a_model_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="height 30 is not a multiple"):
        model_info(ModelConfig(image_size=30))
