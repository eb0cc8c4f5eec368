"""Measures prediction: samples the rest of a clip from five conditioning frames and compares it with the true frames.

    python benchmarks/prediction.py                      # trains on the demo set, ten minutes on 2 CPU cores
    python benchmarks/prediction.py --run runs/prediction/run             # uses an existing run

The clips are those of the demo set; the test clips are held out and use another seed. The errors are those of the
predicted frames in [0, 1], for one sample and for the best of four. The baselines copy the last conditioning frame, or
extrapolate the last two linearly. Writes `results/prediction.json` and a sheet, `prediction.png`, with three rows per
clip (true, predicted, copied).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from rin_video import RIN, GaussianDiffusion, Trainer, load_config
from rin_video.datasets.demo import SHAPES, write_demo_set
from rin_video.datasets.open import open_dataset
from rin_video.files import write_text
from rin_video.media import contact_sheet

RESULTS = Path(__file__).parent / "results"
GIVEN, FRAMES, SAMPLES = 5, 16, 4
OPTIONS = [  # README.md lists the gain of each
    f"model.frames={FRAMES}",
    f"model.patch_size=[{FRAMES},2,2]",  # a token covers one position in all frames, conditioning and predicted ones
    "model.dim=128",
    "model.depth=3",
    "model.known_mask=true",
    "model.num_classes=0",
    "diffusion.loss_weight=none",
    "diffusion.known.first=1",
    f"diffusion.known_frames=[{GIVEN},{GIVEN}]",
    "train.save_and_sample_every=1000000",
    "train.log_every=50",
]


def baselines(clips: Tensor, given: int) -> dict[str, Tensor]:
    """Predict the frames from `given` on of clips (B, C, F, H, W) without a model: by copying and extrapolation."""
    last, before = clips[:, :, given - 1 : given], clips[:, :, given - 2 : given - 1]
    ahead = torch.arange(1, clips.shape[2] - given + 1).view(1, 1, -1, 1, 1)
    return {
        "copy of the last frame": last.expand(-1, -1, ahead.numel(), -1, -1),
        "linear extrapolation": (last + ahead * (last - before)).clamp(0, 1),
    }


def errors(predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Return the mean squared and mean absolute error of every clip, (..., B)."""
    difference = (predicted - true).flatten(-4)
    return {"mse": difference.square().mean(-1), "mae": difference.abs().mean(-1)}


def measure(diffusion: GaussianDiffusion, clips: Tensor, options: dict) -> tuple[list[dict], Tensor]:
    """Return a row for each prediction method, and the clips of the first sample."""
    drawn = torch.stack(
        [
            diffusion.sample(context=clips[:, :, :GIVEN], seed=seed, max_batch=32, progress=True, **options)
            for seed in range(SAMPLES)
        ]
    )
    assert torch.equal(drawn[0][:, :, :GIVEN], clips[:, :, :GIVEN])
    true = clips[:, :, GIVEN:]
    found = errors(drawn[:, :, :, GIVEN:], true)
    rows = {name: errors(guess, true) for name, guess in baselines(clips, GIVEN).items()}
    rows["one sample"] = {name: error[0] for name, error in found.items()}
    rows[f"best of {SAMPLES} samples"] = {name: error.min(0).values for name, error in found.items()}
    copied = rows["copy of the last frame"]
    return [
        {"prediction": name}
        | {kind: round(value.mean().item(), 5) for kind, value in row.items()}
        | {f"{kind}_of_copy": round((value.mean() / copied[kind].mean()).item(), 3) for kind, value in row.items()}
        for name, row in rows.items()
    ], drawn[0]


def sheet(clips: Tensor, predicted: Tensor, path: Path, num: int = 4) -> None:
    """Write a picture with three rows for each of `num` clips: true, predicted, last conditioning frame copied."""
    copied = torch.cat([clips[:, :, :GIVEN], baselines(clips, GIVEN)["copy of the last frame"]], dim=2)
    chosen = torch.linspace(0, len(clips) - 1, num).long()
    rows = torch.stack([part[chosen] for part in (clips, predicted, copied)], dim=1).flatten(0, 1)
    contact_sheet(rows, path, max_frames=FRAMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained run (default: train one)")
    parser.add_argument("--train-steps", type=int, default=1000)
    parser.add_argument("--clips", type=int, default=1000, help="clips of each shape to train on")
    parser.add_argument("--num", type=int, default=48, help="held-out clips")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/prediction"), help="folder for clips and the run")
    parser.add_argument("--out", type=Path, default=RESULTS / "prediction.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    config = load_config("demo", [*OPTIONS, f"train.train_num_steps={options.train_steps}", *options.overrides])
    shape = (3, FRAMES, *config.model.height_width)
    minutes = cpu_minutes = None
    if options.run is None:
        write_demo_set(options.folder / "clips", clips_per_class=options.clips)
        data = open_dataset(options.folder / "clips", shape, config.data)
        torch.manual_seed(config.train.seed)
        diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer = Trainer(diffusion, data, results_folder=options.folder / "run", config=config)
        trainer.train()
        minutes = (time.perf_counter() - start) / 60
        cpu_minutes = (time.process_time() - cpu_start) / 60  # of all threads, because the machine may be shared
        diffusion = trainer.averaged()
    else:
        diffusion = GaussianDiffusion.from_pretrained(options.run)
    write_demo_set(options.folder / "held-out", clips_per_class=-(-options.num // len(SHAPES)), seed=1)
    held_out = open_dataset(options.folder / "held-out", shape, config.data)
    clips = torch.stack([held_out.draw(i, 0)["x"] for i in range(options.num)]) / 255
    how = {"sampler": "dpmpp_2m", "spacing": "karras", "steps": options.steps}
    rows, predicted = measure(diffusion, clips, how)
    report = {
        "given": GIVEN,
        "frames": FRAMES,
        "n": len(clips),
        "parameters": sum(p.numel() for p in diffusion.parameters()),
        "train_steps": options.train_steps,
        "batch": config.train.train_batch_size,
        "minutes": None if minutes is None else round(minutes, 1),
        "cpu_minutes": None if cpu_minutes is None else round(cpu_minutes, 1),
        "sampling": how,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(report, indent=1) + "\n")
    sheet(clips, predicted, options.out.with_suffix(".png"))
    print(
        f"{report['n']} held-out clips, {GIVEN} of {FRAMES} frames for conditioning; trained for "
        f"{report['minutes']} minutes ({report['cpu_minutes']} of one core)"
    )
    print("| prediction | squared error | vs. copying | absolute error | vs. copying |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['prediction']} | {row['mse']} | {row['mse_of_copy']} | {row['mae']} | {row['mae_of_copy']} |")


if __name__ == "__main__":
    main()
