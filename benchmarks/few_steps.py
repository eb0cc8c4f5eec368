"""Measures the sample quality of each sampler with few steps, as a Frechet distance on the clips of the demo.

    python benchmarks/few_steps.py                       # trains the preset demo first (a few minutes)
    python benchmarks/few_steps.py --run runs/demo/run --data runs/demo/data --num 256

The features are those of a small network that this script trains to classify how a clip was corrupted and its class, so
that they capture both content and quality. A Frechet distance depends on the number of samples and on the extractor, so
the figures are only comparable with each other. The script also prints n and the distances of real clips and of noise.
Writes `results/few_steps.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rin_video.cli.demo import run_demo
from rin_video.datasets.open import open_dataset
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.files import write_text
from rin_video.model.rin import load_model

RESULTS = Path(__file__).parent / "results"
STEPS = (5, 10, 20, 50, 100, 250)
ROWS = [  # (sampler, spacing)
    ("ddim", "uniform"),
    ("ddpm", "uniform"),
    ("ddpm_small", "uniform"),
    ("dpmpp_2m", "uniform"),
    ("dpmpp_2m", "karras"),
    ("dpmpp_2m_sde", "uniform"),
    ("dpmpp_2m_sde", "karras"),
    ("dpmpp_3m", "uniform"),
    ("dpmpp_3m", "karras"),
    ("heun", "uniform"),
    ("heun", "karras"),
]
SPOILS = ("not", "noise", "blur", "patches", "frames", "fade")
WIDTH = 32  # number of features


class Features(nn.Module):
    """A small 3D convolutional network that maps clips (B, 3, F, H, W) in [0, 1] to features (B, WIDTH)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv3d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv3d(after, after, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.neck = nn.Linear(2 * widths[-1], WIDTH)
        self.head = nn.Linear(WIDTH, outputs)

    def features(self, x: Tensor) -> Tensor:
        """Return the features (B, WIDTH)."""
        maps = self.body(2 * x - 1).flatten(2)
        return self.neck(torch.cat([maps.mean(2), maps.std(2)], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, outputs) of corruptions and classes."""
        return self.head(nn.functional.silu(self.features(x)))


def spoil(x: Tensor, how: int, generator: torch.Generator) -> Tensor:
    """Corrupt a clip (3, F, H, W) in way number `how` of SPOILS by a random amount."""
    amount = torch.rand((), generator=generator).item()
    kind = SPOILS[how]
    if kind == "noise":
        x = x + 0.3 * (0.1 + amount) * torch.randn(x.shape, generator=generator)
    elif kind == "blur":
        size = 3 if amount < 0.5 else 5
        x = nn.functional.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)
    elif kind == "patches":  # replace some 8x8 blocks by those of a shifted clip
        moved = x.roll((5, 9), (-2, -1))
        mask = torch.rand(x.shape[-2] // 8, x.shape[-1] // 8, generator=generator) < 0.1 + 0.4 * amount
        mask = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
        x = torch.where(mask, moved, x)
    elif kind == "frames":
        x = x[:, torch.randperm(x.shape[1], generator=generator)]
    elif kind == "fade":
        x = x + (0.2 + 0.5 * amount) * (x.mean((1, 2, 3), keepdim=True) - x)
    return x.clamp(0, 1)


def train_features(data: Tensor, labels: Tensor, steps: int = 1200, batch: int = 16) -> Features:
    """Train a network to classify how a clip was corrupted, and its class."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    classes = int(labels.max()) + 1
    network = Features(len(SPOILS) + classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    right = []
    bar = tqdm(range(steps), desc="feature network", unit="step")
    for _ in bar:
        index = torch.randint(len(data), (batch,), generator=generator)
        how = torch.randint(len(SPOILS), (batch,), generator=generator)
        x = torch.stack([spoil(data[i] / 255, h, generator) for i, h in zip(index.tolist(), how.tolist(), strict=True)])
        spoilt, class_ = network(x).split([len(SPOILS), classes], dim=1)
        loss = nn.functional.cross_entropy(spoilt, how) + nn.functional.cross_entropy(class_, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right = [*right[-20:], (spoilt.argmax(1) == how).float().mean().item()]
        bar.set_postfix_str(f"loss {loss.item():.3f}, {np.mean(right):.0%} correct")
    return network.eval()


@torch.no_grad()
def statistics(network: Features, clips: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and covariance of the features of clips in [0, 1]."""
    features = torch.cat([network.features(part) for part in clips.split(32)]).double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def frechet(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians, given as (mean, covariance).

    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    (mean1, cov1), (mean2, cov2) = one, other
    values = np.linalg.eigvals(cov1 @ cov2).real  # not negative, because both matrices are positive semidefinite
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2) - 2 * np.sqrt(values.clip(min=0)).sum())


def read_data(folder: Path, shape: tuple[int, ...], epochs: int, config) -> tuple[Tensor, Tensor]:
    """Return uint8 clips (N, C, F, H, W) and labels (N,), the items of `epochs` epochs."""
    dataset = open_dataset(folder, shape, config)
    items = [dataset.draw(i, epoch) for epoch in range(epochs) for i in range(len(dataset))]
    return torch.stack([item["x"] for item in items]), torch.tensor([item["label"] for item in items])


def measure(diffusion: GaussianDiffusion, network: Features, real, num: int, steps: tuple[int, ...]) -> list[dict]:
    """Return a row with distance and seconds for every sampler, spacing and number of steps."""
    classes = diffusion.model.num_classes
    rows = []
    for sampler, spacing in ROWS:
        for count in steps:
            start = time.perf_counter()
            samples = diffusion.sample(
                num,
                steps=count,
                sampler=sampler,
                spacing=spacing,
                label=torch.arange(num) % classes if classes else None,
                seed=0,
                max_batch=32,
            )
            seconds = time.perf_counter() - start
            distance = frechet(statistics(network, samples), real)
            calls = 2 * count - 1 if sampler == "heun" else count
            row = {"sampler": sampler, "spacing": spacing, "steps": count, "calls": calls}
            rows.append(row | {"distance": round(distance, 3), "seconds": round(seconds, 1)})
            print(f"{sampler:<13}{spacing:<9}{count:>4} steps {calls:>4} calls  distance {distance:8.2f}", flush=True)
    return rows


def table(rows: list[dict], steps: tuple[int, ...]) -> str:
    """Return a Markdown table of the distances."""
    lines = ["| sampler | spacing | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 2) + "|"]
    for sampler, spacing in ROWS:
        of = {row["steps"]: row["distance"] for row in rows if (row["sampler"], row["spacing"]) == (sampler, spacing)}
        lines.append(f"| {sampler} | {spacing} | " + " | ".join(f"{of[n]:.2f}" for n in steps) + " |")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Plot the distances against network calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for sampler, spacing in ROWS:
        row = [r for r in report["rows"] if (r["sampler"], r["spacing"]) == (sampler, spacing)]
        style = "--" if spacing == "karras" else "-"
        axes.plot(
            [r["calls"] for r in row], [r["distance"] for r in row], style, marker=".", label=f"{sampler}, {spacing}"
        )
    axes.axhline(report["real_to_real"], color="grey", linestyle=":", label="real clips")
    axes.set(xscale="log", yscale="log", xlabel="network calls per sample", ylabel="Frechet distance")
    axes.set_title(f"demo model, n = {report['n']}")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a trained model for clips (default: train the preset demo)")
    parser.add_argument("--data", type=Path, help="the data it was trained on")
    parser.add_argument("--num", type=int, default=96, help="samples per figure")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS / "few_steps.json")
    options = parser.parse_args()
    if not options.run:
        run_demo(Path("runs/demo"))
        options.run, options.data = Path("runs/demo/run"), Path("runs/demo/data")
    model, config = load_model(options.run)
    diffusion = GaussianDiffusion(model, config.diffusion)
    epochs = 8
    data, labels = read_data(options.data, diffusion.shape, epochs, config.data)
    network = train_features(data, labels)
    per_epoch = len(data) // epochs
    some = torch.linspace(0, per_epoch - 1, min(options.num, per_epoch)).long()
    halves = [
        statistics(network, torch.cat([data[k * per_epoch + some] for k in part]) / 255) for part in ((0, 1), (2, 3))
    ]
    noise = torch.rand(options.num, *diffusion.shape, generator=torch.Generator().manual_seed(1))
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "n": options.num,
        "n_real": 2 * len(some),
        "extractor": f"3D convolutions trained by this script, {WIDTH} features",
        "real_to_real": round(frechet(*halves), 3),
        "noise_to_real": round(frechet(statistics(network, noise), halves[0]), 3),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(
        f"real against real {report['real_to_real']}, noise against real {report['noise_to_real']}, n = {options.num}"
    )
    report["rows"] = measure(diffusion, network, halves[0], options.num, tuple(options.steps))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(report, indent=1) + "\n")
    plot(report, options.out.with_suffix(".png"))
    print(table(report["rows"], tuple(options.steps)))


if __name__ == "__main__":
    main()
