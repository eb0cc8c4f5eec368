"""Training for a time: durations, the schedule by the clock, the end, resuming, and the choice of a size."""

import json
import logging
import math
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import make_trainer
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError, cli
from rin_video.cli import time_budget
from rin_video.config import TrainConfig
from rin_video.config_checks import read_duration
from rin_video.config_files import load_config
from rin_video.errors import Stopped
from rin_video.media import write_video
from rin_video.model.info import model_info
from rin_video.training.budget import Budget, expected_end
from rin_video.training.callbacks import Callback
from rin_video.training.metrics import read_lines, read_validation
from rin_video.training.optimizers import timed_lr_factor
from rin_video.training.sizes import SIZES, Size, choose_size, overrides_of
from rin_video.training.state import newest_state
from rin_video.training.step_time import measure_step


class Clock:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.now = 1e5

    def __call__(self) -> float:
        return self.now


# ---- durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("1.5h", 5400), ("1d2h3m4.5s", 93784.5)],
)
def test_durations(text, seconds):
    assert read_duration("train.time", text) == seconds
    assert load_config(None, [f"train.time={text}"]).train.time == text
    assert TrainConfig(time=text).time == text


@pytest.mark.parametrize("text", ["", "30", "m", "30 m", "30M", "-1h", "0s", "0m0s", "1m1h", "1h1h", "soon", "1e3s",
                                  "٣s", "1" + "0" * 400 + "d", "30m\n", 30, 1.5, True])  # fmt: skip
def test_what_is_no_duration_is_named_with_examples(text):
    with pytest.raises(UsageError) as error:
        TrainConfig(time=text)
    assert str(error.value) == (
        f"train.time is {text!r}: it must be a time above 0 with units, such as 90s, 30m, 2h, 1d or 1h30m"
    )


# ---- the learning rate


def test_the_learning_rate_warms_up_by_steps_or_time_and_ends_at_zero_with_the_time():
    options = TrainConfig(warmup_steps=50, time="1m")
    cosine = lambda fraction: 0.5 * (1 + math.cos(math.pi * fraction))  # noqa: E731
    assert timed_lr_factor(options, 10, 0.01) == pytest.approx(0.2 * cosine(0.01))  # a fast machine: by steps
    assert timed_lr_factor(options, 2, 0.05) == pytest.approx(0.5 * cosine(0.05))  # a slow one: a tenth of the time
    assert timed_lr_factor(options, 5, 0.1) == pytest.approx(cosine(0.1))
    assert timed_lr_factor(options, 60, 0.02) == pytest.approx(cosine(0.02))
    assert timed_lr_factor(options, 1000, 0.5) == pytest.approx(0.5)
    assert timed_lr_factor(options, 7, 1.0) == 0
    part = TrainConfig(lr_cosine_portion=0.5)
    assert timed_lr_factor(part, 7, 1.0) == pytest.approx(0.5)
    assert timed_lr_factor(TrainConfig(lr_schedule="constant", warmup_steps=10), 3, 0.9) == 1
    assert timed_lr_factor(TrainConfig(lr_cosine_portion=2), 3, 0.9) == 0


# ---- the clock


def run_steps(budget, clock, seconds=1.0, *, end=None, step=0, most=10_000):
    """Make steps of a duration until the last one, with checkpoints when they are due; return all paces."""
    paces = []
    budget.start(step)
    while not (paces and paces[-1].is_last) and len(paces) < most:
        clock.now += seconds(len(paces)) if callable(seconds) else seconds
        step += 1
        paces.append(budget.advance(step))
        if paces[-1].saves:
            for part, taken in (end or {}).items():
                with budget.measuring(part):
                    clock.now += taken
    budget.stop()
    return paces


@pytest.mark.parametrize("step_seconds", [0.01, 0.7, 3.0])
@pytest.mark.parametrize("end", [{"checkpoint": 0.0}, {"validation": 0.5, "checkpoint": 1.0, "samples": 2.0}])
def test_steps_and_the_end_together_take_the_time(step_seconds, end):
    """The end is measured at the first checkpoint, although nothing is known about it before."""
    clock = Clock()
    start, budget = clock.now, Budget(100.0, clock=clock)
    paces = run_steps(budget, clock, step_seconds, end=end)
    assert clock.now - start == pytest.approx(100, abs=step_seconds / 2 + 0.01)
    assert budget.spent >= 100
    assert budget.is_over
    fractions = [pace.fraction for pace in paces]
    assert fractions[-1] == 1
    assert fractions[-2] < 1
    assert fractions == sorted(fractions)
    assert all(pace.num_steps > pace.step for pace in paces[:-1])
    assert paces[-1].num_steps == len(paces)
    saves = [pace.step for pace in paces if pace.saves]
    # Every tenth of the time, or less often, so that they take a tenth of the time.
    assert len(saves) in ((8, 9, 10) if len(end) == 1 else (3,))
    assert len([pace for pace in paces[len(paces) // 2 :] if abs(pace.num_steps - len(paces)) > 0.1 * len(paces)]) == 0


def test_the_estimate_follows_steps_that_become_slower():
    clock = Clock()
    start = clock.now
    paces = run_steps(Budget(100.0, clock=clock), clock, lambda n: 0.1 if n < 300 else 0.5)
    assert clock.now - start == pytest.approx(100, abs=0.25)
    assert paces[200].num_steps == pytest.approx(1000, rel=0.01)
    assert len(paces) == pytest.approx(300 + 70 / 0.5, abs=1)


def test_an_end_that_takes_longer_than_the_time_leaves_half_of_it_and_is_reported():
    clock = Clock()
    budget = Budget(10.0, expected=lambda step_seconds: {"samples": 100 * step_seconds}, clock=clock)
    said = []
    budget.start(0)
    for step in range(1, 100):
        clock.now += 1
        pace = budget.advance(step)
        said += [budget.warning()]
        if pace.is_last:
            break
    assert step == 5
    assert said[:2] == said[3:4] * 2 == [None, None]
    assert said[2] == (
        "the last validation, checkpoint and samples will take about 2 minutes of the 10 seconds: a smaller "
        "sample.num_samples or sample.steps leaves more for training"
    )
    assert said[4] == (
        "only 5 steps of 1 second fitted into 10 seconds: use more time, a smaller model or smaller batches"
    )


def test_the_time_between_two_starts_does_not_count():
    clock = Clock()
    budget = Budget(100.0, clock=clock)
    paces = run_steps(budget, clock, most=40)
    assert paces[-1].fraction == pytest.approx(0.4)
    state = json.loads(json.dumps(budget.state()))
    clock.now += 1e6
    resumed = Budget(100.0, clock=clock)
    resumed.load_state(state)
    assert not resumed.is_over
    again = run_steps(resumed, clock, step=40)
    assert again[0].fraction == pytest.approx(0.41)
    assert again[-1].step == 100
    assert resumed.state()["spent"] == 100
    longer = Budget(200.0, clock=clock)
    longer.load_state(resumed.state())
    assert run_steps(longer, clock, step=100)[0].fraction == pytest.approx(0.505)


def test_processes_follow_the_clock_of_the_first_and_seldom_wait_for_it():
    clocks, sent = [Clock(), Clock()], []
    main = Budget(20.0, clock=clocks[0], share=lambda numbers: sent.append(list(numbers)) or numbers)
    other = Budget(20.0, clock=clocks[1], share=lambda numbers: sent[-1])
    main.start(0)
    other.start(0)
    for step in range(1, 10_000):
        clocks[0].now += 0.1
        clocks[1].now += 7  # another speed, which must not matter
        one, two = main.advance(step), other.advance(step)
        assert one == two
        assert one.fraction == pytest.approx(step * 0.1 / 20, abs=0.001)
        if one.is_last:
            break
    assert step == 200
    assert len(sent) < 30


def test_the_expected_end_grows_with_what_is_to_be_drawn():
    config = load_config("demo", ["train.train_batch_size=16"])
    end = expected_end(config, 10**6, 3.0, validated=True)  # 16 samples: a forward pass takes 1/16 s
    assert end["validation"] == pytest.approx(2 * 64 * 8 / 16)
    assert end["samples"] == pytest.approx(9 * 50 / 16 + 1)
    assert expected_end(config, 10**6, 3.0, validated=False)["validation"] == 0
    config.sample.sampler, config.sample.guidance = {"name": "heun", "churn": 0}, 1.0
    assert expected_end(config, 10**6, 3.0, validated=True)["samples"] == pytest.approx(4 * 9 * 50 / 16 + 1)


# ---- the trainer


class Takes(Callback):
    """Lets the clock run during steps, checkpoints and samples."""

    def __init__(self, clock, stop_at=None):
        self.clock, self.stop_at = clock, stop_at

    def on_step(self, trainer, loss):
        self.clock.now += 2
        if trainer.step == self.stop_at:
            signal.raise_signal(signal.SIGINT)

    def on_checkpoint(self, trainer, folder):
        self.clock.now += 1

    def on_sample(self, trainer, samples, paths):
        self.clock.now += 2


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A function that trains with a clock that is advanced by the callback."""
    clock = Clock()
    monkeypatch.setattr("rin_video.training.trainer.Budget", partial(Budget, clock=clock))
    monkeypatch.setattr("rin_video.training.trainer.expected_end", lambda *args, **options: {})

    def run(time="100s", stop_at=None, folder=tmp_path, **options):
        options = {"save_and_sample_every": 10_000, "warmup_steps": 10, "ema_snapshot_every": 10_000} | options
        trainer = make_trainer(folder, time=time, callbacks=[Takes(clock, stop_at)], **options)
        trainer.train()
        return trainer

    return SimpleNamespace(run=run, clock=clock, folder=tmp_path)


def test_a_run_ends_in_time_with_the_learning_rate_at_its_end(timed, caplog):
    caplog.set_level(logging.INFO)
    start = timed.clock.now
    trainer = timed.run(validated=True, validate_every=None, validation_samples=2, log_every=7)
    assert timed.clock.now - start == pytest.approx(100, rel=0.05)
    lines = read_lines(timed.folder / "metrics.jsonl")
    assert lines[-1]["step"] == trainer.step == trainer.options.train_num_steps  # a line although 7 does not divide it
    assert lines[-1]["lr"] == 0
    assert 0.2e-3 < lines[len(lines) // 2]["lr"] < 0.8e-3
    assert read_validation(timed.folder / "metrics.jsonl")[-1]["step"] == trainer.step
    assert trainer.checkpoints[-1].name == f"step-{trainer.step:08d}"
    assert len(list((timed.folder / "samples").iterdir())) == 4  # three in between, which take a tenth of the time
    assert (timed.folder / f"samples/step-{trainer.step:08d}.png").is_file()
    written = load_config(timed.folder / "config.yaml").train
    assert (written.time, written.train_num_steps) == ("100s", trainer.step)

    timed.clock.now += 1e6
    assert timed.run(validated=True).step == trainer.step
    assert f"is already trained for 100s (to step {trainer.step}): a larger --time trains for longer" in caplog.text
    assert timed.clock.now - start == pytest.approx(1e6 + 100, rel=0.05)

    (timed.folder / f"samples/step-{trainer.step:08d}.png").unlink()  # killed before the samples
    timed.run(validated=True)
    assert (timed.folder / f"samples/step-{trainer.step:08d}.png").is_file()
    longer = timed.run("140s", validated=True)
    assert longer.step == pytest.approx(1.4 * trainer.step, rel=0.05)


def test_a_resumed_run_continues_with_the_time_that_was_spent(timed):
    with pytest.raises(Stopped, match="step 15"):
        timed.run(stop_at=15)
    spent = newest_state(timed.folder)[1]["time"]["spent"]
    assert 30 <= spent <= 40
    timed.clock.now += 1e6
    start = timed.clock.now
    trainer = timed.run()
    assert timed.clock.now - start == pytest.approx(100 - spent, abs=5)
    rates = [line["lr"] for line in read_lines(timed.folder / "metrics.jsonl")]
    assert len(rates) == trainer.step
    assert np.abs(np.diff(rates)).max() < 0.21e-3  # those of the warm-up
    assert rates[-1] == 0


def test_a_run_of_steps_may_continue_for_a_time_and_the_reverse(timed):
    make_trainer(timed.folder, train_num_steps=5).train()
    assert "time" not in newest_state(timed.folder)[1]
    start = timed.clock.now
    trainer = timed.run("20s")
    assert timed.clock.now - start == pytest.approx(20, rel=0.1)
    assert trainer.step > 10
    more = make_trainer(timed.folder, train_num_steps=trainer.step + 2)
    more.train()
    assert more.step == trainer.step + 2


def test_the_same_trainer_continues_after_a_stop(timed):
    clock, options = timed.clock, {"save_and_sample_every": 10_000}
    trainer = make_trainer(timed.folder, time="50s", callbacks=[Takes(clock, 10)], **options)
    with pytest.raises(Stopped):
        trainer.train()
    spent = trainer.budget.spent
    clock.now += 1e6
    trainer.train()
    assert trainer.budget.spent == pytest.approx(50, rel=0.05)
    assert spent < 30
    assert trainer.budget.is_over


def test_time_and_steps_in_python_exclude_each_other(tmp_path):
    diffusion = GaussianDiffusion(RIN(dim=32, dim_latent=32, num_latents=8, depth=1, image_size=8))
    data = torch.rand(8, 3, 8, 8)
    with pytest.raises(UsageError, match="time and train_num_steps both set the length of the training"):
        Trainer(diffusion, data, results_folder=tmp_path, time="30m", train_num_steps=3)
    with pytest.raises(UsageError, match=r"train\.time is '30': it must be a time"):
        Trainer(diffusion, data, results_folder=tmp_path, time="30")
    assert Trainer(diffusion, data, results_folder=tmp_path, time="30m").budget.seconds == 1800


# ---- the sizes


def test_the_table_is_in_order_and_every_size_can_be_built_for_any_shape():
    assert [size.least_samples for size in SIZES] == sorted(size.least_samples for size in SIZES)
    assert SIZES[0].least_samples == 0
    for frames, H, W in ((16, 64, 64), (6, 48, 32), (5, 128, 128), (None, 256, 192)):
        shape = [f"model.frames={frames or 'null'}", f"model.image_size=[{H},{W}]"]
        configs = [load_config(None, [*shape, *overrides_of(size, frames, (H, W))]) for size in SIZES]
        infos = [model_info(config.model) for config in configs]
        assert infos[0].shape == (3, *((frames,) if frames else ()), H, W)
        params = [info.params for info in infos]
        assert params == sorted(params)
        assert all(info.tokens <= 2048 for info in infos)
        if (frames, H, W) == (16, 64, 64):
            assert 2e6 < params[0] < 3e6
            assert 55e6 < params[-1] < 65e6


@pytest.mark.parametrize(
    ("seen", "chosen", "larger"),
    [
        ([1, 1, 1], 0, 1),  # the smallest is used in any case
        ([100, 10, 1], 1, 2),
        ([100, 20, 20], 2, None),
        ([100, 9, 1000], 0, 1),  # what is beyond a size that is not worth its cost is not measured
        ([100, None, 1000], 0, 1),
    ],
)
def test_the_largest_size_that_sees_enough_is_chosen(seen, chosen, larger):
    asked = []
    choice = choose_size([0, 10, 20], lambda place: asked.append(place) or seen[place], lambda samples: samples)
    assert (choice.chosen, choice.larger) == (chosen, larger)
    assert asked == list(range(len(asked)))
    assert len(asked) == (3 if larger is None else larger + 1)


def test_a_step_is_measured():
    tiny = ["model.dim=32", "model.dim_latent=32", "model.depth=1", "data.num_workers=0"]
    config = load_config("demo", tiny)
    one = measure_step(config, torch.device("cpu"))
    config.train.gradient_accumulate_every = 4
    assert 0 < one < measure_step(config, torch.device("cpu"))


# ---- the command line

TINY = ["sample.steps=2", "sample.num_samples=2", "data.num_workers=0", "train.log_every=1", "train.warmup_steps=0"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(3):
        write_video(torch.rand(3, 6, 24, 32, generator=torch.Generator().manual_seed(i)), folder / f"{i}.mp4")
    return folder


@pytest.fixture
def sizes(monkeypatch):
    """Four tiny sizes, of which the third is worth its cost and the fourth is not."""
    table = [
        Size(name, least, {"model": {"dim": dim, "dim_latent": dim, "depth": 1, "num_heads": 2, "latent_num_heads": 2,
                                     "num_latents": 8, "latent_self_attn_depth": 1}})
        for name, least, dim in (("a", 0, 16), ("b", 1, 32), ("c", 2, 48), ("d", 10**9, 64))
    ]  # fmt: skip
    monkeypatch.setattr(time_budget, "SIZES", table)
    monkeypatch.setattr(time_budget, "first_precision", lambda: "no")
    measured = []

    def measure(config, device, **options):
        measured.append(config.model.dim)
        return 0.02 * config.model.dim / 16

    monkeypatch.setattr(time_budget, "measure_step", measure)
    return measured


def test_train_for_a_time_and_resume(clips, tmp_path, sizes, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--out", str(out)]
    assert cli.main([*command, "--time", "3s", *TINY]) == 0
    assert sizes == [16, 32, 48, 64]
    (said,) = [message for message in caplog.messages if message.startswith("model for")]
    first, chosen, rate, larger = said.splitlines()
    assert first.startswith("model for 3 seconds on ")
    assert chosen.startswith("  c: ")
    assert chosen.endswith(" parameters, batches of 3")  # there are three clips
    assert rate.startswith("  measured: 50 samples/s; expected: about ")
    assert rate.endswith(" samples (best from 2)")
    assert larger.startswith("  the next larger size, d: ")
    assert larger.endswith(" samples (best from 1,000,000,000)")
    config = load_config(out / "config.yaml")
    assert (config.model.dim, config.train.time, config.model.frames) == (48, "3s", 4)
    state = newest_state(out)[1]
    assert config.train.train_num_steps == state["step"] > 1
    assert read_lines(out / "metrics.jsonl")[-1]["lr"] == 0
    assert cli.main(["sample", str(out), "--num", "1", "--steps", "1", "--out", str(tmp_path / "x.mp4")]) == 0

    assert cli.main([*command, "--time", "3s", *TINY]) == 0  # the same command: neither a choice nor more training
    assert len(sizes) == 4
    assert "is already trained for 3s" in caplog.text
    assert cli.main([*command, "--time", "5s", *TINY]) == 0
    longer = newest_state(out)[1]
    assert longer["step"] > state["step"]
    assert longer["time"]["spent"] >= 5
    assert cli.main([*command, "--steps", str(longer["step"] + 2), *TINY]) == 0
    assert newest_state(out)[1]["step"] == longer["step"] + 2
    assert load_config(out / "config.yaml").train.time is None
    assert len(sizes) == 4


@pytest.mark.parametrize(
    ("fast_products", "slower", "chosen"),
    [("bf16", 2, "no"), ("bf16", 0.95, "no"), ("bf16", 0.5, "bf16"), ("no", 0.5, "no")],
)
def test_the_precision_is_the_faster_one_for_the_size(monkeypatch, fast_products, slower, chosen):
    times = {"no": 1.0, "bf16": slower}
    monkeypatch.setattr(time_budget, "first_precision", lambda: fast_products)
    monkeypatch.setattr(time_budget, "measure_step", lambda config, *_, **__: times[config.train.mixed_precision])
    config = load_config("demo", ["train.mixed_precision=auto"])
    assert time_budget.measure_size(config, 60.0).precision == chosen
    config.train.mixed_precision = "bf16"  # not to be chosen
    assert time_budget.measure_size(config, 60.0).precision == "bf16"


def test_options_of_the_command_take_precedence_over_the_size(clips, tmp_path, sizes):
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--out", str(tmp_path / "run")]
    options = ["model.dim=32", "model.dim_latent=32", "--batch-size", "2", "train.train_lr=3e-3"]
    assert cli.main([*command, "--time", "1s", *TINY, *options]) == 0
    assert sizes == [32]  # all sizes are equal
    config = load_config(tmp_path / "run/config.yaml")
    assert (config.model.dim, config.train.train_batch_size, config.train.train_lr) == (32, 2, 3e-3)


def test_a_preset_keeps_its_model(clips, tmp_path, sizes):
    tiny = ["model.dim=32", "model.dim_latent=32", "model.num_latents=8", "model.num_classes=0"]
    tiny.append("model.patch_size=[4,4,4]")
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--config", "demo", "--time", "1s", "--batch-size", "2", *tiny, *TINY]) == 0
    assert sizes == []
    config = load_config(tmp_path / "run/config.yaml")
    assert (config.model.dim, config.train.train_lr) == (32, load_config("demo").train.train_lr)


def test_a_size_that_does_not_fit_into_memory_is_not_used(clips, tmp_path, sizes, monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(
        time_budget, "training_memory", lambda config, **options: 10 ** (18 if config.model.dim > 16 else 1)
    )
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--time", "1s", *TINY]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert sizes == [16]
    assert "the next larger size, b: does not fit into memory" in caplog.text
    monkeypatch.setattr(time_budget, "training_memory", lambda config, **options: 10**18)
    capsys.readouterr()
    assert cli.main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "not even the smallest model fits into memory: set a smaller --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--time", "30"], "train.time is '30': it must be a time above 0 with units, such as 90s, 30m, 2h, 1d"),
        (["train.time=soon"], "train.time is 'soon': it must be a time"),
        (["--time", "30m", "--steps", "5"], "--time 30m and --steps 5 both set the length of the training: leave out"),
        (["--time", "30m", "train.train_num_steps=5"], "both set the length of the training"),
    ],
)
def test_mistakes(clips, tmp_path, capsys, argv, words):
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--out", str(tmp_path / "run")]
    assert cli.main([*command, *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_steps_replace_the_time_of_a_file(clips, tmp_path):
    (tmp_path / "timed.yaml").write_text("train: {time: 1h, train_num_steps: 7}\n")
    tiny = ["model.dim=32", "model.dim_latent=32", "model.num_latents=8", "model.depth=1", "model.patch_size=[2,4,4]"]
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--config", str(tmp_path / "timed.yaml"), "--steps", "2", *tiny, *TINY]) == 0
    assert newest_state(tmp_path / "run")[1]["step"] == 2


def test_weights_of_a_timed_run_load(timed):
    trainer = timed.run("10s")
    loaded = GaussianDiffusion.from_pretrained(timed.folder)
    assert_close(loaded.model.state_dict(), trainer.ema.ema_model.state_dict(), rtol=0, atol=0)
