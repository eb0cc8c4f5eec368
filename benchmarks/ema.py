"""Compares EMA decays and warm-ups, tracked within the same trainings, by the quality of the samples.

    python benchmarks/ema.py --data FOLDER --seeds 0 1         # the preset demo, and fashion.yaml on Fashion-MNIST
    python benchmarks/ema.py --data FOLDER --seeds 0 --steps 20 --num 100 --out runs/trial.json

FOLDER contains the files of Fashion-MNIST, as for `learning.py`. One training per kind and seed tracks all averages, so
that nothing else differs. `fashion.yaml` is trained for the number of steps that `learning.py` makes in 15 minutes on
one core, with a learning rate that depends on the step; `demo` is trained unchanged. The Frechet distances are those of
`learning.py` and `few_steps.py`, in the features that these scripts train. Uses a GPU if there is one. Writes
`results/ema.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import EMA
from few_steps import frechet, read_data, train_features
from few_steps import statistics as clip_statistics
from learning import CALLS, HERE, our_arm, read_images, statistics, train_classifier
from torch import Tensor, nn

from rin_video import RIN, GaussianDiffusion, Trainer
from rin_video.config import TrainConfig
from rin_video.config_files import load_config
from rin_video.datasets.demo import write_demo_set
from rin_video.datasets.open import open_dataset
from rin_video.files import write_text
from rin_video.training.callbacks import Callback
from rin_video.training.ema import make_ema

FASHION_STEPS = 3560  # the number of steps in 15 minutes on one core
SPANS = {"fashion": (100, 200, 330, 500, 1000), "demo": (60, 120, 250, 500)}  # steps, 1 / (1 - decay)
WARMUPS = (None, 0.1, 0.3)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BEFORE = {"fashion": 0.997, "demo": 0.998}  # the configured decays of the previous rule


def make_averages(model: nn.Module, kind: str) -> dict[str, EMA]:
    """Return EMAs with every decay and warm-up, the previous rule (ema-pytorch's power 2/3), and the raw weights."""
    averages: dict[str, EMA] = {
        f"1 - 1/{span}, {'constant' if warmup is None else f'{warmup:g} of the steps'}": make_ema(
            model, TrainConfig(ema_decay=1 - 1 / span, ema_warmup=warmup), DEVICE
        )
        for span in SPANS[kind]
        for warmup in WARMUPS
    }
    before = EMA(model, beta=BEFORE[kind], update_after_step=0, update_every=1, include_online_model=False)
    return {
        "none": make_ema(model, TrainConfig(ema_decay=0.0), DEVICE),
        f"{BEFORE[kind]:g}, power 2/3": before,
    } | averages


def draw(diffusion: GaussianDiffusion, average: EMA, num: int, **options: Any) -> Tensor:
    """Draw `num` samples in [0, 1] with the averaged weights."""
    return (
        diffusion.with_model(average.ema_model)
        .sample(batch_size=num, seed=0, max_batch=500, steps=CALLS, **options)
        .cpu()
    )


def fashion(data: Path | None, seed: int, steps: int, num: int, work: Path) -> dict[str, float]:
    """Train on Fashion-MNIST and return the Frechet distance of every average."""
    torch.manual_seed(seed)
    images, labels = read_images(data, work, train=True)
    network = train_classifier(images, labels, work / "classifier.pt")
    real = statistics(network, images[:10_000] / 255)
    torch.manual_seed(seed)
    diffusion, _, optimizer, config = our_arm([])
    diffusion, images = diffusion.to(DEVICE), images.to(DEVICE)
    averages = make_averages(diffusion.model, "fashion")
    parameters, peaks = list(diffusion.parameters()), [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        rate = 0.5 + 0.5 * math.cos(math.pi * max(step / steps - 0.6, 0) / 0.4)  # as in learning.py
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min((step + 1) / config.train.warmup_steps, 1) * rate
        diffusion(images[torch.randint(len(images), (config.train.train_batch_size,), device=DEVICE)]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for average in averages.values():
            average.update()
    return {name: frechet(statistics(network, draw(diffusion, a, num)), real) for name, a in averages.items()}


class Averages(Callback):
    """Tracks all averages during a run, in addition to the run's own."""

    def on_start(self, trainer: Trainer) -> None:
        self.averages = make_averages(trainer.unwrapped.model, "demo")

    def on_step(self, trainer: Trainer, loss: Tensor) -> None:
        for average in self.averages.values():
            average.update()


def demo(seed: int, steps: int, num: int, work: Path) -> dict[str, float]:
    """Train the preset demo and return the Frechet distance of every average."""
    config = load_config("demo", [f"train.seed={seed}", f"train.train_num_steps={steps}", "sample.steps=2"])
    write_demo_set(work / "clips")
    shape = (3, config.model.frames or 0, *config.model.height_width)
    dataset = open_dataset(work / "clips", shape, config.data, index=work / "index.jsonl")
    config.model.num_classes = len(dataset.classes)
    epochs = 8
    clips, labels = read_data(work / "clips", shape, epochs, config.data)
    network = train_features(clips, labels)
    real = clip_statistics(network, clips[: len(clips) // epochs] / 255)
    torch.manual_seed(seed)
    diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
    tracked = Averages()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(diffusion, dataset, results_folder=folder, config=config, progress=False, callbacks=[tracked]).train()
    label = torch.arange(num) % config.model.num_classes
    return {
        name: frechet(clip_statistics(network, draw(diffusion, average, num, label=label)), real)
        for name, average in tracked.averages.items()
    }


def table(report: dict[str, Any], kind: str) -> str:
    """Return a Markdown table with one row per average: the mean distance, and that of each seed."""
    lines = ["| decay, warm-up | distance (seeds) |", "|---|---|"]
    for name, found in report[kind].items():
        each = ", ".join(f"{value:.1f}" for value in found)
        lines.append(f"| {name} | {sum(found) / len(found):.1f} ({each}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST (default: download)")
    parser.add_argument("--kinds", nargs="+", choices=["demo", "fashion"], default=["demo", "fashion"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="training steps of both kinds, for a trial")
    parser.add_argument("--num", type=int, default=1000, help="samples per distance (for the demo, a quarter of them)")
    parser.add_argument("--work", type=Path, default=Path("runs/ema"), help="folder for data")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ema.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    report: dict[str, Any] = {"n": options.num, "torch": torch.__version__, "machine": machine}
    for kind in options.kinds:
        rows: dict[str, list[float]] = {}
        for seed in options.seeds:
            if kind == "fashion":
                steps = options.steps or FASHION_STEPS
                found = fashion(options.data, seed, steps, options.num, options.work)
            else:
                steps = options.steps or load_config("demo").train.train_num_steps
                found = demo(seed, steps, options.num // 4, options.work)
            for name, distance in found.items():
                rows.setdefault(name, []).append(round(distance, 2))
        report[kind] = rows
        print(f"{kind}, {steps} steps\n{table(report, kind)}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
