"""Runs trainings that end in different ways, in parallel processes: `python endings.py FOLDER ENDING...`.

Prints as JSON the exit code of each, the seconds from the end of the training to that of the process, and which are
still running after a minute.
"""
# ruff: noqa: E402

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

exit_code = 0
if __name__ == "__main__":
    # It is registered first and therefore called last, after multiprocessing has joined its children. Afterwards Python
    # frees all modules, which takes a second per process.
    atexit.register(lambda: os._exit(exit_code))

import psutil
import torch
from PIL import Image
from tiny_run import Noise, make_trainer

from rin_video.config import DataConfig
from rin_video.datasets import prepare
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.probing import run_in_subprocess
from rin_video.training.callbacks import Callback
from rin_video.training.signals import ignore_signals


class Rogue(Noise):
    """A dataset whose workers read their first samples and then behave as `kind` says."""

    def __init__(self, kind: str, num_good: int = 8) -> None:
        super().__init__()
        self.kind, self.num_good, self.num = kind, num_good, 0

    def __getitem__(self, index):
        self.num += 1
        if self.num > self.num_good:
            if self.kind == "raises":
                raise KeyError("label")
            if self.kind == "hangs":
                time.sleep(600)
            if self.kind == "kills":
                psutil.Process().kill()
        return super().__getitem__(index)


class Do(Callback):
    """A callback that calls a function in every step."""

    def __init__(self, what) -> None:
        self.what = what

    def on_step(self, trainer, loss) -> None:
        self.what()


def fail() -> None:
    raise ZeroDivisionError


def interrupt() -> None:
    """Press Ctrl-C twice; a terminal sends it to the workers too."""
    for _ in range(2):
        for child in psutil.Process().children():
            child.send_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def terminate() -> None:
    """Send the signals that a cluster sends."""
    for child in psutil.Process().children():
        child.terminate()
    signal.raise_signal(signal.SIGTERM)


def train(folder: Path, what=lambda: None, kind: str = "reads", max_failures: int = 100) -> None:
    trainer = make_trainer(
        folder,
        data=Rogue(kind),
        callbacks=[Do(what)],
        num_workers=2,
        train_num_steps=4,
        save_and_sample_every=100,
        ema_sigma_rel=[],
    )
    trainer.config.data.max_failures = max_failures
    trainer.sample = lambda: None
    trainer.train()


def kill_while_writing(folder: Path) -> None:
    """Kill the training while it writes the second checkpoint."""
    fsync, file = os.fsync, folder / "checkpoints" / "step-00000020.tmp" / "state.safetensors"

    def fatal_fsync(handle: int) -> None:
        if file.exists():
            psutil.Process().kill()
        fsync(handle)

    os.fsync = fatal_fsync
    trainer = make_trainer(folder, log_every=4)
    trainer.sample = lambda: None
    trainer.train()


def probe(folder: Path, tasks: list, work, what=lambda: None) -> None:
    """Probe the data, as before a training."""
    results = run_in_subprocess(tasks, work, seconds=600, processes=2, daemon=False)
    next(results)
    what()


def kill_parent(job) -> None:
    psutil.Process().parent().kill()
    time.sleep(600)


def prepare_data(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "data" / "a.png")
    prepare._write = kill_parent
    prepare.prepare(folder / "data", "image", folder / "out", (8, 8), DataConfig(), workers=1)


def forget(folder: Path) -> None:
    """Do not close a loader whose workers hang."""
    global forgotten
    forgotten = TrainLoader(Rogue("hangs"), DataConfig(num_workers=2), 8, seed=0, worker_init_fn=ignore_signals)
    next(forgotten)


ENDINGS = {
    "end": train,
    "error of the dataset": lambda folder: train(folder, kind="raises"),
    "error of the training": lambda folder: train(folder, fail),
    "error of the training, workers that hang": lambda folder: train(folder, fail, "hangs"),
    "workers that die": lambda folder: train(folder, kind="kills", max_failures=0),
    "Ctrl-C": lambda folder: train(folder, interrupt),
    "SIGTERM": lambda folder: train(folder, terminate),
    "kill": lambda folder: train(folder, psutil.Process().kill),
    "kill, workers that hang": lambda folder: train(folder, psutil.Process().kill, "hangs"),
    "kill while writing": kill_while_writing,
    "error while probing": lambda folder: probe(folder, ["a"] * 20, len, fail),
    "kill while probing": lambda folder: probe(folder, [0, *[600] * 19], time.sleep, psutil.Process().kill),
    "kill while preparing": prepare_data,
    "forgotten": forget,
}


def run(folder: Path, ending: str) -> None:
    global exit_code
    try:
        ENDINGS[ending](folder)
    except BaseException as error:
        exit_code = error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1
        raise
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ended").write_text(repr(time.time()))


def main(folder: Path, endings: list[str]) -> None:
    running = {}
    for ending in endings:
        if hasattr(os, "fork"):  # fork this process, so that torch is imported only once
            number = os.fork()
            if not number:
                return run(folder / ending, ending)
        else:
            number = subprocess.Popen([sys.executable, __file__, str(folder), "--one", ending]).pid
        running[psutil.Process(number)] = ending
    codes, seconds = {}, {}

    def note(process: psutil.Process) -> None:
        ending = running[process]
        ended = folder / ending / "ended"
        codes[ending] = process.returncode
        if ended.exists():  # missing if the process was killed
            seconds[ending] = time.time() - float(ended.read_text())

    _, left = psutil.wait_procs(list(running), timeout=60, callback=note)
    report = {"codes": codes, "seconds": seconds, "running": [running[process] for process in left]}
    print(json.dumps(report), flush=True)  # noqa: T201
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    if words[0] == "--one":
        run(Path(folder) / words[1], words[1])
    else:
        main(Path(folder), words)
