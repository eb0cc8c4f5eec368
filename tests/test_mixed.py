"""Clips and images in one run, and initialisation with the weights of another model."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError, cli
from rin_video.config import Config
from rin_video.config_files import load_config
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.mixed import MixedDataset, MixtureSampler
from rin_video.model.rin import load_model
from rin_video.model.transfer import transfer_weights
from rin_video.weights import save_model

CORE = {"dim": 32, "num_latents": 8, "dim_latent": 32, "depth": 2, "num_heads": 2, "latent_num_heads": 2}
BOTH = {**CORE, "tokenizer": "tube+image", "frames": 4, "image_size": 8, "patch_size": (2, 4, 4)}


class Labelled(torch.utils.data.Dataset):
    """`count` samples with labels; sample i has the value i / 255."""

    def __init__(self, count, shape, classes=(), label=0):
        self.count, self.size, self.classes, self.label = count, shape, list(classes), label

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": torch.full(self.size, index, dtype=torch.uint8), "label": self.label}


def mixture(ratio=0.5, **more):
    clips = Labelled(6, (3, 4, 8, 8), ["b", "c"], 1)
    return MixedDataset(clips, Labelled(5, (3, 8, 8), ["a", "b"], 1), ratio)


def batches(data, first=0, count=12, group=1):
    from rin_video.config import DataConfig

    source = TrainLoader(data, DataConfig(num_workers=0), 2, seed=3, first_batch=first, group=group)
    return [next(source) for _ in range(count)]


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.7])
@pytest.mark.parametrize("group", [1, 3])
def test_the_ratio_counts_complete_steps_and_every_epoch_draws_each_sample_once(ratio, group):
    sampler = MixtureSampler(mixture(ratio), 1, group=group, seed=0)
    kinds = [sampler.is_of_images(batch) for batch in range(40 * group)]
    assert abs(sum(kinds) - ratio * 40 * group) < group
    assert all(len(set(kinds[i : i + group])) == 1 for i in range(0, len(kinds), group))
    assert [sampler.images_before(batch) for batch in range(len(kinds))] == [sum(kinds[:b]) for b in range(len(kinds))]
    drawn = Counter(next(it)[0] for it in [iter(sampler)] for _ in range(40 * group))
    for index in range(5):
        assert drawn[0, 6 + index] == 1  # the first epoch of the images


@pytest.mark.parametrize("first", [1, 7, 10])
def test_batches_resume_where_they_stopped(first):
    whole, rest = batches(mixture(0.4), group=2), batches(mixture(0.4), first, 12 - first, group=2)
    for one, two in zip(whole[first:], rest, strict=True):
        assert_close(one.x, two.x, rtol=0, atol=0)
    assert {batch.x.ndim for batch in whole} == {4, 5}


def test_classes_are_joined_by_name():
    data = mixture()
    assert data.classes == ["a", "b", "c"]
    assert data[0]["label"] == 2
    assert data[6]["label"] == 1
    unlabelled = MixedDataset(Labelled(2, (3, 4, 8, 8), ["b", "c"], 0), Labelled(2, (3, 8, 8), [], -1))
    assert [unlabelled[i]["label"] for i in range(4)] == [0, 0, -1, -1]


@pytest.mark.parametrize("ratio", [0, 1, -0.5])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(UsageError, match="image_ratio"):
        mixture(ratio)


def train(folder, steps, **options):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**BOTH))
    trainer = Trainer(
        diffusion,
        mixture(0.5),
        results_folder=folder,
        progress=False,
        num_samples=2,
        train_num_steps=steps,
        train_batch_size=2,
        save_and_sample_every=3,
        log_every=1,
        lr_schedule="constant",
        **options,
    )
    trainer.config.data.num_workers = 0
    trainer.config.sample.steps = 2
    trainer.train()
    return {name: value.clone() for name, value in diffusion.state_dict().items()}


def test_one_checkpoint_samples_both_and_resumes_exactly(tmp_path):
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    parts = train(tmp_path / "parts", 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    diffusion = GaussianDiffusion.from_pretrained(tmp_path / "whole")
    assert diffusion.sample(batch_size=1, steps=1).shape == (1, 3, 4, 8, 8)
    assert diffusion.sample(batch_size=1, steps=1, shape=(3, 8, 8)).shape == (1, 3, 8, 8)
    names = {path.name for path in (tmp_path / "whole" / "samples").iterdir()}
    assert {"step-00000006.mp4", "step-00000006.png", "step-00000006-images.png"} <= names


def test_a_mixture_needs_a_tokenizer_for_each(tmp_path):
    model = RIN(**{**BOTH, "tokenizer": "tube"})
    with pytest.raises(UsageError, match=r"tokenizer=tube\+image"):
        Trainer(GaussianDiffusion(model), mixture(), results_folder=tmp_path)


def test_on_the_command_line(tmp_path, numbered, capsys):
    (tmp_path / "clips").mkdir()
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        numbered(tmp_path / "clips" / f"{i}.mp4", frames=6)
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    run = tmp_path / "run"
    core = [f"model.{name}={value}" for name, value in (CORE | {"depth": 1}).items()]
    sampling = ["data.num_workers=0", "sample.steps=2", "sample.num_samples=2"]
    words = ["--frames", "4", "--size", "16", "--steps", "4", "--batch-size", "2", *core, *sampling]
    data = ["--data", str(tmp_path / "clips"), "--images", str(tmp_path / "pictures")]
    assert cli.main(["train", *data, "--out", str(run), *words]) == 0
    config = load_config(run / "config.yaml")
    assert config.model.tokenizer == "tube+image"
    assert config.data.images == str(tmp_path / "pictures")
    assert cli.main(["sample", str(run), "--num", "2", "--steps", "2", "--out", str(tmp_path / "clips.mp4")]) == 0
    images = ["sample", str(run), "--num", "2", "--steps", "2", "--frames", "0", "--out", str(tmp_path / "images.png")]
    assert cli.main(images) == 0
    assert cli.main(["train", *data, "--frames", "0", "--out", str(tmp_path / "other"), *words[2:]]) == 2
    assert "(--images) is mixed with clips" in capsys.readouterr().err
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 1
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


# ---- starting from another model


def image_run(folder, **options):
    torch.manual_seed(1)
    model = RIN(**{**CORE, "image_size": 8, "patch_size": 4, **options})
    save_model(folder, model, Config(model=model.config))
    return model


def test_a_core_of_images_starts_a_model_of_clips(tmp_path):
    source = image_run(tmp_path / "images")
    model = RIN(**BOTH)
    moved = transfer_weights(tmp_path / "images", model)
    assert_close(model.core.state_dict(), source.core.state_dict(), rtol=0, atol=0)
    assert_close(model.other_tokenizers["image"].state_dict(), source.tokenizer.state_dict(), rtol=0, atol=0)
    assert moved.new
    assert all(name.startswith("tokenizer tube.") for name in moved.new)
    assert not moved.left
    # Images are denoised as by the original model.
    x, gamma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8])
    assert_close(model(x, gamma)[0], source(x, gamma)[0], rtol=0, atol=0)
    only_clips = transfer_weights(tmp_path / "images", RIN(**{**BOTH, "tokenizer": "tube"}))
    assert all(name.startswith("tokenizer image.") for name in only_clips.left)
    assert "initialised" in only_clips.describe()


def test_another_size_patch_and_depth(tmp_path):
    source = image_run(tmp_path / "run")
    larger = RIN(**{**CORE, "image_size": 16, "patch_size": 4})
    moved = transfer_weights(tmp_path / "run", larger)
    assert moved.fitted == ["tokenizer image.position.table"]
    assert_close(larger.tokenizer.to_tokens.weight, source.tokenizer.to_tokens.weight, rtol=0, atol=0)
    source.interpolate_positions()
    assert_close(larger.tokenizer.position.table, source.tokenizer.position((4, 4)), rtol=0, atol=0)
    finer = transfer_weights(tmp_path / "run", RIN(**{**CORE, "image_size": 8, "patch_size": 2}))
    assert "tokenizer image.to_tokens.weight" in finer.new
    assert "tokenizer image.to_tokens.weight" in finer.left
    deeper = RIN(**{**CORE, "image_size": 8, "patch_size": 4, "depth": 3})
    assert all(name.startswith("core.blocks.2.") for name in transfer_weights(tmp_path / "run", deeper).new)


@pytest.mark.parametrize(
    ("more", "conditions"),
    [({"known_mask": True}, ["known"]), ({"self_conditioning": "latent+x0", "known_mask": True}, ["known", "x0"])],
)
def test_convolutions_take_further_channels_at_zero(tmp_path, more, conditions):
    source = image_run(tmp_path / "run", conv_width=6)
    convolved = {**CORE, "image_size": 8, "patch_size": 4, "conv_width": 6}
    model = RIN(**convolved, **more)
    assert not transfer_weights(tmp_path / "run", model).new
    x, gamma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8])
    inputs = {"known": torch.rand(2, 1, 8, 8) < 0.5, "x0": torch.randn(2, 3, 8, 8)}
    prediction, _ = model(x, gamma, **{name: inputs[name] for name in conditions})
    assert_close(prediction, source(x, gamma)[0], rtol=0, atol=1e-5)
    save_model(tmp_path / "more", model, Config(model=model.config))
    fewer = transfer_weights(tmp_path / "more", RIN(**convolved)).new
    assert fewer == [f"tokenizer image.conv_{way}.0.weight" for way in ("in", "out")]


def test_classes_leave_fewer_learned_latents(tmp_path):
    source = image_run(tmp_path / "run")
    model = RIN(**{**CORE, "image_size": 8, "patch_size": 4, "num_classes": 3})
    moved = transfer_weights(tmp_path / "run", model)
    assert moved.fitted == ["core.latents.table"]
    assert_close(model.core.latents.table, source.core.latents.table[:-1], rtol=0, atol=0)


@pytest.mark.parametrize(("option", "value"), [("dim_latent", 48), ("num_heads", 4), ("latent_mlp_ratio", 2)])
def test_another_core_is_refused_and_nothing_copied(tmp_path, option, value):
    image_run(tmp_path / "run")
    model = RIN(**{**CORE, "image_size": 8, "patch_size": 4, option: value})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UsageError, match=f"does not fit.*model.{option}="):
        transfer_weights(tmp_path / "run", model)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_resumed_run_keeps_its_weights(tmp_path, caplog):
    image_run(tmp_path / "images")
    caplog.set_level("INFO", logger="rin_video")
    started = train(tmp_path / "run", 3, init_from=str(tmp_path / "images"))
    fresh = train(tmp_path / "fresh", 3)
    assert not torch.equal(started["model.core.latents.table"], fresh["model.core.latents.table"])
    assert "weights from" in caplog.text
    caplog.clear()
    train(tmp_path / "run", 6, init_from=str(tmp_path / "images"))
    assert "resumes with its own weights" in caplog.text
    assert load_model(tmp_path / "run")[1].train.init_from == str(tmp_path / "images")


def test_no_folder_to_start_from(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        transfer_weights(tmp_path / "nothing" / "here", RIN(**BOTH))
