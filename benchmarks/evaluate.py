"""Tests the distances of `rin-video evaluate`: does a distance rise when clips get worse, and for which extractor?

    python benchmarks/evaluate.py --demo --data FOLDER
    python benchmarks/evaluate.py --data FOLDER --features inception=FILE i3d=FILE --num 512 --out runs/battery.json

FOLDER contains clips in one folder per class; the demo set is rendered. Both are divided by file into reference, source
(which is damaged), control and spare clips, and those that the extractor `self` is trained on (a fifth). Each damage of
`rin_video.evaluation.damages` is applied to the source clips at three strengths. The Frechet distance and the kernel
distance to the reference are measured in every view of every extractor. The floor is the distance of undamaged clips:
mean and twice the standard deviation over random divisions of reference, source and control. A damage is seen from the
strength on at which the distance is above the floor, and as far above that of the source clips themselves if theirs is
above the mean. The row passes if it is seen at the latest at strength 3 and the distance rises from strength to
strength. Features are kept in `--work`, so an interrupted run resumes. Writes `results/evaluate.json`, with versions
and hardware, a table (.md), and a picture of the damages (.png).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from rin_video.config import DataConfig
from rin_video.datasets.demo import SHAPES, render_clip
from rin_video.datasets.open import open_dataset
from rin_video.errors import UsageError
from rin_video.evaluation.damages import DAMAGES, MODES, STRENGTHS, drop_modes
from rin_video.evaluation.distances import frechet_distance, kernel_distance
from rin_video.features.base import (
    EXTRACTORS,
    Extractor,
    Request,
    as_pictures,
    difference_pictures,
    evenly_spaced,
    make_extractor,
)
from rin_video.files import atomic_write, write_text
from rin_video.media import contact_sheet
from rin_video.training.provenance import device_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rin-video", "torch", "torchvision", "timm", "numpy", "av")
PARTS = ("reference", "source", "control", "spare", "training")  # with no file in common
SPLITS = 20  # random divisions for the floor
CHUNK = 64  # clips
TRAINING = 255  # clips of the demo set that `self` is trained on
DROPPED = "mode dropped"
DISTANCES = {
    "frechet": partial(frechet_distance, resamples=0),
    "kernel": partial(kernel_distance, resamples=0),
}
Features = dict[str, Tensor]  # by view: (n, d) or (n, f, d)
Row = dict[str, Any]


@dataclass
class Clips:
    """Clips (n, 3, F, H, W), uint8, and the numbers of their classes."""

    x: Tensor
    labels: list[int]


# ---- data


def render_demo(num: int, frames: int, size: int) -> dict[str, Clips]:
    """Render the parts of the demo set, without a codec; there are three times as many spare clips."""
    names, parts = list(SHAPES), {}
    for number, part in enumerate(PARTS):
        count = {"spare": 3 * num, "training": TRAINING}.get(part, num)
        labels = [index % len(names) for index in range(count)]
        clips = [
            render_clip(names[label], size, frames, np.random.default_rng([number, index]))
            for index, label in enumerate(labels)
        ]
        parts[part] = Clips(torch.from_numpy(np.stack(clips)), labels)
    return parts


def read_folder(folder: Path, num: int, frames: int, size: int, seed: int, index: Path) -> dict[str, Clips]:
    """Read clips of a folder: one of each file, and one more of the spare and source files as spare clips."""
    data = open_dataset(folder, (3, frames, size, size), DataConfig(num_workers=0), seed=seed, index=index)
    try:
        files = divide(data.labels, num, seed)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from None
    draws = {part: [(index, 0) for index in indices] for part, indices in files.items()}
    draws["spare"] += [(index, 1) for part in ("spare", "source") for index in files[part]]
    return {
        part: Clips(
            torch.stack(
                [data.draw(index, epoch)["x"] for index, epoch in tqdm(chosen, f"{folder.name}, {part}", disable=None)]
            ),
            [data.labels[index] for index, _ in chosen],
        )
        for part, chosen in draws.items()
    }


def divide(labels: list[int], num: int, seed: int) -> dict[str, list[int]]:
    """Divide files with these labels into parts of `num`, with equally many of each class, and a fifth for training.

    Raises `UsageError` if there are too few.
    """
    rng, classes, others = np.random.default_rng(seed), sorted({*labels}), PARTS[:-1]
    orders = [rng.permutation([index for index, label in enumerate(labels) if label == name]) for name in classes]
    least = min(map(len, orders))
    each, training = num // len(classes), least // len(PARTS)
    if num % len(classes) or least - training < each * len(others) or not training:
        raise UsageError(
            f"{num} clips in each of {len(others)} parts need a multiple of {len(classes)}, and {each * len(others)} "
            f"files of each class; one has {least}, a fifth of which is kept for training: use a lower --num"
        )
    parts = {
        part: [int(order[i * len(others) + number]) for i in range(each) for order in orders]
        for number, part in enumerate(others)
    }
    return parts | {PARTS[-1]: [int(order[-1 - i]) for i in range(training) for order in orders]}


# ---- features


@EXTRACTORS.register("pixels")
class Pixels(Extractor):
    """A control without a network: colour, contrast, roughness and block edges of pictures, 6 numbers."""

    kinds: ClassVar[tuple[str, ...]] = ("video",)
    max_batch: ClassVar[int] = 16

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.digest, self.protocol = "none", {"version": 1}

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the features (N, 6) of uint8 pictures (N, 3, H, W), in similar ranges."""
        x = pictures.float()
        steps = x.diff(dim=3).abs().mean((1, 2))
        scales = [x.std((1, 2, 3)), steps.mean(1), steps[:, 7::8].mean(1) / (1 + steps.mean(1))]  # patches are 8 wide
        return torch.cat([x.mean((2, 3)) / 64, torch.stack(scales, 1).log1p()], dim=1)

    def extract(self, x: Tensor) -> Features:
        """Return the views; that of clips has the means over time and the mean absolute changes, 24 numbers."""
        pictures = {"frame": x[:, :, evenly_spaced(x.shape[2])], "motion": difference_pictures(x)}
        views = {view: self.encode(as_pictures(part)).unflatten(0, (len(x), -1)) for view, part in pictures.items()}
        parts = [part for rows in views.values() for part in (rows.mean(1), rows.diff(dim=1).abs().mean(1))]
        return {"clip": torch.cat(parts, dim=1), **views}


class Cache:
    """Computes features of an extractor and keeps them in a folder, in chunks, so that an interrupted run resumes.

    The folder also has the features of a probe: if the extractor gives others, another folder is used.
    """

    def __init__(self, extractor: Extractor, work: Path) -> None:
        self.extractor, self.seconds, self.clips = extractor, 0.0, 0
        probe = extractor(
            torch.from_numpy(np.stack([render_clip(s, 64, 16, np.random.default_rng(0)) for s in SHAPES]))
        )
        kind = extractor.name.partition("=")[0]
        for number in range(sys.maxsize):
            self.folder = work / f"{kind}-{number}"
            if not (self.folder / "probe.safetensors").exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file(probe, self.folder / "probe.safetensors")
                break
            known = load_file(self.folder / "probe.safetensors")
            if known.keys() == probe.keys() and all(similar(known[view], probe[view]) for view in probe):
                break

    def features(self, x: Tensor, title: str) -> Features:
        """Return the features of clips."""
        bar = tqdm(x.split(CHUNK), f"{self.extractor.name}, {title}", leave=False, disable=None)
        parts = [self._chunk(chunk) for chunk in bar]
        return {view: torch.cat([part[view] for part in parts]) for view in parts[0]}

    def _chunk(self, x: Tensor) -> Features:
        path = self.folder / f"{hashlib.blake2b(x.numpy().tobytes(), digest_size=16).hexdigest()}.safetensors"
        if not path.exists():
            start = time.process_time()
            features = self.extractor(x)
            seconds = time.process_time() - start
            with atomic_write(path, durable=False) as temporary:
                save_file(features, temporary, {"seconds": str(seconds)})
        with safe_open(path, "pt") as file:
            self.seconds, self.clips = self.seconds + float(file.metadata()["seconds"]), self.clips + len(x)
        return load_file(path)


def similar(one: Tensor, other: Tensor) -> bool:
    """Return whether features are equal apart from rounding."""
    return one.shape == other.shape and bool((one - other).norm() <= 1e-3 * one.norm())


def damaged_features(cache: Cache, clips: dict[str, Clips], source: Features, seed: int) -> dict[str, list[Features]]:
    """Return the features of the damaged source clips, at three strengths, by damage."""
    x, found = clips["source"].x, {}
    for name, damage in DAMAGES.items():
        found[name] = [cache.features(damage(x, strength, seed), f"{name} {strength}") for strength in STRENGTHS]
    chosen = [drop_modes(clips["source"].labels, clips["spare"].labels, strength, seed=seed) for strength in STRENGTHS]
    used = sorted({index - len(x) for indices in chosen for index in indices if index >= len(x)})
    spare = cache.features(clips["spare"].x[used], DROPPED)
    place = {index: index for index in range(len(x))} | {len(x) + index: len(x) + i for i, index in enumerate(used)}
    both = {view: torch.cat([rows, spare[view]]) for view, rows in source.items()}
    found[DROPPED] = [{view: rows[[place[i] for i in indices]] for view, rows in both.items()} for indices in chosen]
    return found


# ---- distances


def measure(distance: str, one: Tensor, other: Tensor) -> float:
    """Return a distance between features (n, d) or (n, f, d); the rows of one clip belong together.

    Frozen clips have equal motion features, which the distances refuse: one number is changed by a rounding error.
    """
    rows = [part.reshape(-1, part.shape[-1]).numpy().copy() for part in (one, other)]
    rows[0][0, 0] += np.spacing(np.abs(rows[0][0]).max()) * bool((rows[0] == rows[0][0]).all())
    groups = [np.repeat(np.arange(len(part)), part[0, ..., 0].numel()) for part in (one, other)]
    return DISTANCES[distance](*rows, groups_a=groups[0], groups_b=groups[1]).value


def find_floor(distance: str, parts: list[Tensor], labels: list[int], seed: int) -> tuple[float, float, float]:
    """Return mean, lower and upper bound of the distance of undamaged clips: mean -+ 2 standard deviations.

    The parts are mixed and divided again at random, each class for itself, as the parts were.
    """
    rng, pool = np.random.default_rng(seed), torch.stack(parts)
    values = []
    for _ in range(SPLITS):
        drawn = pool.clone()
        for label in {*labels}:
            members = torch.tensor([index for index, other in enumerate(labels) if other == label])
            rows = pool[:, members].flatten(0, 1)
            drawn[:, members] = rows[rng.permutation(len(rows))].unflatten(0, (len(parts), -1))
        values.append(measure(distance, drawn[0], drawn[1]))
    mean, spread = float(np.mean(values)), 2 * float(np.std(values, ddof=1))
    return mean, mean - spread, mean + spread


def judge(values: list[float], threshold: float) -> Row:
    """Judge the distances at strengths 1 to 3: from the strength `seen` on, all are above the threshold."""
    seen = next((s for s in STRENGTHS if all(value > threshold for value in values[s - 1 :])), None)
    rises = values[0] < values[1] < values[2]
    return {"values": values, "seen": seen, "rises": rises, "passes": seen is not None and rises}


def direction_accuracy(forwards: Tensor, backwards: Tensor) -> Row:
    """Return how often a linear classifier tells reversed clips from others, in features (n, d), by cross-validation.

    Half the clips, in both directions, train a ridge regression, and the other half test it, and vice versa. Each clip
    is judged by the difference of its two directions, so 0.5 is chance and `low` and `high` are 95 % of the binomial.
    """
    n = len(forwards) // 2 * 2
    x = torch.stack([forwards[:n], backwards[:n]]).double()
    x = (x - x.mean((0, 1))) / x.std((0, 1)).clamp(min=1e-6)
    difference = x[0] - x[1]  # a direction w is learnt with w . difference = 1
    correct = 0
    for train, test in (
        (slice(0, n // 2), slice(n // 2, n)),
        (slice(n // 2, n), slice(0, n // 2)),
    ):
        gram = difference[train] @ difference[train].T
        ridge = 0.1 * gram.diagonal().mean() * torch.eye(n // 2, dtype=torch.float64)
        weights = difference[train].T @ torch.linalg.solve(gram + ridge, torch.ones(n // 2, dtype=torch.float64))
        correct += int((difference[test] @ weights > 0).sum())
    share = correct / n
    margin = 1.96 * (share * (1 - share) / n) ** 0.5
    return {"accuracy": round(share, 3), "low": round(share - margin, 3), "high": round(share + margin, 3), "n": n}


def evaluate(extractor: Extractor, clips: dict[str, Clips], work: Path, seed: int) -> Row:
    """Return the rows of all damages, the floors and the control of one extractor on one set of clips."""
    cache = Cache(extractor, work)
    known = {part: cache.features(clips[part].x, part) for part in ("reference", "source", "control")}
    rows = damaged_features(cache, clips, known["source"], seed)
    found: Row = {
        "digest": extractor.digest,
        "protocol": extractor.protocol,
        "seconds_per_1000": round(1000 * cache.seconds / cache.clips, 1),
        "widths": {view: values.shape[-1] for view, values in known["reference"].items()},
        "views": {},
    }
    for view in known["reference"]:
        reference, source, control = (known[part][view] for part in ("reference", "source", "control"))
        found["views"][view] = {}
        for distance in DISTANCES:
            undamaged = {
                "source": measure(distance, source, reference),
                "control": measure(distance, control, reference),
            }
            mean, low, high = find_floor(distance, [reference, source, control], clips["source"].labels, seed)
            threshold = max(mean, undamaged["source"]) + high - mean
            table = {
                name: judge([measure(distance, damaged[view], reference) for damaged in strengths], threshold)
                for name, strengths in tqdm(
                    rows.items(), f"{extractor.name}, {view}, {distance}", leave=False, disable=None
                )
            }
            found["views"][view][distance] = {
                "floor": {"mean": mean, "low": low, "high": high},
                "threshold": threshold,
                "undamaged": undamaged,
                "below_control": [name for name, row in table.items() if row["values"][0] <= undamaged["control"]],
                "rows": table,
            }
        backwards = rows["reversed"][-1][view]
        found["views"][view]["direction"] = direction_accuracy(source.flatten(1), backwards.flatten(1))
    return found


# ---- report


def mark(row: Row) -> str:
    """Return the weakest strength seen, in brackets if the distance does not rise with strength, or a dash."""
    if row["seen"] is None:
        return "-"
    return str(row["seen"]) if row["rises"] else f"({row['seen']})"


def table(results: dict[str, Row], distance: str) -> list[str]:
    """Return a Markdown table of one set of clips: damages against extractors and views."""
    columns = [(name, view) for name, found in results.items() for view in found["views"]]
    cells = {column: results[column[0]]["views"][column[1]][distance] for column in columns}
    lines = [
        "| damage | " + " | ".join(f"{name.partition('=')[0]}, {view}" for name, view in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [
        f"| {damage} | " + " | ".join(mark(cells[column]["rows"][damage]) for column in columns) + " |"
        for damage in [*DAMAGES, DROPPED]
    ]
    control = [str(len(cells[column]["below_control"])) for column in columns]
    lines.append("| not above the control at strength 1 | " + " | ".join(control) + " |")
    counts = [sum(row["passes"] for row in cells[column]["rows"].values()) for column in columns]
    total = len(DAMAGES) + 1
    lines.append("| **rows passed** | " + " | ".join(f"{count} of {total}" for count in counts) + " |")
    return lines


def report(found: Row) -> str:
    """Return all tables as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        "# Evaluation battery",
        "",
        f"{found['num']} clips of {found['frames']} frames of {found['size']}x{found['size']} in each set; {versions}; "
        f"{found['machine']}, {found['device']}. A number is the weakest strength that is seen, in brackets if the "
        "distance does not rise with strength; a dash means that none is seen.",
        "",
    ]
    for data, extractors in found["results"].items():
        for distance in DISTANCES:
            lines += [f"## {data}, {distance} distance", "", *table(extractors, distance), ""]
        lines += ["| extractor | seconds per 1,000 clips | direction of time told (0.5: chance) |", "|---|---|---|"]
        for name, row in extractors.items():
            told = ", ".join(f"{view} {values['direction']['accuracy']:.2f}" for view, values in row["views"].items())
            lines.append(f"| {name.partition('=')[0]} | {row['seconds_per_1000']} | {told} |")
        lines.append("")
    return "\n".join(lines)


def damage_sheet(clip: Tensor, path: Path, seed: int = 0) -> None:
    """Write a picture of a clip (3, F, H, W): a row per damage, four frames at strength 1 and four at strength 3."""
    frames = torch.linspace(0, clip.shape[1] - 1, 4).round().long()
    rows, titles = [torch.cat([clip[:, frames]] * 2, dim=1)], ["undamaged"]
    for name, damage in DAMAGES.items():
        rows.append(torch.cat([damage(clip[None], strength, seed)[0, :, frames] for strength in (1, 3)], dim=1))
        titles.append(f"{name}: {damage.strengths[0]}; {damage.strengths[2]}")
    contact_sheet(rows, path, titles=titles)


def describe_machine(device: torch.device) -> Row:
    """Return versions and hardware."""
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "device": device_name(device),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="use the demo set")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders of clips, one folder per class")
    parser.add_argument(
        "--features", nargs="+", default=["pixels", "lite", "transnet", "self"], help="extractors, one at a time"
    )
    parser.add_argument("--num", type=int, default=256, help="clips per set")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/battery"), help="folder for features")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluate.json")
    options = parser.parse_args()
    if not options.demo and not options.data:
        parser.error("pass --demo, or --data FOLDER")
    device = torch.device(options.device)
    sets = {"demo": partial(render_demo, options.num, options.frames, options.size)} if options.demo else {}
    sets |= {
        folder.name: partial(
            read_folder,
            folder,
            options.num,
            options.frames,
            options.size,
            options.seed,
            options.work / folder.name / "index.jsonl",
        )
        for folder in options.data
    }
    settings = {name: getattr(options, name) for name in ("num", "frames", "size", "seed")}
    results: dict[str, dict[str, Row]] = {}
    if options.out.exists():  # extractors of earlier calls stay
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if settings != {name: before[name] for name in settings}:
            parser.error(f"{options.out} has other settings: pass the same, or another --out")
        results = before["results"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for data, read in sets.items():
        clips = read()
        if data == "demo":
            damage_sheet(clips["source"].x[1], options.out.with_suffix(".png"), options.seed)
        work = options.work / data
        for name in options.features:
            known = clips["training"]
            extractor = make_extractor(
                name, device=device, data=lambda known=known: (known.x, known.labels), cache=work
            )
            results.setdefault(data, {})[name] = evaluate(extractor, clips, work, options.seed)
            header = settings | {
                "floor": f"mean -+ 2 standard deviations over {SPLITS} random divisions of undamaged clips",
                "strengths": {name: damage.strengths for name, damage in DAMAGES.items()} | {DROPPED: MODES},
                **describe_machine(device),
            }
            found = header | {"results": results}
            write_text(options.out, json.dumps(found, indent=1) + "\n")
            write_text(options.out.with_suffix(".md"), report(found))
    print(report(found))


if __name__ == "__main__":
    main()
