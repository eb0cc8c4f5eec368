"""Measures sample quality after a few minutes of training: rin-video and rin-pytorch on Fashion-MNIST.

    python benchmarks/learning.py --data FOLDER --seeds 0 1     # trainings of 15 minutes, two at a time, then samples
    python benchmarks/learning.py --arms rin-video --minutes 2 --set train.train_lr=3e-3 --work runs/trial \\
        --out runs/trial.json

FOLDER contains the four files of Fashion-MNIST (`train-images-idx3-ubyte.gz`, ...), as in the Debian package
`dataset-fashion-mnist` (/usr/share/datasets/fashion-mnist); without it torchvision downloads them. Every arm trains in
its own process with one thread for the same processor time (on a free core, the same wall-clock time). All arms are
unconditional and sample from averaged weights with the same number of network calls. The Frechet distance uses the
features of a classifier that this script trains, so it is not comparable with other distances. Writes
`results/learning.json`, a curve and a sheet of samples.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from few_steps import frechet
from torch import Tensor, nn

from rin_video import RIN, GaussianDiffusion
from rin_video.config import TrainConfig
from rin_video.config_files import load_config
from rin_video.training.ema import make_ema
from rin_video.training.optimizers import make_optimizer
from rin_video.weights import write_text

HERE = Path(__file__).parent
MINUTES = (2, 5, 15)
CALLS = 50
# The port with the same width, depth and latents: its README's settings, other rates, our patch size, our batch size.
PORT = {"dim": 128, "image_size": 32, "channels": 1, "depth": 2, "num_latents": 16, "dim_latent": 128}
PORT |= {"latent_self_attn_depth": 1}
README = {"patch_size": 4, "train_lr": 1e-4, "batch": 16, "ema_decay": 0.995, "train_prob_self_cond": 0.9}
SWEEP: dict[str, dict[str, Any]] = {
    f"rin-pytorch, lr {rate}": README | {"train_lr": float(rate), "ema_decay": 0.999}
    for rate in ("3e-4", "1e-3", "3e-3")
}
SWEEP |= {
    f"rin-pytorch, patches of 8, batch {batch}, lr 1e-3": SWEEP["rin-pytorch, lr 1e-3"]
    | {"patch_size": 8, "batch": batch}
    for batch in (16, 64)
}
ARMS: dict[str, dict[str, Any]] = {"rin-video": {}, "rin-pytorch, README": README} | SWEEP
DEFAULT_ARMS = (
    "rin-video",
    "rin-pytorch, README",
    "rin-pytorch, patches of 8, batch 16, lr 1e-3",
)  # the last one is the best of the sweep


# ---- data


def read_images(data: Path | None, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 images (N, 1, 32, 32), padded from 28x28, and labels (N,)."""
    from torchvision.datasets import FashionMNIST

    raw = folder / "FashionMNIST" / "raw"
    if data is not None and not raw.exists():
        raw.mkdir(parents=True)
        for path in data.glob("*-ubyte*"):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            (raw / path.name.removesuffix(".gz")).write_bytes(content)
    found = FashionMNIST(folder, train=train, download=data is None)
    return F.pad(found.data, (2, 2, 2, 2)).unsqueeze(1), found.targets


# ---- the arms


def our_arm(overrides: list[str]) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]:
    """Return diffusion, averaged weights, optimizer and config of rin-video."""
    config = load_config(str(HERE / "fashion.yaml"), overrides)
    diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
    return (
        diffusion,
        make_ema(diffusion.model, config.train, torch.device("cpu")),
        make_optimizer(diffusion, config),
        config,
    )


def port_arm(options: dict[str, Any]) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Return diffusion, averaged weights and optimizer of the port, whose trainer uses Adam at a constant rate."""
    import rin_pytorch as port

    diffusion = port.GaussianDiffusion(
        port.RIN(**PORT, patch_size=int(options["patch_size"])),
        timesteps=CALLS,
        train_prob_self_cond=options["train_prob_self_cond"],
    )
    average = make_ema(diffusion.model, TrainConfig(ema_decay=options["ema_decay"]), torch.device("cpu"))
    return diffusion, average, torch.optim.Adam(diffusion.parameters(), lr=options["train_lr"], betas=(0.9, 0.99))


def port_options(arm: str, overrides: list[str]) -> dict[str, Any]:
    """Return the options of an arm of the port, with overrides `name=number`."""
    return ARMS[arm] | {name: float(value) for name, value in (word.split("=") for word in overrides)}


def train(arm: str, overrides: list[str], minutes: list[float], data: Path | None, out: Path, seed: int) -> None:
    """Train one arm; write its averaged weights after each of `minutes`, and its log, to `out`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images, _ = read_images(data, out.parent, train=True)
    rate: Callable[[float], float]
    if arm == "rin-video":
        diffusion, average, optimizer, config = our_arm(overrides)
        batch, warmup = config.train.train_batch_size, config.train.warmup_steps

        def rate(done: float) -> float:  # a cosine over the last two fifths of the time
            return 0.5 + 0.5 * math.cos(math.pi * max(done - 0.6, 0) / 0.4)

    else:
        options = port_options(arm, overrides)
        diffusion, average, optimizer = port_arm(options)
        batch, warmup = int(options["batch"]), 0

        def rate(done: float) -> float:
            return 1.0

    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = list(diffusion.parameters())
    step, losses, log, due = 0, [], [], list(minutes)
    start = time.process_time()
    while due:
        spent = (time.process_time() - start) / 60
        if spent >= due[0]:
            done = due.pop(0)
            torch.save(average.ema_model.state_dict(), out / f"{done:g}.pt")
            log.append(
                {
                    "minutes": done,
                    "steps": step,
                    "samples": step * batch,
                    "loss": sum(losses[-200:]) / max(len(losses[-200:]), 1),
                }
            )
            continue
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min((step + 1) / max(warmup, 1), 1) * rate(spent / minutes[-1])
        x = images[torch.randint(len(images), (batch,))]
        loss = diffusion(x if arm == "rin-video" else x / 255)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        step += 1
        losses.append(loss.item())
    write_text(out / "log.json", json.dumps({"params": sum(p.numel() for p in parameters), "log": log}))


def draw(arm: str, overrides: list[str], weights: Path, num: int, sampler: str) -> Tensor:
    """Draw samples (num, 1, 32, 32) in [0, 1] from an arm's averaged weights."""
    torch.manual_seed(0)
    state = torch.load(weights, weights_only=True)
    if arm == "rin-video":
        diffusion, _, _, config = our_arm(overrides)
        diffusion.model.load_state_dict(state)
        how = {"sampler": config.sample.sampler, "spacing": config.sample.spacing}
        return diffusion.sample(batch_size=num, steps=CALLS, seed=0, max_batch=100, **how)
    diffusion, _, _ = port_arm(port_options(arm, overrides))
    diffusion.model.load_state_dict(state)
    diffusion.use_ddim = sampler == "ddim"
    return torch.cat([diffusion.eval().sample(batch_size=100) for _ in range(num // 100)]).clamp(0, 1)


def draw_all(arm: str, overrides: list[str], minutes: list[float], folder: Path, num: int) -> None:
    """Write the samples after each of `minutes` to `folder`.

    The port uses its default sampler, and after the last minutes also its other one.
    """
    for done in minutes:
        names = ["own"] if arm == "rin-video" else ["ddim", "ddpm"] if done == minutes[-1] else ["ddim"]
        for sampler in names:
            samples = draw(arm, overrides, folder / f"{done:g}.pt", num, sampler)
            torch.save(samples, folder / f"{done:g}-{sampler}.pt")


# ---- the distance


class Classifier(nn.Module):
    """A classifier of images in [0, 1] with 10 classes and 64 features before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * 16, 64),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 1, 32, 32)."""
        return self.head(F.relu(self.body(x)))


def train_classifier(images: Tensor, labels: Tensor, path: Path) -> Classifier:
    """Train the classifier for three epochs and save it to `path`, or load it from there."""
    torch.manual_seed(0)
    network = Classifier()
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    steps = 3 * len(images) // 128
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        F.cross_entropy(network(images[index] / 255), labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.save(network.state_dict(), path)
    return network.eval()


@torch.no_grad()
def statistics(network: Classifier, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and covariance of the features of images in [0, 1]."""
    features = torch.cat([network.body(part) for part in x.split(500)]).double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


# ---- evaluation


def evaluate(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Compute the distances of all arms and seeds; return the report."""
    images, labels = read_images(options.data, work, train=True)
    test, test_labels = read_images(options.data, work, train=False)
    network = train_classifier(images, labels, work / "classifier.pt")
    n = options.num
    with torch.no_grad():
        right = (network(test / 255).argmax(1) == test_labels).float().mean().item()
    real = statistics(network, images[:10_000] / 255)
    noise = torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    report: dict[str, Any] = {
        "n": n,
        "n_real": 10_000,
        "classifier_accuracy": round(right, 4),
        "real_to_real": round(frechet(statistics(network, test[:n] / 255), real), 2),
        "noise_to_real": round(frechet(statistics(network, noise), real), 1),
        "calls": CALLS,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, one thread for each arm",
        "rows": [],
    }
    print(f"real against real {report['real_to_real']}, noise {report['noise_to_real']}, n = {n}", flush=True)
    for arm, seed in product(options.arms, options.seeds):
        folder = folder_of(work, arm, seed)
        if not (folder / "log.json").exists():  # other calls may have used fewer seeds
            print(f"{arm}: no training with seed {seed}")
            continue
        log = json.loads((folder / "log.json").read_text())
        for entry in log["log"]:
            found = sorted(folder.glob(f"{entry['minutes']:g}-*.pt"))
            distances = {
                path.stem.split("-")[1]: round(
                    frechet(statistics(network, torch.load(path, weights_only=True)[:n]), real), 2
                )
                for path in found
            }
            best = min(distances, key=lambda name: distances[name])
            row = {"arm": arm, "seed": seed, "params": log["params"], **entry, "sampler": best}
            row["distance"] = distances[best]
            report["rows"].append(row | {"distances": distances})
            print(f"{arm}, seed {seed}: {json.dumps(row)}", flush=True)
    return report


def folder_of(work: Path, arm: str, seed: int) -> Path:
    """Return the folder of an arm's training."""
    return work / f"{''.join(c if c.isalnum() else '-' for c in arm)}-{seed}"


def by_arm(report: dict[str, Any]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Group the rows by arm and minutes; each group has the rows of all seeds."""
    arms: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for row in report["rows"]:
        arms.setdefault(row["arm"], {}).setdefault(row["minutes"], []).append(row)
    return arms


def mean(rows: list[dict[str, Any]]) -> float:
    """Return the mean distance."""
    return sum(row["distance"] for row in rows) / len(rows)


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table of the mean distances, with the distance of each seed in brackets."""
    minutes = sorted({row["minutes"] for row in report["rows"]})
    lines = ["| arm | M params | images seen | " + " | ".join(f"{m:g} min" for m in minutes) + " |"]
    lines.append("|---" * (3 + len(minutes)) + "|")
    for arm, times in by_arm(report).items():
        last, cells = times[max(times)][0], []
        for rows in (times.get(done, []) for done in minutes):
            each = ", ".join(f"{row['distance']:.1f}" for row in rows)
            cells.append(f"{mean(rows):.1f} ({each})" if len(rows) > 1 else each or "-")
        lines.append(f"| {arm} | {last['params'] / 1e6:.2f} | {last['samples']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], work: Path, path: Path) -> None:
    """Plot the distances, and a sheet with 6x8 samples of every arm's first seed at every time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, arms = figure.subplots(), by_arm(report)
    for arm, times in arms.items():
        (line,) = axes.plot(list(times), [mean(rows) for rows in times.values()], label=arm)
        for done, rows in times.items():
            axes.plot([done] * len(rows), [row["distance"] for row in rows], "o", color=line.get_color(), ms=4)
    axes.axhline(report["real_to_real"], color="grey", linestyle=":", label="real images")
    axes.set(xscale="log", yscale="log", xlabel="minutes on one thread", ylabel=f"Frechet distance, n = {report['n']}")
    axes.legend(fontsize=7)
    figure.savefig(path.with_suffix(".png"), dpi=100)
    minutes = sorted({row["minutes"] for row in report["rows"]})
    figure = Figure(figsize=(3 * len(minutes), 2.6 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), len(minutes), squeeze=False)
    for row_of_axes, (arm, times) in zip(grid, arms.items(), strict=True):
        for axes, done in zip(row_of_axes, minutes, strict=True):
            axes.axis("off")
            if done not in times:
                continue
            row = times[done][0]
            drawn = folder_of(work, arm, row["seed"]) / f"{done:g}-{row['sampler']}.pt"
            sheet = torch.load(drawn, weights_only=True)[:48].view(6, 8, 32, 32).permute(0, 2, 1, 3).reshape(192, 256)
            axes.imshow(sheet, cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{arm}, {done:g} min: {row['distance']:.0f}", fontsize=7)
    figure.savefig(path.with_name(f"{path.stem}_samples.png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four files (default: download)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(DEFAULT_ARMS))
    parser.add_argument("--minutes", type=float, nargs="+", default=list(MINUTES))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the arm, for a trial with one arm"
    )
    parser.add_argument("--num", type=int, default=1000, help="samples per distance, a multiple of 100")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training per seed")
    parser.add_argument("--at-a-time", type=int, default=2, help="trainings that run in parallel")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder for weights and data")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learning.json")
    parser.add_argument("--step", choices=("all", "train", "evaluate"), default="all", help="run only one half")
    parser.add_argument("--train-arm", choices=list(ARMS), help=argparse.SUPPRESS)  # for child processes
    options = parser.parse_args()
    if options.train_arm:
        (seed,) = options.seeds
        folder = folder_of(options.work, options.train_arm, seed)
        for old in (*folder.glob("*.pt"), folder / "log.json"):  # left by a previous training
            old.unlink(missing_ok=True)
        train(options.train_arm, options.set, options.minutes, options.data, folder, seed)
        draw_all(options.train_arm, options.set, options.minutes, folder, options.num)
        return
    read_images(options.data, options.work, train=False)
    if options.step != "evaluate":
        waiting, running = list(product(options.arms, options.seeds)), []
        while waiting or running:
            while waiting and len(running) < options.at_a_time:
                arm, seed = waiting.pop(0)
                folder_of(options.work, arm, seed).mkdir(parents=True, exist_ok=True)
                child = [sys.executable, *sys.argv, "--train-arm", arm, "--seeds", str(seed)]
                running.append(subprocess.Popen(child))
            if running.pop(0).wait():
                raise SystemExit("a training failed")
    if options.step != "train":
        report = evaluate(options, options.work)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(report, indent=1) + "\n")
        plot(report, options.work, options.out)
        print(table(report))


if __name__ == "__main__":
    main()
