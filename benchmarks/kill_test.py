"""Kills a training repeatedly, restarts it with the same command, and compares it with an uninterrupted training.

    python benchmarks/kill_test.py --kills 50

The training is `rin-video train` on a few generated clips. Its writes to the disk are slowed down so that kills hit
them: two of five SIGKILLs wait until a checkpoint is being written. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TIMED = ("samples_per_second", "data_wait")
STEPS, SAVE_EVERY = 160, 4


def run_slowly(argv: list[str]) -> int:
    """Run `rin-video ...` with slow syncs to the disk."""
    from rin_video import cli

    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.03)
        fsync(handle)

    os.fsync = slow
    return cli.main(argv)


def command(clips: Path, out: Path) -> list[str]:
    """Return the arguments of the training."""
    return ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--batch-size", "4", "--out", str(out),
            "--steps", str(STEPS), "model.dim=32", "model.dim_latent=32", "model.num_latents=8", "model.depth=1",
            "model.num_heads=2", "model.latent_num_heads=2", "model.latent_self_attn_depth=1", "model.dropout=0.1",
            "data.num_workers=1", "data.crop=random", "sample.steps=2", "sample.num_samples=2", "train.log_every=3",
            f"train.save_and_sample_every={SAVE_EVERY}", "train.gradient_accumulate_every=2", "train.warmup_steps=10",
            "train.ema_snapshot_every=10"]  # fmt: skip


def start(argv: list[str]) -> subprocess.Popen[bytes]:
    """Start the training in a process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, "--run", *argv], stderr=subprocess.DEVNULL, env=environment)


def position(out: Path) -> str:
    """Return what the training is doing, judged by the files on the disk."""
    if list(out.glob("checkpoints/*.tmp")):
        return "while a checkpoint was written"
    if list(out.glob(".*.tmp*")) or list(out.glob("*/.*.tmp*")):
        return "while another file was written"
    if not list(out.glob("checkpoints/step-*")):
        return "before the first checkpoint"
    return "in between"


def names(folder: Path) -> list[str]:
    """Return the sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def compare(one: Path, other: Path) -> dict[str, bool]:
    """Compare all results of two runs except timings; return for each kind whether it is equal."""
    import torch
    from safetensors.torch import load_file

    from rin_video.training.state import newest_state

    def equal(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
        return a == b

    def files(pattern: str) -> bool:
        # Hidden files are incomplete files that a kill left behind.
        found = [
            sorted(path.relative_to(run) for path in run.glob(pattern) if not path.name.startswith("."))
            for run in (one, other)
        ]
        if found[0] != found[1]:
            print("only in one of the two:", *sorted(set(found[0]) ^ set(found[1])))
            return False
        different = [
            name
            for name in found[0]
            if not (
                equal(load_file(one / name), load_file(other / name))
                if name.suffix == ".safetensors"
                else (one / name).read_bytes() == (other / name).read_bytes()
            )
        ]
        print(f"{pattern}: {len(found[0])} files,", *(f"{name} differs" for name in different), flush=True)
        return bool(found[0]) and not different

    def metrics(run: Path) -> list[dict[str, object]]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]

    first, second = newest_state(one)[1], newest_state(other)[1]
    same = {name: equal(first[name], second[name]) for name in first if name != "config"}
    return same | {
        "metrics.jsonl": metrics(one) == metrics(other),
        "model.safetensors": files("model.safetensors"),
        "averages": files("averages/*"),
        "samples": files("samples/*"),
        "checkpoints kept": names(one / "checkpoints") == names(other / "checkpoints"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_test.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rng = random.Random(options.seed)
    from rin_video.datasets.demo import write_demo_set

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clips = folder / "clips"
        for extra in sorted(write_demo_set(clips))[20:]:
            extra.unlink()
        uninterrupted, killed = folder / "whole", folder / "killed"
        assert start(command(clips, uninterrupted)).wait() == 0
        kills: Counter[str] = Counter()
        lives, compared = 0, []
        while not compared or killed.exists() or sum(kills.values()) < options.kills:
            process = start(command(clips, killed))
            lives += 1
            if sum(kills.values()) < options.kills:
                where = kill_somewhere(process, killed, rng)
                if where is not None:
                    kills[where] += 1
                    print(
                        f"kill {sum(kills.values())}: {where}, {len(list(killed.glob('samples/*.mp4')))} samples",
                        flush=True,
                    )
            if process.wait() == 0:  # this run has finished, despite the kills
                compared.append(compare(uninterrupted, killed))
                shutil.rmtree(killed)
        result = {
            "kills": dict(kills),
            "lives": lives,
            "steps": STEPS,
            "runs compared": len(compared),
            "equal": compared,
        }
        print(json.dumps(result, indent=1))
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        if not all(all(same.values()) for same in compared):
            sys.exit(1)


def kill_somewhere(process: subprocess.Popen[bytes], out: Path, rng: random.Random) -> str | None:
    """Send SIGKILL at a random moment after the first new checkpoint of this process.

    Returns what the training was doing, or None if the process ended before.
    """
    seen = set(out.glob("checkpoints/*"))
    in_write = rng.random() < 0.4
    while process.poll() is None and seen == set(out.glob("checkpoints/*")):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5 if in_write else 1.5))
    while in_write and process.poll() is None and not list(out.glob("checkpoints/*.tmp")):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15) if in_write else 0)
    if process.poll() is not None:
        return None
    os.kill(process.pid, signal.SIGSTOP)  # so that the position does not change before the kill
    where = position(out)
    process.kill()
    return where


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(run_slowly(sys.argv[2:]))
    main()
