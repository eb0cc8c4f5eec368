"""Measures how fast all presets train, sample and load on a GPU, and trains on clips of games; in short calls.

    python benchmarks/gpu.py --data runs/atari                     # all of it; repeat the command until nothing is left
    python benchmarks/gpu.py --modes train --presets kinetics600_predict --variants bf16 compile
    python benchmarks/gpu.py --data runs/atari --modes clips --time 8m
    python benchmarks/gpu.py --table                               # the results so far, as Markdown
    python benchmarks/gpu.py --device cpu --tiny --presets demo    # a trial of the script

A call takes `--minutes` at most. Each job is a process of its own, and its result one entry of the JSON file, which is
written after each job. A job that is expected to take longer than what is left of the call waits for the next one; a
job whose result is there is skipped, unless the preset has changed. A job that fails, runs out of memory, or does not
end within a complete call is recorded with its error, and `--retry` runs it again.

- train: seconds of a training step on random data (gradient, clipping, optimizer and averages), in float32, TF32 and
  bf16 and in bf16 with `torch.compile`. The share is that of the FLOP/s of a large matrix product in the same
  precision, measured by the same process. A batch that does not fit is halved; `--largest` adds the largest one.
- sample: seconds of a network call of the preset's sampler, and the difference of the samples to float32.
- loader: frames per second that the loader of training delivers from generated files, beside what the model needs.
- clips: a training for `--time` on clips of games, in parts of a call, which resume from a checkpoint; then its scores
  with five frames given, and a sheet. `video_learning.py --make-data FOLDER` writes the clips.

It needs no package but those that rin-video itself needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import psutil
import torch
from gpu_jobs import VARIANTS, Job, Row, default_features, run_here, with_digest
from video_learning import GIVEN, look_up, mean_of, shown

from rin_video.config_checks import read_duration
from rin_video.config_files import presets
from rin_video.errors import UsageError, first_line
from rin_video.files import write_text
from rin_video.training.provenance import device_name

HERE = Path(__file__).parent
MODES = ("train", "sample", "loader", "clips")
FIRST = "kinetics600_predict"  # the preset that is measured first
EXPECTED = {"train": 60.0, "sample": 60.0, "loader": 60.0, "clips": 120.0, "scores": 150.0}  # seconds of a job
COMPILING = 200.0  # the same with torch.compile
LONGER = 1.5  # a job may take longer than others of its kind by this factor


# ---- jobs and their results


def make_jobs(options: Namespace) -> list[Job]:
    """Return the jobs of a command in their order. Raises `UsageError` for an unknown preset."""
    jobs: list[Job] = []
    for preset in options.presets:
        for variant in options.variants:
            batches = ["preset", "largest"] if options.largest else ["preset"]
            if "train" in options.modes:
                jobs += [Job("train", preset, variant, batch, options.tiny) for batch in batches]
            if "sample" in options.modes:
                jobs.append(Job("sample", preset, variant, tiny=options.tiny))
        if "loader" in options.modes:
            jobs.append(Job("loader", preset, tiny=options.tiny))
    if "clips" in options.modes and options.data is not None:
        common = {"tiny": options.tiny, "time": options.time, "options": tuple(options.set)}
        jobs.append(Job("clips", options.preset, **common))
        judging = {"num": options.num, "steps": options.steps, "features": options.features}
        jobs.append(Job("scores", options.preset, **common, **judging))
    return [with_digest(job) for job in jobs]


def job_of(row: Row) -> Job:
    """Return the job of a result."""
    return Job(**row["job"] | {"options": tuple(row["job"]["options"])})


def result_of(job: Job, rows: Iterable[Row]) -> Row | None:
    """Return the result of a job, of the same configuration, among those of one device."""
    return next((row for row in rows if job_of(row) == job), None)


def is_ended(job: Job, rows: Iterable[Row], *, retry: Iterable[Job] = ()) -> bool:
    """Return whether a job is done or has failed; one that is in `retry` has to be done."""
    row = result_of(job, rows)
    return row is not None and (row["state"] == "done" or (row["state"] == "failed" and job not in retry))


def can_start(job: Job, rows: Sequence[Row]) -> bool:
    """Return whether what a job needs is there: scores need a trained model."""
    if job.mode != "scores":
        return True
    training = result_of(dataclasses.replace(job, mode="clips", num=0, steps=0, features=""), rows)
    return training is not None and training["state"] == "done"


def expected(job: Job, rows: Sequence[Row]) -> float:
    """Return the seconds that a job is expected to take.

    It is the longest time of jobs of its kind so far and a half, or a guess. A job that was cut off is expected to take
    twice the time that it had.
    """
    compiled = job.variant == "compile"
    times = [
        row["wall_seconds"]
        for row in rows
        if row["state"] == "done"
        and row["job"]["mode"] == job.mode
        and (row["job"]["variant"] == "compile") == compiled
        and "wall_seconds" in row
    ]
    seconds = COMPILING if compiled else EXPECTED[job.mode]
    if times and job.mode != "clips":  # a part of a training takes the time that there is
        seconds = LONGER * max(times)
    row = result_of(job, rows) or {}
    return max(seconds, 2 * row.get("cut_off_seconds", 0.0))


def run_call(
    jobs: Sequence[Job],
    rows: list[Row],
    execute: Callable[[Job, float], Row],
    save: Callable[[list[Row]], None],
    minutes: float,
    clock: Callable[[], float],
    *,
    retry: bool = False,
) -> list[Job]:
    """Run the jobs that are expected to end within `minutes`; return those that are left.

    The first job of a call starts in any case: no other call has more time for it, so if it is cut off, it has failed.
    `clock` returns the seconds since the start of the call. `rows` are the results of this device. `execute` returns
    the row of a job that has some seconds, with its state: "done", "failed", or "open" if it has to continue. `save` is
    called after each job.
    """
    failed = [job_of(row) for row in rows if row["state"] == "failed"] if retry else []
    is_first = True
    for job in jobs:
        left = 60 * minutes - clock()
        fits = left > 0 and (is_first or expected(job, rows) <= left)
        if is_ended(job, rows, retry=failed) or not can_start(job, rows) or not fits:
            continue
        row = execute(job, left)
        if is_first and "cut_off_seconds" in row:
            row |= {"state": "failed", "error": f"did not end within a call of {minutes:g} minutes"}
        is_first = False
        rows[:] = [*(other for other in rows if job_of(other).key != job.key), row]
        failed = [other for other in failed if other != job]
        save(rows)
        print(describe(row), flush=True)
    return [job for job in jobs if not is_ended(job, rows, retry=failed)]


# ---- one job in its own process


def execute(job: Job, seconds: float, options: Namespace) -> Row:
    """Run a job in a process of its own, for `seconds` at most, and return its row."""
    place = options.work / "row.json"
    place.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(job)), "--seconds", f"{seconds:.1f}"]
    command += ["--device", options.device, "--work", str(options.work), "--out", str(options.out)]
    command += ["--data", str(options.data)] if options.data else []
    environment = dict(os.environ)
    if options.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"  # the trainer takes the GPU otherwise
    if job.variant == "compile":
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # the first step contains all of the compilation
    start = time.monotonic()
    row: Row = {"job": dataclasses.asdict(job)}
    try:
        code = subprocess.run(command, env=environment, timeout=seconds).returncode
        if place.exists():
            row |= {"state": "done"} | json.loads(place.read_text(encoding="utf-8"))
        else:
            row |= {"state": "failed", "error": f"its process ended with code {code}: see the messages above"}
    except subprocess.TimeoutExpired:
        row |= {"state": "open", "cut_off_seconds": round(seconds, 1)}
    return row | about_machine(options.device) | {"wall_seconds": round(time.monotonic() - start, 1)}


def about_machine(device: str) -> Row:
    """Return the device of a result, and versions."""
    return {
        "device": name_of(device),
        "cores": os.cpu_count(),
        "versions": {"rin-video": version("rin-video"), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def name_of(device: str) -> str:
    """Return the name under which results of a device are kept; the number of threads of a CPU is no part of it."""
    return "CPU" if device == "cpu" else device_name(torch.device(device))


def child(options: Namespace) -> None:
    """Run one job in this process; leave its row, or its error, in the folder of work."""
    options.seconds -= time.time() - psutil.Process().create_time()  # the imports have taken some
    try:
        row = run_here(job_of({"job": json.loads(options.job)}), options)
    except Exception as error:
        if not isinstance(error, UsageError | torch.OutOfMemoryError):
            sys.excepthook(type(error), error, error.__traceback__)
        row = {"state": "failed", "error": f"{type(error).__name__}: {first_line(error)}"}
    write_text(options.work / "row.json", json.dumps(row))


# ---- report


def describe(row: Row) -> str:
    """Return one line about a result."""
    text = f"{job_of(row).title}, {row['wall_seconds']:.0f} s: "
    if row["state"] == "failed":
        return f"{text}failed: {row['error']}"
    if "cut_off_seconds" in row:
        return f"{text}cut off, it gets more time in the next call"
    mode = row["job"]["mode"]
    if mode == "train":
        compiled = f", the first one {row['first_step_seconds']:.3g} s" if row["job"]["variant"] == "compile" else ""
        return (
            f"{text}{row['step_seconds']:.4g} s a step of {row['batch']} x {row['accumulate']}{compiled}, "
            f"{row['samples_per_second']:.3g} samples/s, {row['share']:.1%} of the peak"
        )
    if mode == "sample":
        return f"{text}{row['seconds_per_call']:.4g} s a call of {row['batch']}, {row['share']:.1%} of the peak"
    if mode == "loader":
        return f"{text}{row['frames_per_second']:.4g} frames/s with {row['workers']} workers"
    if mode == "clips":
        return f"{text}{row['trained_steps']} steps in {row['trained_seconds']:.0f} s, {row['state']}"
    recall = look_up(row, ("given", "mean", "prediction/moving_recall", "value"))
    return f"{text}recall of what moves {'unknown' if recall is None else shown(recall)}"


def table(rows: Sequence[Row]) -> str:
    """Return all results as Markdown, for each device."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        versions = sorted({row["versions"]["torch"] for row in own})
        parts.append(f"**{device}**, torch {', '.join(versions)}")
        done = {
            mode: [row for row in own if row["job"]["mode"] == mode and row["state"] == "done"] for mode in EXPECTED
        }
        parts += [
            make(found, own)
            for mode, make in (("train", train_table), ("sample", sample_table), ("loader", loader_table))
            if (found := done[mode])
        ]
        parts += [clips_table(row, own) for row in done["scores"]]
        if failed := [row for row in own if row["state"] == "failed"]:
            parts.append("\n".join(["Failed:", "", *(f"- {job_of(row).title}: {row['error']}" for row in failed)]))
    return "\n\n".join(parts)


def markdown(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def named(row: Row) -> str:
    """Return the preset of a result, for the first column."""
    return f"`{row['job']['preset']}`{' (tiny)' * row['job']['tiny']}"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return results by preset, as they came, and by variant."""
    rows = list(rows)
    places = list(dict.fromkeys(row["job"]["preset"] for row in rows))
    return sorted(
        rows, key=lambda row: (places.index(row["job"]["preset"]), list(VARIANTS).index(row["job"]["variant"]))
    )


def number(value: float | None, places: str = ".3g") -> str:
    """Format a number; nothing for None."""
    return "" if value is None else format(value, places)


def train_table(rows: Sequence[Row], own: Sequence[Row]) -> str:
    """Return the table of training steps. Shares in brackets are those without optimizer and averages."""
    head = "training, preset | M params | GFLOPs per sample | precision | batch | first step, s | step, s | samples/s"
    head += " | TFLOP/s | share of the peak | GB"
    lines = [
        (
            named(row),
            f"{row['params'] / 1e6:.1f}",
            number(row["gflops_per_sample"]),
            row["job"]["variant"],
            f"{row['batch']}{' x {}'.format(row['accumulate']) * (row['accumulate'] > 1)}",
            number(row["first_step_seconds"]),
            number(row["step_seconds"]),
            number(row["samples_per_second"]),
            number(row["tflops_per_second"]),
            f"{row['share']:.0%} ({row['share_without_update']:.0%})",
            number(row["memory_gb"]),
        )
        for row in in_order(rows)
    ]
    return markdown(head.split(" | "), lines)


def sample_table(rows: Sequence[Row], own: Sequence[Row]) -> str:
    """Return the table of network calls in sampling, in seconds; differences to float32 are in brackets."""
    variants = [variant for variant in VARIANTS if any(row["job"]["variant"] == variant for row in rows)]
    lines = []
    for preset in dict.fromkeys(row["job"]["preset"] for row in rows):
        found = {row["job"]["variant"]: row for row in rows if row["job"]["preset"] == preset}
        first = next(iter(found.values()))
        cells = []
        for variant in variants:
            row = found.get(variant)
            text = "" if row is None else number(row["seconds_per_call"])
            cells.append(text + (f" ({row['rms_to_fp32']:.1g})" if row and row["rms_to_fp32"] else ""))
        lines.append((named(first), first["batch"], first.get("sampler", ""), *cells))
    return markdown(["sampling, preset", "batch", "sampler", *variants], lines)


def loader_table(rows: Sequence[Row], own: Sequence[Row]) -> str:
    """Return the table of loading, beside what the fastest training step of the preset needs."""
    lines = []
    for row in rows:
        rates = [
            other["samples_per_second"]
            for other in own
            if other["job"]["mode"] == "train"
            and other["job"]["preset"] == row["job"]["preset"]
            and other["state"] == "done"
        ]
        needed = max(rates) * row["frames"] if rates else None
        cells = number(row["frames_per_second"], ".4g"), number(needed, ".4g")
        lines.append((named(row), row["workers"], row.get("cores", ""), *cells))
    head = "loading, preset | workers | cores | frames/s | the fastest training needs"
    return markdown(head.split(" | "), lines)


SCORES = {  # title -> name of a score of predictions
    "recall": "prediction/moving_recall",
    "of copying": "prediction/copy_moving_recall",
    "precision": "prediction/moving_precision",
    "error / copy": "prediction/squared_error_over_copy",
    "Fréchet": "clip/frechet_distance",
}


def clips_table(row: Row, own: Sequence[Row]) -> str:
    """Return the scores of a training on clips of games, by game, and how it was trained."""
    job = job_of(row)
    training = result_of(dataclasses.replace(job, mode="clips", num=0, steps=0, features=""), own)
    how = f"{named(row)} on clips of games for {job.time}"
    if training is not None:
        how += (
            f": {training['params'] / 1e6:.1f} M parameters in {training['precision']}, {training['trained_steps']:,} "
            f"steps of {training['batch']}, {training['samples_per_second']:.3g} samples/s, of which "
            f"{training['data_wait']:.0%} of the time waiting for data"
        )
    games = {game: scores for game, scores in row["given"].items() if game != "mean"}
    games["mean"] = row["given"].get("mean") or mean_of(list(games.values()))
    lines = [
        (game, *(number(look_up(scores, (name, "value"))) for name in SCORES.values()))
        for game, scores in games.items()
    ]
    judged = (
        f"Predictions with {GIVEN} frames given, {job.num} of each game, {job.steps} steps, features {job.features}:"
    )
    return f"{how}. {judged}\n\n" + markdown(["game", *SCORES], lines)


# ---- command line


def read_rows(path: Path) -> list[Row]:
    """Return the results so far, of all devices."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(rows, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="longest duration of this call")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--presets", nargs="+", choices=presets(), metavar="NAME", help="by default all")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--largest",
        action="store_true",
        help="also train with the largest batch: a power of two times that of the preset",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of train/GAME/*.mp4 and test/GAME/*.mp4")
    parser.add_argument("--preset", default="clips64", help="of the training on clips")
    parser.add_argument("--time", default="8m", help="length of the training on clips, over all calls")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the training on clips")
    parser.add_argument("--num", type=int, help="predictions of each game that are scored (default: 12)")
    parser.add_argument("--steps", type=int, help="sampling steps of the predictions (default: 20)")
    parser.add_argument("--features", help="extractor of the features for distances (default: lite if it is installed)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, to try the script on a CPU")
    parser.add_argument("--retry", action="store_true", help="run failed jobs again")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder for checkpoints and samples")
    parser.add_argument("--out", type=Path, help="file of the results (default: results/gpu.json, if --tiny in --work)")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, and stop")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # for child processes
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out or (options.work / "gpu.json" if options.tiny else HERE / "results" / "gpu.json")
    options.sheet = options.out.with_name(f"{options.out.stem}_clips.png")
    if options.job:
        child(options)
        return
    if options.table:
        print(table(read_rows(options.out)))
        return
    try:
        jobs = make_jobs(complete(parser, options))
    except UsageError as error:
        parser.error(str(error))
    begun = psutil.Process().create_time()  # importing torch is part of the call
    rows = read_rows(options.out)
    name = name_of(options.device)
    own, others = [row for row in rows if row["device"] == name], [row for row in rows if row["device"] != name]
    options.work.mkdir(parents=True, exist_ok=True)
    left = run_call(
        jobs,
        own,
        lambda job, seconds: execute(job, seconds, options),
        lambda found: write_rows(options.out, [*others, *found]),
        options.minutes,
        clock=lambda: time.time() - begun,
        retry=options.retry,
    )
    print(f"{len(jobs) - len(left)} of {len(jobs)} jobs have a result in {options.out}")
    if left:
        print(f"the same command continues with {', '.join(job.title for job in left)}")


def complete(parser: argparse.ArgumentParser, options: Namespace) -> Namespace:
    """Return the options with their defaults. Ends with a message if the jobs of a call cannot run."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.device == "cpu" and not options.tiny:
        parser.error("there is no GPU: --device cpu --tiny tries the script with tiny models")
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}: it must be above 0")
    read_duration("--time", options.time)
    options.presets = options.presets or sorted(presets(), key=lambda name: name != FIRST)
    options.num = options.num or (6 if options.tiny else 12)
    options.steps = options.steps or (2 if options.tiny else 20)
    options.features = options.features or default_features()
    if options.num < 6:
        parser.error(f"--num is {options.num}: scores need 6 samples at least")
    if "clips" in options.modes and options.data is None:
        print("without --data, there is no training on clips of games: video_learning.py --make-data FOLDER makes them")
    elif "clips" in options.modes:
        for split in ("train", "test"):
            if not any((options.data / split).glob("*/*.mp4")):
                parser.error(f"{options.data / split} has no clips: GAME/*.mp4 are needed, see video_learning.py")
    return options


if __name__ == "__main__":
    main()
