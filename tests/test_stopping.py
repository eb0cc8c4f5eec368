"""Signals, kills, NaN, out of memory: a run that ends early reports it and loses nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import Noise, make_trainer
from torch.testing import assert_close

from rin_video import UsageError, cli
from rin_video.errors import Stopped
from rin_video.training.callbacks import Callback
from rin_video.training.locking import lock_run
from rin_video.training.metrics import Metrics
from rin_video.training.signals import StopSignals
from rin_video.training.state import newest_state


class At(Callback):
    """A callback that calls a function once, after a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step(self, trainer, loss):
        if trainer.step == self.step:
            self.what()


def lines(folder: Path) -> list:
    """Return the metrics without timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("samples_per_second", "data_wait")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, log_every=4).train()
    return folder


CODES = {  # by the way in which a training ends; killed processes have none on Windows
    "end": 0,
    "error of the dataset": 1,
    "error of the training": 1,
    "error of the training, workers that hang": 1,
    "workers that die": 1,
    "Ctrl-C": 130,
    "SIGTERM": Stopped.CODE,
    "kill": -9,
    "kill, workers that hang": -9,
    "kill while writing": -9,
    "error while probing": 1,
    "kill while probing": -9,
    "kill while preparing": -9,
    "forgotten": 0,
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> SimpleNamespace:
    """Trainings that ended in all these ways, and the processes that were still running ten seconds later."""
    folder = tmp_path_factory.mktemp("endings")
    command = [sys.executable, str(Path(tiny_run.__file__).with_name("endings.py")), str(folder), *CODES]
    environment = os.environ | {"ENDINGS": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    report = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    end = time.monotonic() + 10

    def processes() -> list[psutil.Process]:
        """Return the processes that have inherited the environment."""
        found = psutil.process_iter(["environ"])
        return [process for process in found if (process.info["environ"] or {}).get("ENDINGS") == str(folder)]

    while (left := processes()) and time.monotonic() < end:
        time.sleep(0.05)
    for process in left:
        process.kill()
    return SimpleNamespace(folder=folder, left=left, **report)


def assert_same_run(folder: Path, whole: Path) -> None:
    one, other = newest_state(folder)[1], newest_state(whole)[1]
    for state in (one, other):
        state["config"] = None
    assert_close(one, other, rtol=0, atol=0)
    assert lines(folder) == lines(whole)
    for name in ("model.safetensors", "averages/step-00000015.safetensors"):
        assert_close(load_file(folder / name), load_file(whole / name), rtol=0, atol=0)
    picture = "samples/step-00000020.png"
    assert (folder / picture).read_bytes() == (whole / picture).read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_stops_gracefully_and_nothing_is_lost(tmp_path, whole, name):
    """The signal arrives between two lines of metrics and between two checkpoints."""
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    before = signal.getsignal(getattr(signal, name))
    stop = At(7, lambda: signal.raise_signal(getattr(signal, name)))
    with pytest.raises(Stopped, match=f"stopped by {name} at step 7, checkpoint written") as stopped:
        make_trainer(tmp_path, log_every=4, callbacks=[stop]).train()
    assert stopped.value.code == 75
    assert signal.getsignal(getattr(signal, name)) is before
    assert newest_state(tmp_path)[1]["step"] == 7
    make_trainer(tmp_path, log_every=4).train()
    assert_same_run(tmp_path, whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[At(3, twice)]).train()
    assert newest_state(tmp_path) is None
    with StopSignals() as signals:  # later signals of the cluster change nothing
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == "SIGTERM"


def test_the_command_line_ends_with_a_code_of_its_own(monkeypatch, capsys):
    def stop(options):
        raise Stopped("stopped by SIGTERM at step 7")

    monkeypatch.setattr("rin_video.cli.inspect.info", stop)
    assert cli.main(["info"]) == 75
    assert capsys.readouterr().err == "rin-video: stopped by SIGTERM at step 7\n"


def test_a_kill_while_writing_loses_nothing(ended, whole):
    """A short version of benchmarks/kill_test.py: the process is killed while it writes the second checkpoint."""
    folder = ended.folder / "kill while writing"
    assert (folder / "checkpoints" / "step-00000020.tmp" / "state.safetensors").exists()
    assert newest_state(folder)[1]["step"] == 10
    make_trainer(folder, log_every=4).train()
    assert_same_run(folder, whole)


def test_whatever_ends_a_training_no_process_is_left(ended):
    """This includes workers that hang, or ignore the signals that a cluster sends to all processes of a job."""
    assert ended.left == []
    assert ended.running == []
    assert all(seconds < 10 for seconds in ended.seconds.values()), ended.seconds
    if os.name != "nt":
        assert ended.codes == CODES
    assert (
        newest_state(ended.folder / "SIGTERM")[1]["step"] == 1
    )  # the workers got the signal too, and the step was completed


def test_stopped_between_checkpoint_and_pictures(tmp_path, whole):
    make_trainer(tmp_path, log_every=4).train()
    (tmp_path / "samples/step-00000020.png").unlink()
    make_trainer(tmp_path, log_every=4).train()
    assert_same_run(tmp_path, whole)


# ---- not a number


class Broken(Noise):
    """Sample 5 is NaN."""

    def __getitem__(self, index):
        return {"x": torch.full((3, 8, 8), torch.nan) if index == 5 else self.x[index]}


class BrokenFiles(Broken):
    files = [f"clips/{i}.mp4" for i in range(29)]  # noqa: RUF012


@pytest.mark.parametrize(("data", "name"), [(Broken(), "sample 5"), (BrokenFiles(), "clips/5.mp4")])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_file(tmp_path, data, name):
    run = make_trainer(tmp_path, data=data, save_and_sample_every=1, log_every=10, train_batch_size=4)
    with pytest.raises(UsageError, match=rf"the loss of step \d is not finite. The samples were {name}\.") as error:
        run.train()
    step = run.step
    assert f"The last good checkpoint is {run.checkpoints[-1] if step > 1 else 'none'}" in str(error.value)
    assert all(state.name < f"step-{step:08d}" for state in run.checkpoints)


def test_the_first_bad_step_is_found_among_many():
    from rin_video.diffusion.process import LossTerms

    metrics = Metrics(None, step=100)
    for step in range(4):
        loss = [torch.ones(3), torch.tensor([1.0, torch.nan if step >= 2 else 1.0, 1.0])]
        read = [[10 * step, 1, 2], [3, 10 * step + 4, 5]]  # one of them is a replacement
        metrics.add([LossTerms(one, torch.rand(3), one) for one in loss], torch.tensor(1.0), 0.0, read)
    assert metrics.failure() == (103, [24], True)
    metrics.restart(104)
    metrics.add([LossTerms(torch.ones(3), torch.rand(3), torch.ones(3))], torch.tensor(torch.inf), 0.0, [[7, 8, 6]])
    assert metrics.failure() == (105, [6, 7, 8], False)
    assert metrics.failure(check_gradient=False) is None


# ---- memory


def test_out_of_memory_errors_have_numbers(tmp_path, monkeypatch):
    run = make_trainer(tmp_path)

    def fail(*batch, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(run.diffusion, "forward", fail)
    with pytest.raises(UsageError, match=r"out of memory on cpu: a batch of 8 needs about .* [MG]B are free") as error:
        run.train()
    for way in (
        "train.train_batch_size=4 with train.gradient_accumulate_every=2 (the same step) needs",
        "train.gradient_checkpointing=true needs",
        "train.mixed_precision=bf16 needs",
    ):
        assert way in str(error.value)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    run = make_trainer(tmp_path)

    def fail(*batch, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(run.diffusion, "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        run.train()


@pytest.mark.slow
def test_the_example_trains_on_tensors_of_its_own(tmp_path):
    script = Path(__file__).parents[1] / "examples" / "spectrograms.py"
    assert len(script.read_text().splitlines()) < 40
    subprocess.run([sys.executable, str(script), str(tmp_path / "run"), "6"], check=True, timeout=120)
    assert (tmp_path / "run/samples/step-00000006.png").is_file()
    assert "loudness" in (tmp_path / "run/evaluations.jsonl").read_text()


def test_one_training_at_a_time_in_a_folder(tmp_path):
    """The lock is released with its process, even if that is killed and its children survive."""
    code = "import os, sys, time; from pathlib import Path; from rin_video.training.locking import lock_run"
    code += "; lock = lock_run(Path(sys.argv[1])); lock.__enter__(); child = os.fork(); child or os.close(1)"
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{code}; child and print('locked', child, flush=True); time.sleep(60)",
            tmp_path / "run",
        ],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said, child = other.stdout.readline().split()
    assert said == b"locked"
    with pytest.raises(UsageError, match=r"another process is training in .*run: wait until it ends, stop it, or"):
        make_trainer(tmp_path / "run", train_num_steps=1).train()
    assert not (tmp_path / "run/metrics.jsonl").exists()
    other.kill()
    other.communicate()
    try:
        make_trainer(tmp_path / "run", train_num_steps=1).train()
    finally:
        os.kill(int(child), signal.SIGKILL)
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_folder_without_locks_is_tolerated(tmp_path, monkeypatch, caplog):
    def refuse(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock_run(tmp_path):
        assert "cannot be locked" in caplog.text
