"""The training loop: exact resume, averaged weights, accumulation, the files it writes."""

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError
from rin_video.config import Config, DataConfig, TrainConfig
from rin_video.config_files import load_config
from rin_video.datasets.epochs import EpochDataset, EpochSampler
from rin_video.training.previews import previews_of
from rin_video.training.state import load_state, save_state
from rin_video.training.trainer import Metrics, make_lr_schedule, make_optimizer

TINY = {
    "dim": 32,
    "num_latents": 6,
    "dim_latent": 32,
    "depth": 1,
    "num_heads": 2,
    "latent_num_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


class Noise(Dataset):
    """Random pictures, whose flips depend on (index, epoch)."""

    def __init__(self, classes: int = 0) -> None:
        self.x = torch.rand(13, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        self.classes = [str(i) for i in range(classes)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return self.draw(index, 0)

    def draw(self, index, epoch):
        return {"x": self.x[index].roll(epoch, -1), "label": index % max(len(self.classes), 1)}


def trainer(folder: Path, steps: int, *, model=None, data=None, validation=None, **options) -> Trainer:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**TINY | (model or {})), timesteps=3)
    config = Config(
        model=diffusion.model.config,
        diffusion=diffusion.config,
        data=DataConfig(num_workers=0),
        train=TrainConfig(
            **{
                "train_num_steps": steps,
                "train_batch_size": 4,
                "train_lr": 1e-3,
                "save_and_sample_every": 10,
                "log_every": 1,
                "lr_schedule": "constant",
            }
            | options
        ),
    )
    config.data.num_workers = 0
    config.sample.num_samples, config.sample.steps = 2, 2
    data = data or Noise()
    return Trainer(diffusion, data, validation=validation, results_folder=folder, config=config, progress=False)


TIMES = ("samples_per_second", "data_wait")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.diffusion.model.state_dict().items()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_resume_is_bit_exact(tmp_path, optimizer):
    """20 uninterrupted steps equal 10 steps, new objects as in a new process, and 10 more steps."""
    options = {"optimizer": optimizer, "model": {"dropout": 0.1, "drop_path": 0.1}, "gradient_accumulate_every": 2}
    whole = trainer(tmp_path / "whole", 20, **options)
    whole.train()
    first = trainer(tmp_path / "parts", 10, **options)
    first.train()
    second = trainer(tmp_path / "parts", 20, **options)
    torch.manual_seed(99)  # nothing may depend on the state of the process
    second.train()
    assert_close(weights(second), weights(whole), rtol=0, atol=0)
    assert not torch.equal(weights(first)["core.latents.table"], weights(whole)["core.latents.table"])
    one, other = load_file(tmp_path / "whole/model.safetensors"), load_file(tmp_path / "parts/model.safetensors")
    assert_close(other, one, rtol=0, atol=0)
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, 21))
    untimed = [[{k: v for k, v in line.items() if k not in TIMES} for line in lines(tmp_path / name)]
               for name in ("whole", "parts")]  # fmt: skip
    assert untimed[0] == untimed[1]


def test_what_is_written(tmp_path):
    run = trainer(tmp_path, 12)
    run.train()
    assert [p.name for p in run.checkpoints] == ["step-00000010", "step-00000012"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000010.png", "step-00000012.png"]
    assert Image.open(tmp_path / "samples/step-00000012.png").width > 16
    last = lines(tmp_path)[-1]
    assert set(last) == {"step", "loss", "loss_by_t", "grad_norm", "lr", "samples_per_second", "data_wait"}
    assert len(last["loss_by_t"]) == 10
    assert load_config(tmp_path / "config.yaml").model == run.config.model
    loaded = GaussianDiffusion.from_pretrained(tmp_path)
    assert_close(loaded.model.state_dict(), run.ema.ema_model.state_dict(), rtol=0, atol=0)
    assert loaded.sample(batch_size=1, steps=1).shape == (1, 3, 8, 8)


def test_average_is_not_the_raw_weights_and_follows_them(tmp_path):
    """Trap 2: an average with swapped weights equals the raw weights."""
    run = trainer(tmp_path, 12, ema_decay=0.9)
    run.train()
    raw, averaged = run.diffusion.model.core.latents.table, run.ema.ema_model.core.latents.table
    torch.manual_seed(0)
    start = RIN(**TINY).core.latents.table
    assert 0 < (raw - averaged).norm() < (raw - start).norm()


def test_accumulation_is_the_big_batch(tmp_path):
    """Trap 4: one step with two batches of 4 uses the gradient of their mean."""
    run = trainer(tmp_path, 1, gradient_accumulate_every=2, max_grad_norm=0, weight_decay=0)
    seen = []
    run.optimizer.optimizer.step = lambda *a, **k: seen.append(
        torch.cat([p.grad.flatten() for p in run.diffusion.parameters()])
    )
    run.train_step(run.batches())
    run = trainer(tmp_path, 1, gradient_accumulate_every=2)
    batches = run.batches()
    run.diffusion.train()
    loss = sum(run.diffusion(next(batches).x, rng=run.rng(micro)) for micro in range(2)) / 2
    loss.backward()
    assert_close(torch.cat([p.grad.flatten() for p in run.diffusion.parameters()]), seen[0])


def test_weight_decay_spares_biases_norms_and_embeddings():
    model = RIN(**TINY, num_classes=3, position="learned")
    optimizer = make_optimizer(GaussianDiffusion(model), Config(train=TrainConfig(weight_decay=0.1)))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or "table" in name or name == "conditioner.label.projection.weight"
        assert (id(parameter) in decayed) != spared, name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_lr_warms_up_then_falls_over_the_wanted_part_of_the_cosine():
    options = TrainConfig(train_num_steps=110, warmup_steps=10, train_lr=1.0, lr_cosine_portion=0.8)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = make_lr_schedule(optimizer, Config(train=options))
    rates = []
    for step in range(1, 111):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert_close(rates[:10], [i / 10 for i in range(1, 11)])
    expected = [0.5 * (1 + np.cos(np.pi * 0.8 * i / 100)) for i in range(1, 101)]
    assert_close(rates[10:], expected)
    constant = make_lr_schedule(optimizer, Config(train=TrainConfig(train_lr=1.0, lr_schedule="constant")))
    constant.step_update(90_000)
    assert optimizer.param_groups[0]["lr"] == 1


def test_draws_walk_through_the_data_once_an_epoch_whatever_the_ranks():
    def positions(num_ranks: int, batches: int, first: int = 0) -> list[tuple[int, int]]:
        samplers = [
            EpochSampler(10, 4, seed=1, first_batch=first, rank=r, num_ranks=num_ranks) for r in range(num_ranks)
        ]
        walks = [iter(sampler) for sampler in samplers]
        return [draw for _ in range(batches) for walk in walks for draw in next(walk)]

    one = positions(1, 10)
    for epoch in range(4):
        assert sorted(one[10 * epoch : 10 * epoch + 10]) == [(epoch, i) for i in range(10)]
    assert positions(2, 5) == one
    assert positions(1, 4, first=6) == one[24:]
    assert one[:10] != [(0, i) for i in range(10)]
    assert [i for _, i in one[:10]] != [i for _, i in one[10:20]]
    assert EpochDataset(Noise())[(3, 1)]["x"].equal(Noise().draw(1, 3)["x"])
    assert EpochDataset(TensorDataset(torch.arange(5)))[(3, 1)][0] == 1


def test_datasets_of_any_usual_form(tmp_path):
    x = torch.rand(5, 3, 8, 8)
    for i, data in enumerate((TensorDataset(x), TensorDataset(x, torch.arange(5) % 2), list(x))):
        run = trainer(tmp_path / str(i), 1, data=data, model={"num_classes": 2} if i == 1 else None)
        run.train()
        assert run.step == 1


def test_image_folder_by_the_port_s_usage(tmp_path):
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    diffusion = GaussianDiffusion(RIN(**TINY), timesteps=2)
    run = Trainer(
        diffusion,
        str(tmp_path),
        num_samples=4,
        train_batch_size=2,
        gradient_accumulate_every=2,
        train_lr=1e-4,
        save_and_sample_every=2,
        train_num_steps=2,
        ema_decay=0.995,
        results_folder=tmp_path / "results",
        progress=False,
    )
    run.train()
    assert (tmp_path / "results/samples/step-00000002.png").is_file()


def test_mistakes_are_named(tmp_path):
    diffusion = GaussianDiffusion(RIN(**TINY, num_classes=3))
    with pytest.raises(UsageError, match=r"the model has 3 classes, but the data has 2"):
        Trainer(diffusion, Noise(classes=2), results_folder=tmp_path)
    with pytest.raises(UsageError, match=r"unknown key train_learning_rate: did you mean train_lr"):
        Trainer(diffusion, Noise(classes=3), train_learning_rate=1)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="fp16 needs a CUDA GPU"):
            Trainer(diffusion, Noise(classes=3), mixed_precision="fp16")
    trainer(tmp_path, 1).train()
    with pytest.raises(UsageError, match=r"was trained with model.dim=32, now it is 48"):
        trainer(tmp_path, 2, model={"dim": 48}).train()
    with pytest.raises(UsageError, match=r"was trained with train.optimizer=adamw, now it is muon: use the same"):
        trainer(tmp_path, 2, optimizer="muon").train()
    with pytest.raises(UsageError, match=r"was trained with train.ema_sigma_rel=\[0.05, 0.1\], now it is \[0.1, 0.2\]"):
        trainer(tmp_path, 2, ema_sigma_rel=[0.1, 0.2]).train()


def test_bf16_trains(tmp_path):
    run = trainer(tmp_path, 2, mixed_precision="bf16")
    before = weights(run)
    run.train()
    assert all(value.dtype == torch.float32 for value in weights(run).values())
    assert not torch.equal(before["core.latents.table"], weights(run)["core.latents.table"])


def test_the_precision_that_accelerate_launch_asks_for(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="rin_video")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = trainer(tmp_path, 1)
    assert run.accelerator.mixed_precision == run.config.train.mixed_precision == run.diffusion.precision == "bf16"
    assert "train.mixed_precision is set to bf16, as accelerate launch requests" in caplog.text
    assert trainer(tmp_path, 1, mixed_precision="tf32").accelerator.mixed_precision == "no"
    assert "train.mixed_precision=tf32 is used, although accelerate launch requests bf16" in caplog.text
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UsageError, match="--mixed_precision fp8: use bf16 or fp16, or no"):
        trainer(tmp_path, 1)


def test_a_dataset_smaller_than_a_batch_is_reported(tmp_path, caplog):
    trainer(tmp_path, 1, train_batch_size=13)
    assert "a batch has" not in caplog.text
    trainer(tmp_path, 1, train_batch_size=14)
    assert "the dataset has 13 samples, but a batch has 14" in caplog.text


def test_metrics_of_an_unfinished_stretch_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    Metrics(path, step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_state_survives_the_disk(tmp_path):
    state = {"a": {0: torch.arange(3), "b": [None, 1.5, (True, "x")]}, "empty": {}, "scalar": torch.tensor(2)}
    save_state(tmp_path / "state", state)
    again = load_state(tmp_path / "state")
    assert_close(again["a"][0], torch.arange(3))
    assert again["a"]["b"] == [None, 1.5, [True, "x"]]
    assert again["empty"] == {}
    assert again["scalar"] == 2
    save_state(tmp_path / "state", {"b": 1})
    assert load_state(tmp_path / "state") == {"b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    (tmp_path / "state/state.safetensors").write_bytes(b"12")
    with pytest.raises(UsageError, match=r"state is damaged \(state\.safetensors does not match its checksum\)"):
        load_state(tmp_path / "state")


# For each option of training: a value that differs from that of the run, and a function that reads the effective value.
ANOTHER = {
    "train_num_steps": (4, lambda run: run.step),
    "train_batch_size": (2, lambda run: run.batch_size),
    "gradient_accumulate_every": (2, lambda run: len(run.train_step(run.batches())[0])),
    "train_lr": (2e-3, lambda run: run.optimizer.param_groups[0]["lr"]),
    "weight_decay": (0.2, lambda run: max(group["weight_decay"] for group in run.optimizer.param_groups)),
    "betas": ([0.5, 0.6], lambda run: list(run.optimizer.param_groups[0]["betas"])),
    "lr_schedule": ("cosine", lambda run: "cosine" if run.schedule.lr_min == 0 else "constant"),
    "lr_cosine_portion": (0.5, lambda run: 3 / run.schedule.t_initial),
    "warmup_steps": (1, lambda run: run.schedule.warmup_t),
    "max_grad_norm": (0.5, lambda run: run.clipped_to),
    "ema_decay": (0.5, lambda run: run.ema.beta),
    "ema_warmup": (0.2, lambda run: 1 / run.ema.inv_gamma),
    "ema_update_every": (2, lambda run: run.ema.update_every),
    "ema_snapshot_every": (3, lambda run: 3 if (run.folder / "averages/step-00000003.safetensors").exists() else 0),
    "mixed_precision": ("bf16", lambda run: run.accelerator.mixed_precision),
    "gradient_checkpointing": (True, lambda run: run.unwrapped.model.core.gradient_checkpointing),
    "compile": (True, lambda run: run.compiler.worked),
    "sharding": ("fsdp2", lambda run: run.options.sharding),  # a single process has nothing to shard
    "save_and_sample_every": (3, lambda run: 3 if previews_of(run.folder, 3) else 0),
    "keep_checkpoints": (1, lambda run: len(run.checkpoints)),
    "keep_every": (2, lambda run: 2 if (run.folder / "checkpoints/step-00000002").exists() else 0),
    "log_every": (3, lambda run: 3 if [line["step"] for line in lines(run.folder)][-1] == 3 else 0),
    "time": ("1s", lambda run: f"{run.budget.seconds:g}s"),
    "trackers": (["jsonl"], lambda run: [*run.options.trackers]),
    "validate_every": (3, lambda run: run.validator.last["step"]),
    "validation_samples": (5, lambda run: len(run.validator.held.places)),
    "keep_best": (True, lambda run: (run.folder / "best/model.safetensors").is_file()),
}
VALIDATED = ("validate_every", "validation_samples", "keep_best")
REFUSED = {"optimizer": "lamb", "ema_sigma_rel": [0.1, 0.2], "seed": 1, "init_from": "elsewhere"}


SPECIAL = (
    "lr_cosine_portion",
    "ema_sigma_rel",
    "ema_snapshot_every",
    "keep_checkpoints",
    "trackers",
)  # begin otherwise


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps from which most cases resume."""
    folder = tmp_path_factory.mktemp("begun")
    run = trainer(folder, 2, train_batch_size=4, ema_sigma_rel=[], save_and_sample_every=100)
    run.sample = lambda: None
    run.train()
    return folder


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
def test_after_a_resume_the_config_takes_effect(begun, tmp_path, monkeypatch, name):
    """Every option of training with a changed value takes effect, or is refused."""
    base = {"train_batch_size": 4, "lr_schedule": "constant" if name != "lr_cosine_portion" else "cosine",
            "ema_sigma_rel": [0.05, 0.1] if name in ("ema_sigma_rel", "ema_snapshot_every") else [],
            "save_and_sample_every": 1 if name == "keep_checkpoints" else 100}  # fmt: skip
    if name != "save_and_sample_every":
        monkeypatch.setattr(Trainer, "sample", lambda run: None)
    if name == "compile":  # its effect is tested elsewhere
        monkeypatch.setattr(RIN, "compile", lambda model: None)
    if name == "trackers":
        monkeypatch.setattr("rin_video.training.trainer.check_trackers", lambda names: None)
        monkeypatch.setattr("rin_video.training.distributed.Accelerator", partial(NoTrackers, Accelerator))
    if name in SPECIAL:
        trainer(tmp_path, 2, **base).train()
    else:
        shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    if name in REFUSED:
        with pytest.raises(UsageError, match=rf"train\.{name}.*now it is"):
            trainer(tmp_path, 3, **base | {name: REFUSED[name]}).train()
        return
    value, in_force = ANOTHER[name]
    steps, more = (value, {}) if name == "train_num_steps" else (3, {name: value})
    run = trainer(tmp_path, steps, validation=Noise() if name in VALIDATED else None, **base | more)
    clip = run.accelerator.clip_grad_norm_
    run.accelerator.clip_grad_norm_ = lambda weights, limit: setattr(run, "clipped_to", limit) or clip(weights, limit)
    run.train()
    assert in_force(run) == pytest.approx(value) if isinstance(value, float) else in_force(run) == value
    written = getattr(load_config(tmp_path / "config.yaml").train, name)
    assert written == value


def NoTrackers(kind, log_with=None, **options):  # noqa: N802
    return kind(**options)


def test_a_group_of_parameters_that_is_new_takes_up_its_moments_by_name(tmp_path):
    """Without weight decay the optimizer has one group, and its parameters have another order."""
    trainer(tmp_path / "a", 3, weight_decay=0.0).train()
    run = trainer(tmp_path / "a", 4, weight_decay=0.1)
    run.resume()
    state = load_state(run.checkpoints[-1])["optimizer"]["moments"]
    for name, parameter in run.unwrapped.model.named_parameters():
        assert torch.equal(run.optimizer.state[parameter]["exp_avg"], state[name]["exp_avg"]), name
