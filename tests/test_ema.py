"""Post-hoc EMA of any length against averages that were tracked during training."""

from pathlib import Path

import pytest
import torch
from ema_pytorch.post_hoc_ema import KarrasEMA
from safetensors.torch import load_file
from tiny_run import make_trainer

from rin_video import GaussianDiffusion, UsageError, cli
from rin_video.config import TrainConfig
from rin_video.config_files import load_config, presets
from rin_video.training.callbacks import Callback
from rin_video.training.ema import make_ema, post_hoc_emas

LENGTHS = [0.05, 0.075, 0.1, 0.15]


class Direct(Callback):
    """A callback that tracks averages of other lengths, and records the weights."""

    def on_start(self, trainer):
        self.power_emas = {s: KarrasEMA(trainer.diffusion.model, sigma_rel=s, update_every=1) for s in LENGTHS}

    def on_step(self, trainer, loss):
        for track in self.power_emas.values():
            track.update()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[float, KarrasEMA], dict[str, torch.Tensor]]:
    folder, direct = tmp_path_factory.mktemp("run"), Direct()
    trainer = make_trainer(
        folder, callbacks=[direct], train_num_steps=60, ema_snapshot_every=2, save_and_sample_every=100, log_every=100,
        train_lr=1e-2, lr_schedule="constant",
    )  # fmt: skip
    trainer.train()
    return folder, direct.power_emas, dict(trainer.diffusion.model.named_parameters())


def distance(weights, others) -> float:
    return sum((weights[name] - value).double().square().sum() for name, value in others.items()).sqrt().item()


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_an_average_put_together_is_the_one_that_was_tracked(run, sigma_rel):
    """The error is relative to the distance between the average and the last weights."""
    folder, power_emas, last = run
    ((weights, error),) = post_hoc_emas(folder, [sigma_rel])
    direct = dict(power_emas[sigma_rel].ema_model.named_parameters())
    assert distance(weights, direct) < 0.02 * distance(last, direct)
    assert error < 1e-3
    other = dict(power_emas[0.15 if sigma_rel < 0.1 else 0.05].ema_model.named_parameters())
    assert distance(weights, other) > 0.1 * distance(last, direct)  # it is close to this average only


def test_the_command_writes_folders_that_are_sampled_from(run, tmp_path, caplog):
    folder, _, _ = run
    assert cli.main(["ema", str(folder), "--sigma-rel", "0.05", "0.15", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema-0.05", "ema-0.15"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ema-0.05", "ema-0.15"))
    assert distance(one, other) > 0
    assert GaussianDiffusion.from_pretrained(tmp_path / "ema-0.05").sample(batch_size=1, steps=1).isfinite().all()


def test_mistakes_are_named(run, tmp_path):
    folder, _, _ = run
    with pytest.raises(UsageError, match=r"--sigma-rel is 0\.4: it must be in \[0\.01, 0\.28\]"):
        post_hoc_emas(folder, [0.4])
    with pytest.raises(UsageError, match="has no checkpoint"):
        post_hoc_emas(tmp_path, [0.1])
    make_trainer(tmp_path, train_num_steps=1, ema_sigma_rel=[]).train()
    with pytest.raises(UsageError, match="there are no EMAs to combine"):
        post_hoc_emas(tmp_path, [0.1])
    with pytest.raises(UsageError, match="set at least two different lengths"):
        make_trainer(tmp_path, ema_sigma_rel=[0.1])


@pytest.mark.parametrize("preset", presets())
def test_the_decay_is_reached_by_the_end_of_every_preset(preset):
    """With ema-pytorch's own warm-up it was 0.99954 after 100,000 steps instead of the configured 0.9999."""
    options = load_config(preset).train
    ema = make_ema(torch.nn.Linear(1, 1), options, torch.device("cpu"))
    ema.step.fill_(options.train_num_steps)
    assert ema.get_current_decay() == pytest.approx(options.ema_decay**options.ema_update_every)
    ema.step.fill_(2)  # the published presets have no warm-up
    published = preset in ("cifar10", "imagenet64", "kinetics600_predict")
    assert (ema.get_current_decay() == pytest.approx(options.ema_decay)) == published


def averaged(values, **options) -> float:
    """Return the average of a weight that takes these values one after the other."""
    weight = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = make_ema(weight, TrainConfig(**options), torch.device("cpu"))
    for value in values:
        weight.weight.data.fill_(value)
        ema.update()
    return ema.ema_model.weight.item()


def test_a_decay_means_the_same_however_often_it_is_applied():
    """200 steps after a change from 0 to 1, the average is 1 - 0.99^200."""
    values = [0.0] * 101 + [1.0] * 200
    for every in (1, 4, 10):
        found = averaged(values, ema_decay=0.99, ema_warmup=None, ema_update_every=every)
        assert found == pytest.approx(1 - 0.99**200)


def test_the_warm_up_spans_a_share_of_the_steps():
    """For a linear ramp, an average over n steps lags by n, which is a tenth of the steps so far."""
    assert averaged(range(10_001), ema_decay=1 - 1e-9, ema_warmup=0.1) == pytest.approx(10_000 * (1 - 1 / 11), rel=1e-3)
    assert averaged(range(10_001), ema_decay=0.99, ema_warmup=0.1) == pytest.approx(10_000 - 99, rel=1e-4)
