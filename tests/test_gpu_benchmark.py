"""The benchmark of GPUs, on the CPU: the budget of a call, resuming, costs and batches, and tiny jobs."""

import dataclasses
import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import means  # noqa: F401 (registers a cheap extractor)
import pytest
import torch

from rin_video.media import write_video

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the scripts import each other from their folder
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def jobs():
    for name in ("peers", "run", "objects", "atari", "video_learning", "loader"):
        load(name)
    return load("gpu_jobs")


@pytest.fixture(scope="module")
def gpu(jobs):
    return load("gpu")


# ---- the budget of a call


class Fakes:
    """Jobs that take given seconds, and are cut off if they have fewer; a training takes several parts."""

    def __init__(self, gpu, seconds, steps=0):
        self.gpu, self.seconds, self.now, self.steps = gpu, seconds, 0.0, steps
        self.started, self.saved = [], []

    def execute(self, job, left):
        self.started.append(job.title)
        row = {"job": json.loads(json.dumps(dataclasses.asdict(job))), "state": "done", "given": {}}
        needed = self.seconds.get(job.title, 10.0)
        if isinstance(needed, str):
            row |= {"state": "failed", "error": needed}
            needed = 1.0
        elif job.mode == "clips":
            self.steps, needed = self.steps - left, min(self.steps, left)
            row |= {"state": "done" if self.steps <= 0 else "open", "trained_steps": 1, "trained_seconds": needed}
        elif needed > left:
            row |= {"state": "open", "cut_off_seconds": left}
            needed = left
        self.now += needed
        numbers = dict.fromkeys(("step_seconds", "samples_per_second", "share", "first_step_seconds"), 1.0)
        numbers |= dict.fromkeys(("seconds_per_call", "frames_per_second"), 1.0)
        return row | numbers | {"wall_seconds": needed, "batch": 1, "accumulate": 1, "workers": 1}

    def call(self, jobs, rows, minutes=5.0, **options):
        self.now, self.started = 0.0, []
        save = self.saved.append
        return self.gpu.run_call(jobs, rows, self.execute, save, minutes, lambda: self.now, **options)


def test_a_call_starts_only_what_is_expected_to_end_in_it(gpu):
    jobs = [gpu.Job("train", name, "fp32", "preset") for name in "abcdefgh"]
    fakes, rows = Fakes(gpu, {"train a fp32": 70.0}), []
    left = fakes.call(jobs, rows)
    assert fakes.now <= 300
    assert fakes.started == [f"train {name} fp32" for name in "abcdefgh"]
    assert not left
    assert len(fakes.saved) == len(jobs)  # after each one
    slow = [gpu.Job("train", name, "compile", "preset") for name in "abc"]
    fakes.seconds = {job.title: 150.0 for job in slow}
    left = fakes.call([*slow, gpu.Job("loader", "a")], rows)
    assert fakes.started == ["train a compile", "loader a"]  # 200 s are expected of the next one, later 225 s
    assert left == slow[1:]
    assert fakes.call(slow, rows) == slow[2:]
    assert fakes.started == ["train b compile"]
    assert fakes.call(slow, rows) == []
    assert fakes.call(slow, rows) == []
    assert fakes.started == []


def test_a_failed_job_is_recorded_and_run_again_on_request(gpu):
    jobs = [gpu.Job("sample", name, "bf16") for name in "ab"]
    fakes, rows = Fakes(gpu, {"sample a bf16": "OutOfMemoryError: 3 GB"}), []
    assert fakes.call(jobs, rows) == []
    assert [row["state"] for row in rows] == ["failed", "done"]
    fakes.call(jobs, rows)
    assert fakes.started == []
    fakes.call(jobs, rows, retry=True)
    assert fakes.started == ["sample a bf16"]
    fakes.seconds = {}
    assert fakes.call(jobs, rows, retry=True) == []
    assert sorted(row["state"] for row in rows) == ["done", "done"]


def test_a_job_that_is_cut_off_gets_more_time_and_fails_after_a_complete_call(gpu):
    jobs = [gpu.Job("train", "a", "fp32", "preset"), gpu.Job("train", "b", "fp32", "preset")]
    fakes, rows = Fakes(gpu, {"train a fp32": 50.0, "train b fp32": 1000.0}), []
    assert fakes.call(jobs, rows, 5.0) == jobs[1:]
    row = gpu.result_of(jobs[1], rows)
    assert row["state"] == "open"
    assert row["cut_off_seconds"] == 250
    assert gpu.expected(jobs[1], rows) == 500
    assert fakes.call(jobs, rows, 5.0) == []
    assert gpu.result_of(jobs[1], rows)["error"] == "did not end within a call of 5 minutes"


def test_a_change_of_a_preset_makes_another_job(gpu):
    job = gpu.with_digest(gpu.Job("sample", "demo", "bf16", tiny=True))
    old = dataclasses.replace(job, config="before")
    fakes, rows = Fakes(gpu, {}), []
    assert fakes.call([old], rows) == []
    assert fakes.call([job], rows) == []
    assert fakes.started == [job.title]
    assert [gpu.job_of(row) for row in rows] == [job]
    assert job.config != gpu.with_digest(dataclasses.replace(job, preset="video64")).config


def test_a_training_continues_in_the_next_calls_before_it_is_scored(gpu):
    training = gpu.Job("clips", "a", time="8m")
    scores = dataclasses.replace(training, mode="scores", num=12, steps=20, features="lite")
    others = [gpu.Job("train", "a", "fp32", "preset")]
    fakes, rows = Fakes(gpu, {others[0].title: 50.0}, steps=450.0), []
    assert fakes.call([*others, training, scores], rows) == [training, scores]
    assert fakes.started == [others[0].title, training.title]
    assert fakes.now == 300
    assert fakes.call([*others, training, scores], rows) == [scores]
    assert fakes.started == [training.title]  # 100 s are left, and 150 s are expected of the scores
    assert fakes.call([*others, training, scores], rows) == []
    assert fakes.started == [scores.title]


# ---- costs and batches


@pytest.mark.parametrize(
    ("preset", "inputs"),
    [("kinetics600_predict", 8 * 16 * 16 * (2 * 4 * 4 * 4)), ("image64", 64 * 64 * 3)],
)
def test_flops_of_a_training_sample(jobs, preset, inputs):
    """Counted FLOPs are those of a step, but for the gradient of the input, which is not computed.

    `inputs` is the number of values in the patches of a sample, with those of the mask.
    """
    config = jobs.load_config(preset, [*jobs.TINY, "diffusion.train_prob_self_cond=1"])
    info = jobs.model_info(config.model)
    forward = 1e9 * info.gflops
    assert jobs.training_flops(config) == pytest.approx(4 * forward)
    step = jobs.Step(config, 2, torch.device("cpu"))
    counted = sys.modules["run"].flops(step.gradient) / 2 + 2 * inputs * config.model.dim
    assert counted == pytest.approx(jobs.training_flops(config), rel=0.005)
    config.diffusion.train_prob_self_cond = 0.25
    assert jobs.training_flops(config) == pytest.approx(3.25 * forward)
    config.model.self_conditioning = "none"
    without = 1e9 * jobs.model_info(config.model).gflops
    assert jobs.training_flops(config) == pytest.approx(3 * without)


@pytest.mark.parametrize(("free", "preset", "largest"), [(1e9, 12, 96), (90, 12, 12), (50, 6, 6), (3, 1, 1)])
def test_batches_are_powers_of_two_times_that_of_the_preset(jobs, monkeypatch, free, preset, largest):
    config = jobs.load_config("demo", ["train.train_batch_size=12"])
    monkeypatch.setattr(jobs, "free_memory", lambda device: free / jobs.USABLE)
    needs = lambda config, device: 5 * config.train.train_batch_size if config.train.train_batch_size < 100 else 1e10  # noqa: E731
    monkeypatch.setattr(jobs, "training_memory", needs)
    device = torch.device("cpu")
    assert jobs.choose_batch(jobs.Job("train", "demo", "fp32", "preset"), config, device) == preset
    assert jobs.choose_batch(jobs.Job("train", "demo", "fp32", "largest"), config, device) == largest


def test_a_batch_is_halved_if_memory_runs_out(jobs):
    def work(batch):
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": batch}

    assert jobs.with_less(12, work) == {"batch": 3}
    with pytest.raises(torch.OutOfMemoryError):
        jobs.with_less(1, lambda batch: work(4))
    with pytest.raises(RuntimeError, match="shapes"):
        jobs.with_less(4, lambda batch: (_ for _ in ()).throw(RuntimeError("shapes differ")))


# ---- tiny jobs on the CPU


def here(tmp_path, **options):
    return Namespace(device="cpu", work=tmp_path, data=None, sheet=tmp_path / "sheet.png", seconds=60.0, **options)


@pytest.mark.parametrize("preset", ["ucf101_class", "cifar10"])
def test_rates_of_a_tiny_preset(gpu, jobs, tmp_path, monkeypatch, preset):
    monkeypatch.setattr(sys.modules["loader"], "LENGTH", 18)  # frames of the generated clips
    rows = []
    for job in (
        jobs.Job("train", preset, "fp32", "preset", tiny=True),
        jobs.Job("sample", preset, "bf16", tiny=True),
        jobs.Job("loader", preset, tiny=True),
    ):
        row = jobs.run_here(job, here(tmp_path))
        rows.append(row | {"job": dataclasses.asdict(job), "state": "done", "wall_seconds": 1.0, "cores": 2})
    train, sample, loader = rows
    assert train["step_seconds"] == pytest.approx(train["gradient_seconds"] + train["update_seconds"], rel=0.3)
    assert train["samples_per_second"] == pytest.approx(2 / train["step_seconds"], rel=1e-2)
    assert train["share"] == pytest.approx(train["tflops_per_second"] / train["peak_tflops_per_second"], rel=1e-2)
    assert sample["calls"] == 2
    assert 0 < sample["rms_to_fp32"] < 0.1
    assert loader["frames_per_second"] == pytest.approx(loader["samples_per_second"] * loader["frames"], rel=1e-2)
    for row in rows:
        assert preset in gpu.describe(row)
    text = gpu.table([row | {"device": "a GPU", "versions": {"torch": "2"}} for row in rows])
    assert text.count(f"| `{preset}` (tiny)") == 3


def test_a_training_in_parts_is_scored_at_its_end(gpu, jobs, tmp_path):
    for split, moves in (("train", 1), ("test", 2)):
        for game, start in (("high", 4), ("low", 20)):
            (tmp_path / split / game).mkdir(parents=True)
            for index in range(6):
                clip = torch.full((3, 20, 32, 32), 0.3)
                for f in range(20):
                    left = (moves * f + 4 * index) % 28
                    clip[:, f, start : start + 4, left : left + 4] = 0.9
                write_video(clip, tmp_path / split / game / f"{index}.mp4")
    common = {"preset": "demo", "tiny": True, "time": "4s", "options": ("train.mixed_precision=no",)}
    training = jobs.with_digest(jobs.Job("clips", **common))
    options = here(tmp_path / "work")
    options.data, parts = tmp_path, []
    for options.seconds in (0.0, 0.0, 60.0):  # at least one step is made in any time
        parts.append(jobs.run_here(training, options))
    assert [part["state"] for part in parts] == ["open", "open", "done"]
    steps = [part["trained_steps"] for part in parts]
    assert steps[:2] == [1, 2]
    assert parts[0]["trained_seconds"] < parts[1]["trained_seconds"] < 4 <= parts[2]["trained_seconds"]
    lines = (tmp_path / "work" / training.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps[-1] + 1))

    scores = jobs.with_digest(jobs.Job("scores", **common, num=6, steps=2, features="means"))
    row = jobs.run_here(scores, options)
    assert set(row["given"]) == {"high", "low", "mean"}
    assert 0 <= row["given"]["mean"]["prediction/moving_recall"]["value"] <= 1
    assert options.sheet.exists()
    about = {"device": "a GPU", "versions": {"torch": "2"}, "state": "done"}
    rows = [
        one | about | {"job": json.loads(json.dumps(dataclasses.asdict(job))), "wall_seconds": 1.0}
        for job, one in ((training, parts[-1]), (scores, row))
    ]
    text = gpu.table(rows)
    assert f"{steps[-1]:,} steps of 2" in text
    assert "| mean |" in text
    assert "recall of what moves" in gpu.describe(rows[1])


def test_an_error_of_a_job_is_its_result(gpu, jobs, tmp_path):
    job = jobs.Job("clips", "demo", tiny=True, time="2s")
    options = here(tmp_path, job=json.dumps(dataclasses.asdict(job)))
    options.data = tmp_path / "missing"
    gpu.child(options)
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["state"] == "failed"
    assert "UsageError" in row["error"]
    assert "missing" in row["error"]


def test_the_command_runs_jobs_in_processes_and_skips_what_is_there(gpu, tmp_path, capsys):
    command = ["--device", "cpu", "--tiny", "--presets", "demo", "--modes", "sample", "--variants", "fp32"]
    command += ["--work", str(tmp_path / "work"), "--minutes", "100"]  # this process is older than a call
    gpu.main(command)
    assert "1 of 1 jobs" in capsys.readouterr().out
    (row,) = gpu.read_rows(tmp_path / "work" / "gpu.json")
    assert (row["state"], row["device"], row["calls"]) == ("done", "CPU", 2)
    place = tmp_path / "work" / "row.json"
    place.unlink()
    gpu.main(command)
    assert "1 of 1 jobs" in capsys.readouterr().out
    assert not place.exists()
    gpu.main([*command, "--table"])
    assert "| `demo` (tiny) | 1 | dpmpp_2m_sde |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "there is no GPU: --device cpu --tiny"),
        (["--device", "cuda"], "torch finds no GPU here"),
        (["--device", "cpu", "--tiny", "--minutes", "0"], "--minutes is 0"),
        (["--device", "cpu", "--tiny", "--num", "3"], "--num is 3"),
        (["--device", "cpu", "--tiny", "--time", "soon"], "--time"),
        (["--device", "cpu", "--tiny", "--data", "nowhere"], "has no clips"),
    ],
)
def test_a_command_that_cannot_run_ends_with_a_message(gpu, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_committed_results_are_readable(gpu):
    rows = gpu.read_rows(BENCHMARKS / "results" / "gpu.json")
    assert rows
    assert all(gpu.job_of(row).key for row in rows)
    assert "`kinetics600_predict`" in gpu.table(rows)
