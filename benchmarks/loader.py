"""How fast clips are loaded: our loader against the bare decoder in as many processes.

    python benchmarks/loader.py --data clips/

A clip is 16 frames from a random start of a random file, at 64x64. `bare` is a loop over the same draws that opens each
file with the library, reads the frames and resizes them, and does nothing else; `loader` is what training uses. Both
run in 1 and 2 worker processes, in turn, several rounds; the figures are medians. Writes `results/loader.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch

from rin_video.config import DataConfig
from rin_video.datasets import ClipFolder
from rin_video.datasets.backends import torchcodec_problem
from rin_video.datasets.demo import write_demo_set
from rin_video.datasets.loading import Batches
from rin_video.files import write_text

RESULTS = Path(__file__).parent / "results"
FRAMES, SIZE, BATCH = 16, 64, 4


def bare_read(decoder: str, path: str, indices: list[int]) -> torch.Tensor:
    """Frames (F, 3, H, W) by the library alone; decoding begins at the nearest keyframe."""
    if decoder == "torchcodec":
        from torchcodec.decoders import VideoDecoder

        return VideoDecoder(path).get_frames_at(indices).data
    if decoder == "decord":
        import decord

        reader = decord.VideoReader(path, num_threads=1)
        return torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(indices[0] / stream.average_rate / stream.time_base), stream=stream)
        found = []
        for frame in container.decode(stream):
            if round(frame.pts * stream.time_base * stream.average_rate) >= indices[0]:
                found.append(frame.to_ndarray(format="rgb24"))
                if len(found) == len(indices):
                    break
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def bare_worker(decoder: str, work: list[tuple[str, list[int]]], barrier, results) -> None:
    from torchvision.transforms.v2 import functional as transforms

    torch.set_num_threads(1)
    bare_read(decoder, *work[0])
    barrier.wait()
    for path, indices in work:
        frames = bare_read(decoder, path, indices)
        scale = SIZE / min(frames.shape[-2:])
        frames = transforms.resize(frames, [round(side * scale) for side in frames.shape[-2:]], antialias=True)
        top, left = (frames.shape[-2] - SIZE) // 2, (frames.shape[-1] - SIZE) // 2
        frames[..., top : top + SIZE, left : left + SIZE].contiguous()
    results.put(time.perf_counter())


def bare(decoder: str, data: ClipFolder, draws: list[tuple[int, int]], processes: int) -> float:
    """Clips a second."""
    work = [(str(data.files[index]), data.frames_of(index, epoch)) for epoch, index in draws]
    context = get_context()
    barrier, results = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=bare_worker, args=(decoder, work[i::processes], barrier, results))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    end = max(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return len(work) / (end - start)


def loader(data: ClipFolder, num: int, workers: int) -> float:
    """Clips a second through `Batches`, from the first batch that comes out of busy workers on."""
    batches = Batches(data, DataConfig(num_workers=workers), BATCH, seed=0)
    warm = 2 * workers + 1  # what the workers had ready before the clock began
    for _ in range(warm):
        next(batches)
    start = time.perf_counter()
    for _ in range(num // BATCH):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return num // BATCH * BATCH / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of clips (default: the demo set)")
    parser.add_argument("--num", type=int, default=96, help="clips for each figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    options = parser.parse_args()
    if not options.data:
        options.data = Path("runs/demo/data")
        write_demo_set(options.data)
    names = ["pyav", "decord"] + ([] if torchcodec_problem() else ["torchcodec"])
    rows = []
    for decoder in names:
        data = ClipFolder(options.data, SIZE, FRAMES, decoder=decoder)
        rng = np.random.default_rng(0)
        draws = [(int(rng.integers(1000)), int(rng.integers(len(data)))) for _ in range(options.num)]
        for workers in (1, 2):
            pairs = [
                (bare(decoder, data, draws, workers), loader(data, options.num, workers)) for _ in range(options.rounds)
            ]
            plain, ours = (median(column) for column in zip(*pairs, strict=True))
            rows.append({"decoder": decoder, "workers": workers, "bare": round(plain, 1), "loader": round(ours, 1)})
            rows[-1]["ratio"] = round(ours / plain, 3)
            print(f"| {decoder} | {workers} | {plain:.1f} | {ours:.1f} | {ours / plain:.0%} |", flush=True)
    report = {
        "clips": f"{len(data.files)} files, {FRAMES} frames to {SIZE}x{SIZE}",
        "num": options.num,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
