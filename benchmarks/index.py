"""Measures how fast the index of a large dataset is loaded, compared with parsing the same lines with json alone.

    python benchmarks/index.py [--entries 100000]

`index` is what training does with an unchanged index: it reads and checks the file and creates the entries. `json` only
parses the lines and keeps them in memory, which is the lower limit. Both alternate in one process. The figures are
medians of processor time, which other users of the machine disturb less than wall-clock time. Nothing is decoded.
Writes `results/index.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rin_video.datasets.index import Entry, Index, Probe, entry_of, gc_paused, load_index
from rin_video.datasets.probe import probe_video
from rin_video.datasets.video_info import VideoInfo
from rin_video.files import write_text
from rin_video.media import write_video

OUT = Path(__file__).parent / "results" / "index.json"


def seconds_of(work: Callable[[], Any]) -> tuple[float, float]:
    """Return processor time and wall-clock time of `work`; its result is freed after the measurement."""
    began, processor = time.perf_counter(), time.process_time()
    made = work()
    seconds = time.process_time() - processor, time.perf_counter() - began
    del made
    return seconds


def measure(num: int, rounds: int) -> dict[str, Any]:
    """Measure both sides for an index with `num` entries; return the report."""
    probe = Probe("video")
    with tempfile.TemporaryDirectory() as folder:
        clip, path = Path(folder) / "clip.mp4", Path(folder) / "index.jsonl"
        write_video(torch.rand(3, 96, 64, 64), clip, fps=24)
        info = probe_video(clip)
        entries = [
            Entry(
                Path(f"/data/{i % 7}/clip-{i:06d}.mp4"),
                12345 + i,
                1_700_000_000_000_000_000 + i,
                info,
                hash=f"{i:032x}",
            )
            for i in range(num)
        ]
        Index("/data", entries).save(path, probe)

        def index() -> list[Entry]:
            with gc_paused():
                rows = load_index(path, "/data", probe)
                return [entry_of(entry.source, rows[str(entry.source)], VideoInfo) for entry in entries]

        def parsed() -> list[Any]:
            with gc_paused(), path.open(encoding="ascii") as file:
                return [json.loads(line) for line in file]

        assert index() == entries
        seconds = {"index": [], "json": []}
        for _ in range(rounds):
            seconds["index"].append(seconds_of(index))
            seconds["json"].append(seconds_of(parsed))
    both = {side: [median(column) for column in zip(*found, strict=True)] for side, found in seconds.items()}
    return {
        "entries": num,
        "rounds": rounds,
        **{side: {"processor": round(cpu, 3), "clock": round(wall, 3)} for side, (cpu, wall) in both.items()},
        "ratio": round(both["index"][0] / both["json"][0], 2),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    results = measure(args.entries, args.rounds)
    write_text(OUT, json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
