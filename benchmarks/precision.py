"""Measures the time of a network call in sampling on a GPU for each precision, and the difference to float32 samples.

    python benchmarks/precision.py

It uses presets with untrained weights, 20 steps and the median of three runs. The difference is the root mean square
over samples in [0, 1]. Writes `results/precision.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from rin_video import RIN, GaussianDiffusion
from rin_video.config import PrecisionName
from rin_video.config_files import load_config
from rin_video.files import write_text

CASES = (("video64", 8), ("kinetics600_predict", 8), ("image64", 16))
PRECISIONS: tuple[PrecisionName, ...] = ("no", "tf32", "bf16")
STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precision.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this requires a CUDA GPU: on a CPU sampling runs in float32")
    rows = []
    for preset, batch in CASES:
        config = load_config(preset)
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(RIN(config.model), config.diffusion).cuda()
        reference = None
        for precision in PRECISIONS:
            diffusion.sample(batch_size=batch, steps=3, seed=0, precision=precision)
            seconds = []
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                samples = diffusion.sample(batch_size=batch, steps=STEPS, seed=0, precision=precision)
                torch.cuda.synchronize()
                seconds.append((time.perf_counter() - start) / STEPS)
            reference = samples if reference is None else reference
            distance = (samples - reference).square().mean().sqrt().item()
            row = {"preset": preset, "batch": batch, "precision": precision}
            row |= {"seconds_per_call": round(statistics.median(seconds), 5), "rms_to_fp32": round(distance, 5)}
            rows.append(row | {"dtype": str(samples.dtype)})
            print(rows[-1], flush=True)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    write_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
