"""Counts against those of the authors' released code (tests/golden/paper_models.json), and the memory of training."""

import json

import pytest
import torch
from golden_files import GOLDEN

from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.config import Config, ModelConfig
from rin_video.config_files import load_config
from rin_video.model.info import describe, model_info
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
