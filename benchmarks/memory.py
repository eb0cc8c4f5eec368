"""Compares the memory of a training step that `rin-video info` predicts with the measured peak of a process on the CPU.

    python benchmarks/memory.py

Linux only: the peak is VmHWM in /proc minus the memory of the process before the model was built. Each line is measured
in its own process, which first trains a tiny model, so that libraries that are loaded on first use do not count.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

CASES = [
    ("demo", 16),
    ("demo", 64),
    ("image64", 4),
    ("image64", 24),
    ("image64", 24, "train.gradient_checkpointing=true"),
    ("image64", 24, "train.mixed_precision=bf16"),
    ("image64", 24, "model.conv_width=16"),
    ("video64", 1),
    ("video64", 12),
    ("cifar10", 4),
    ("cifar10", 24),
]
OUT = Path(__file__).parent / "results" / "memory.json"


def resident(field: str) -> int:
    """Return the bytes of a field in /proc: VmRSS (current memory) or VmHWM (peak)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(name: str, batch_size: int, overrides: list[str]) -> None:
    """Print the predicted and the measured bytes of a training step as JSON."""
    import gc
    import tempfile

    import torch
    from torch.utils.data import TensorDataset

    from rin_video import RIN, GaussianDiffusion, Trainer, load_config
    from rin_video.training.memory import training_memory

    torch.set_num_threads(1)

    def steps(config, folder: str) -> None:
        config.data.num_workers = 0
        model = RIN(config.model)
        data = TensorDataset(torch.zeros(1, *model.shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
        diffusion = GaussianDiffusion(model, config.diffusion)
        trainer = Trainer(diffusion, data, results_folder=folder, config=config, progress=False)
        batches = trainer.batches()
        for _ in range(2):
            trainer.train_step(batches)

    common = [*overrides, f"train.train_batch_size={batch_size}"]
    config = load_config(name, common)
    predicted = training_memory(config)
    with tempfile.TemporaryDirectory() as folder:
        tiny = ["model.dim=32", "model.dim_latent=32", "model.num_latents=8", "train.train_batch_size=1"]
        steps(load_config(name, [*overrides, *tiny, "model.depth=1", "model.latent_self_attn_depth=1"]), folder)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = resident("VmRSS")
        steps(config, folder)
    print(json.dumps({"predicted": predicted, "measured": resident("VmHWM") - before}))


def main() -> None:
    rows = []
    print("| preset | batch | options | predicted, MB | measured, MB | ratio |\n|---|---|---|---|---|---|")
    for name, batch_size, *overrides in CASES:
        command = [sys.executable, __file__, name, str(batch_size), *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = {"preset": name, "batch": batch_size, "options": overrides, **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        ratio = row["predicted"] / row["measured"]
        print(
            f"| `{name}` | {batch_size} | {' '.join(overrides)} | {row['predicted'] / 1e6:.0f} | "
            f"{row['measured'] / 1e6:.0f} | {ratio:.2f} |",
            flush=True,
        )
    from importlib.metadata import version

    versions = {package: version(package) for package in ("torch", "rin-video")}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"system": platform.platform(), "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    else:
        main()
