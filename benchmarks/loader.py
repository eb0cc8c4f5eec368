"""Measures how fast clips are loaded: our loader compared with the bare decoder in the same number of processes.

    python benchmarks/loader.py [--data clips/]

A clip has 16 frames of 64x64 from a random start in a random file; a batch has four clips. Without `--data`, the script
makes 24 files (96 frames of 180x240, H.264 with the defaults of x264: one keyframe per file).

`loader` is what training uses, from the index to batches in the training process. `bare` is the decoder's library alone
in the same number of processes. Each process gets the files and frames of the batches of one worker of the loader and
keeps the same number of recently used files open. With PyAV it seeks to the keyframe before the clip, decodes to its
end and scales in FFmpeg. With decord it calls `get_batch` and seeks back, with torchcodec `get_frames_at`, and both
resize with torchvision. It then crops the centre and stacks the batch. It draws nothing, checks nothing and does not
transfer the batch to another process.

Both sides alternate for `--rounds` rounds with different batches. The figures are medians, and the ratios are medians
over the pairs: of clips per second, and of clips per second of processor time of all processes, which other users of
the machine disturb less. A side fails after `--limit` seconds for a file (loader) or a batch (bare). Writes
`results/loader.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from statistics import median
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import psutil
import torch
from torchvision.transforms.v2 import functional as transforms

from rin_video.config import DataConfig
from rin_video.datasets import ClipFolder
from rin_video.datasets.backends import torchcodec_problem
from rin_video.datasets.decoding import OPEN_FILES
from rin_video.datasets.epochs import EpochSampler
from rin_video.datasets.loading import TrainLoader
from rin_video.errors import UsageError
from rin_video.files import write_text
from rin_video.media import write_video

RESULTS = Path(__file__).parent / "results"
FRAMES, SIZE, BATCH = 16, 64, 4
WARM = 2  # warm-up batches of each process, which are not timed
NUM_FILES, LENGTH, HEIGHT, WIDTH = 24, 96, 180, 240
Work = tuple[str, list[int], tuple[int, int]]  # file, frames, size to which the uncropped frames are scaled


class StalledError(Exception):
    """A side did not finish."""


# ---- the bare decoders: `open_*` opens a file, `read_*` returns frames (F, 3, H, W), scaled already or not


def open_pyav(path: str) -> Any:
    import av

    container = av.open(path)
    container.streams.video[0].codec_context.thread_count = 1
    return container


def read_pyav(container: Any, indices: list[int], size: tuple[int, int]) -> torch.Tensor:
    stream = container.streams.video[0]
    rate = stream.average_rate
    container.seek(int(indices[0] / rate / stream.time_base), stream=stream)
    found = []
    for frame in container.decode(stream):
        if round(frame.pts * stream.time_base * rate) >= indices[0]:
            found.append(frame.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation="BILINEAR"))
            if len(found) == len(indices):
                break
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def open_decord(path: str) -> Any:
    import decord

    return decord.VideoReader(path, num_threads=1)


def read_decord(reader: Any, indices: list[int], size: tuple[int, int]) -> torch.Tensor:
    frames = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
    reader.seek(0)  # otherwise it decodes the rest of every open file into memory, which is fast but takes gigabytes
    return frames


def open_torchcodec(path: str) -> Any:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path)


def read_torchcodec(decoder: Any, indices: list[int], size: tuple[int, int]) -> torch.Tensor:
    return decoder.get_frames_at(indices).data


BARE = {
    "pyav": (open_pyav, read_pyav),
    "decord": (open_decord, read_decord),
    "torchcodec": (open_torchcodec, read_torchcodec),
}


def bare_worker(decoder: str, batches: list[list[Work]], barrier: Any, results: Any, limit: float) -> None:
    """Read batches with the bare decoder; put (end time, processor time) into `results`."""
    torch.set_num_threads(1)
    open_file, read_frames = BARE[decoder]
    files: OrderedDict[str, Any] = OrderedDict()
    for done, batch in enumerate(batches):
        if done == WARM:
            barrier.wait(limit)
            start = time.process_time()
        clips = []
        for path, indices, size in batch:
            if path not in files:
                if len(files) == OPEN_FILES:
                    files.popitem(last=False)
                files[path] = open_file(path)
            files.move_to_end(path)
            frames = read_frames(files[path], indices, size)
            if tuple(frames.shape[-2:]) != size:
                frames = transforms.resize(frames, list(size), antialias=True)
            top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
            clips.append(frames[..., top : top + SIZE, left : left + SIZE].transpose(0, 1))
        torch.stack(clips)
    results.put((time.perf_counter(), time.process_time() - start))


def bare(decoder: str, work: list[list[Work]], processes: int, limit: float) -> tuple[float, float]:
    """Return clips per second, and clips per second of processor time, of the bare decoder."""
    context = get_context()
    barrier, results = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=bare_worker, args=(decoder, work[i::processes], barrier, results, limit), daemon=True)
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        barrier.wait(limit)
        start = time.perf_counter()
        ends, busy = zip(*[results.get(timeout=limit * len(work)) for _ in workers], strict=True)
    except (BrokenBarrierError, Empty):
        raise StalledError(f"bare: nothing for {limit:g} s") from None
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    clips = BATCH * (len(work) - WARM * processes)
    return clips / (max(ends) - start), clips / sum(busy)


def loader(data: ClipFolder, first: int, num: int, workers: int, limit: float) -> tuple[float, float]:
    """Return clips per second, and clips per second of processor time, of the loader for `num` batches from `first`."""
    options = DataConfig(num_workers=workers, read_timeout=limit, max_failures=0)
    batches = TrainLoader(data, options, BATCH, seed=0, first_batch=first)
    try:
        for _ in range(WARM * workers):
            next(batches)
        start, busy = time.perf_counter(), busy_seconds()
        for _ in range(num - WARM * workers):
            next(batches)
        clips = BATCH * (num - WARM * workers)
        return clips / (time.perf_counter() - start), clips / (busy_seconds() - busy)
    except UsageError as error:
        raise StalledError(f"loader: {error}") from error
    finally:
        batches.close()


def busy_seconds() -> float:
    """Return the processor time of this process and its children so far."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children())]
    return sum(one.user + one.system for one in times)


def list_work(data: ClipFolder, first: int, num: int) -> list[list[Work]]:
    """Return the contents of the loader's batches, as work for the bare decoder."""
    batches = iter(EpochSampler(len(data), BATCH, seed=0, first_batch=first))
    rng = np.random.default_rng(0)  # not used, because the crop is centred
    return [
        [
            (str(data.files[i]), data.frames_of(i, epoch), data.resize_crop.draw_params(data.infos[i].size, rng).size)
            for epoch, i in next(batches)
        ]
        for _ in range(num)
    ]


def measure(data: ClipFolder, decoder: str, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides; return a row of the table."""
    pairs = []
    for turn in range(options.rounds):
        first = turn * options.batches
        sides = [
            partial(bare, decoder, list_work(data, first, options.batches), workers, options.limit),
            partial(loader, data, first, options.batches, workers, options.limit),
        ]
        try:
            order = (0, 1) if turn % 2 == 0 else (1, 0)  # the second side finds the files in the page cache
            speeds = {side: sides[side]() for side in order}
        except StalledError as error:
            return {"decoder": decoder, "workers": workers, "failed": str(error)}
        pairs.append((*speeds[0], *speeds[1]))
    columns = zip(*[(a, c, c / a, d / b) for a, b, c, d in pairs], strict=True)
    plain, ours, ratio, busy_ratio = (median(values) for values in columns)
    return {
        "decoder": decoder,
        "workers": workers,
        "bare": round(plain, 1),
        "loader": round(ours, 1),
        "ratio": round(ratio, 3),
        "processor_time_ratio": round(busy_ratio, 3),
        "rounds": [[round(value, 2) for value in pair] for pair in pairs],
    }


def write_clips(folder: Path, num: int = NUM_FILES) -> None:
    """Write clips of drifting coarse and fine textures."""
    rng = np.random.default_rng(0)
    for i in range(num):
        layers = [
            np.kron(rng.integers(0, 256, (-(-2 * HEIGHT // n), -(-2 * WIDTH // n), 3)), np.ones((n, n, 1)))
            for n in (16, 5)
        ]
        speeds = rng.integers(-2, 3, (2, 2))
        frames = []
        for f in range(LENGTH):
            drifted = [
                np.roll(layer, tuple(f * speed), (0, 1))[:HEIGHT, :WIDTH]
                for layer, speed in zip(layers, speeds, strict=True)
            ]
            frames.append(0.7 * drifted[0] + 0.3 * drifted[1])
        clip = torch.from_numpy(np.stack(frames).clip(0, 255).astype(np.uint8)).permute(3, 0, 1, 2)
        write_video(clip, folder / f"{i:02d}.mp4", 24, crf=28)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "av", "decord", "torchcodec"):
        with suppress(ModuleNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of clips (default: generated clips)")
    parser.add_argument("--batches", type=int, default=24, help="batches per figure, including warm-up batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120, help="time limit in seconds for a batch")
    parser.add_argument("--decoders", nargs="+", default=["pyav", "decord", "torchcodec"])
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        if not options.data:
            write_clips(Path(made))
        for decoder in options.decoders:
            if decoder == "torchcodec" and (problem := torchcodec_problem()):
                print(f"torchcodec is skipped: {problem}")
                continue
            index = Path(made, "index.jsonl")
            data = ClipFolder(options.data or made, SIZE, FRAMES, decoder=decoder, index=index)
            for workers in (1, 2):
                row = measure(data, decoder, workers, options)
                rows.append(row)
                speeds = [row[name] for name in ("bare", "loader") if name in row]
                ratios = [f"{row[name]:.0%}" for name in ("ratio", "processor_time_ratio") if name in row]
                figures = row.get("failed") or " | ".join(map(str, speeds + ratios))
                print(f"| {decoder} | {workers} | {figures} |", flush=True)
                write_report(options, data, rows)


def write_report(options: argparse.Namespace, data: ClipFolder, rows: list[dict[str, Any]]) -> None:
    """Write the rows measured so far as JSON."""
    sizes = ", ".join(sorted({"x".join(map(str, info.size)) for info in data.infos}))
    report = {
        "clips": f"{len(data.files)} files of {sizes}, {FRAMES} frames to {SIZE}x{SIZE}",
        "made": not options.data,
        "batches": options.batches,
        "rounds": options.rounds,
        "versions": versions(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
