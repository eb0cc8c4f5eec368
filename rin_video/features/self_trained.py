"""The extractor "self": a small network that is trained on the user's own data, once, and cached beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rin_video.errors import UsageError
from rin_video.features.base import EXTRACTORS, Extractor, Request, as_pictures, exact_math, refuse_argument
from rin_video.features.pictures import resize
from rin_video.features.self_network import HIDDEN, SelfNetwork
from rin_video.features.self_tasks import CHANGES, ORDERS, changed, reordered
from rin_video.files import atomic_write
from rin_video.progress import progress_bar
from rin_video.tensor_files import DIGEST, tensors_digest, write_tensors

log = logging.getLogger("rin_video")

VERSION = 1  # of the network and its training: a change retrains
SIZE = 48  # pixels of the longer side that the network sees at most
SAMPLES, STEPS, BATCH, WINDOWS = 512, 300, 8, 4  # samples that it is trained on, steps, samples per step, of each
RATE, TEMPERATURE, SEED = 4e-3, 0.1, 0
PROBED = 16  # samples whose pixels identify the data


@EXTRACTORS.register("self")
class SelfTrained(Extractor):
    """A network that is trained on the user's own clips or images, on one core in about two minutes.

    Its tasks for clips are the order and speed of the frames (`ORDERS`), which windows belong to one clip, and the
    class if the data has labels; for images `CHANGES` take the place of the order. Distances compare only between
    evaluations with the same data: `digest` shows the weights. Do not train it on the samples that it is to judge.
    """

    max_batch = 16

    def __init__(self, request: Request) -> None:
        refuse_argument(request)
        super().__init__(request)
        if request.data is None:
            raise UsageError("--features self is trained on data: pass --data, the data that the model was trained on")
        source = Source(request.data)
        self.kinds = ("image",) if source.is_image else ("video",)
        self.size, self.num_channels = fit_size(source.shape[-2:]), source.shape[0]
        settings = {
            "version": VERSION,
            "size": list(self.size),
            "tasks": list(CHANGES if source.is_image else ORDERS),
            "data": source.digest(),
            "samples": min(len(source), SAMPLES),
            "steps": STEPS,
            "batch": [BATCH, WINDOWS],
            "seed": SEED,
        }
        weights, results = cached(source, settings, request, self.device)
        num_classes = results.get("classes", 0)
        with torch.random.fork_rng(devices=[]):
            network = SelfNetwork(len(settings["tasks"]), num_classes)
        network.load_state_dict(weights)
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.digest = f"sha256:{tensors_digest(weights)}"
        self.protocol = {
            "network": "small network, trained on the data",
            "size": list(self.size),
            "resize": "bilinear, antialiased",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "layer": f"last hidden layer, {HIDDEN} features",
            "frames": "all",
            "training": settings | results,
        }

    def extract(self, x: Tensor) -> dict[str, Tensor]:
        """Return the view "clip" or "image", (B, 256)."""
        if x.ndim == 4:
            return {"image": self.in_batches(self.encode, x[:, :, None])}
        return {"clip": self.in_batches(self.encode, x)}

    def encode(self, x: Tensor) -> Tensor:
        """Return the features of uint8 clips (B, 3, F, H, W)."""
        frames = resize(as_pictures(x), self.size).unflatten(0, (len(x), -1)).transpose(1, 2)
        return self.network(frames / 127.5 - 1)


class Source:
    """The data that "self" is trained on: a dataset, or a function that returns uint8 samples or (samples, labels).

    Samples are images (C, H, W) or clips (C, F, H, W), uint8 or floats in [0, 1].
    """

    def __init__(self, data: Any) -> None:
        if callable(data) and not hasattr(data, "__getitem__"):
            made = data()
            x, labels = made if isinstance(made, tuple) else (made, None)
            data = [{"x": sample, "label": -1 if labels is None else int(labels[i])} for i, sample in enumerate(x)]
        self.data = data
        if not len(data):
            raise UsageError("--features self: the data has no sample: pass data with at least one file")
        self.shape = tuple(self.item(0)[0].shape)
        self.is_image = len(self.shape) == 3
        if len(self.shape) not in (3, 4) or self.shape[0] not in (1, 3):
            raise UsageError(
                f"--features self takes images or clips with 1 or 3 channels, not samples of shape {self.shape}: use "
                "other data"
            )

    def __len__(self) -> int:
        return len(self.data)

    def item(self, index: int) -> tuple[Tensor, int]:
        """Return sample `index` as uint8, and its label or -1."""
        draw = getattr(self.data, "draw", None)
        item = draw(index, 0) if draw else self.data[index]
        item = item if isinstance(item, dict) else {"x": item[0] if isinstance(item, tuple) else item}
        x = torch.as_tensor(item["x"])
        x = x if x.dtype == torch.uint8 else (x.float() * 255).round().clamp(0, 255).to(torch.uint8)
        return x, int(item.get("label", -1))

    def numbers(self, most: int) -> list[int]:
        """Return the numbers of up to `most` samples, evenly spaced."""
        return np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(int).tolist()

    def digest(self) -> str:
        """Return a digest of the number of samples, and of the pixels and labels of some of them."""
        total = hashlib.sha256(f"{len(self)} {self.shape}".encode())
        for index in self.numbers(PROBED):
            x, label = self.item(index)
            total.update(f"{label} {tuple(x.shape)}".encode())
            total.update(x.contiguous().numpy().tobytes())
        return f"sha256:{total.hexdigest()}"

    def read(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Read up to 512 samples as clips (N, 3, F, H, W), uint8 of `size`, and their labels (N,)."""
        numbers = self.numbers(SAMPLES)
        samples, labels = [], []
        with progress_bar(len(numbers), "reading for the extractor", "sample", delay=2) as bar:
            for index in numbers:
                x, label = self.item(index)
                x = x[:, None] if self.is_image else x
                if tuple(x.shape[:-2]) != (self.shape[0], *(self.shape[1:-2] or (1,))):
                    raise UsageError(
                        f"--features self: sample {index} has shape {tuple(x.shape)}, the first {self.shape}: use data "
                        "of one size"
                    )
                frames = resize(x.transpose(0, 1).expand(-1, 3, -1, -1), size).round().clamp(0, 255)
                samples.append(frames.transpose(0, 1).to(torch.uint8))
                labels.append(label)
                bar.update()
        return torch.stack(samples), torch.tensor(labels)

    def folder(self) -> Path | None:
        """Return the folder of the data, or None if it has none or files cannot be written to it."""
        root = getattr(self.data, "root", None)
        path = Path(root) if isinstance(root, str | os.PathLike) else None
        return path if path is not None and path.is_dir() and os.access(path, os.W_OK) else None


def fit_size(size: Iterable[int]) -> tuple[int, int]:
    """Return the size (H, W) with at most 48 pixels on the longer side."""
    H, W = size
    scale = min(1.0, SIZE / max(H, W))
    return max(round(H * scale), 1), max(round(W * scale), 1)


def cached(
    source: Source, settings: dict[str, Any], request: Request, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and results of the training from the cache; without it, train and write it."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    name = f".rin-video-self-{key}.safetensors"
    places = [place for place in (source.folder(), request.cache) if place is not None]
    for place in places:
        if (found := read_cache(place / name)) is not None:
            return found
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / f".rin-video-self-{key}.lock"):  # one process trains, and the others read
                if (found := read_cache(place / name)) is None:
                    found = train(source, settings, device)
                    write_cache(place / name, *found)
                return found
    log.warning("the extractor self cannot be cached: no folder to write to. It is trained again the next time.")
    return train(source, settings, device)


def read_cache(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the weights and results of a file, or None if it does not exist or is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        if metadata[DIGEST] == tensors_digest(weights):
            return weights, json.loads(metadata["results"])
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    log.warning("%s is damaged: the extractor self is trained again", path)
    return None


def write_cache(path: Path, weights: dict[str, Tensor], results: dict[str, Any]) -> None:
    """Write the weights and results of a training."""
    with atomic_write(path, unique=True) as temporary:
        write_tensors(temporary, weights, {"results": json.dumps(results)}, digest=True)


def train(source: Source, settings: dict[str, Any], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the network; return its weights and how well it solves the tasks. No global generator is used."""
    samples, labels = source.read((settings["size"][0], settings["size"][1]))
    classes = labels.unique()
    numbers = torch.searchsorted(classes, labels)
    num_classes = len(classes) if len(classes) > 1 and int(classes.min()) >= 0 else 0
    tasks, rng = settings["tasks"], np.random.default_rng(SEED)
    with torch.inference_mode(False), torch.enable_grad(), exact_math(device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = SelfNetwork(len(tasks), num_classes).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS, cycle_momentum=False)
        scores: list[list[float]] = []
        with progress_bar(STEPS, "training the extractor", "step", delay=2) as bar:
            for _ in range(STEPS):
                chosen = rng.choice(len(samples), min(BATCH, len(samples)), replace=False)
                chosen = np.tile(chosen, WINDOWS)
                asked = rng.permuted(np.tile(np.arange(len(tasks)), (len(chosen) // WINDOWS, 1)), axis=1)[:, :WINDOWS]
                asked = asked.T.reshape(-1)  # each sample is shown with different tasks
                x = torch.stack([pose(samples[i], tasks[task], rng) for i, task in zip(chosen, asked, strict=True)])
                answers = torch.from_numpy(asked).to(device)
                loss, correct = step_loss(network, x.to(device), answers, numbers[chosen].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                scores.append([float(loss.detach()), *correct])
                bar.set_postfix_str(f"loss {scores[-1][0]:.3g}")
                bar.update()
    last = np.mean(scores[-50:], axis=0)
    results = {"classes": num_classes, "loss": round(float(last[0]), 4), "task_accuracy": round(float(last[1]), 4)}
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}, results


def pose(sample: Tensor, task: str, rng: np.random.Generator) -> Tensor:
    """Return a uint8 sample (3, F, H, W) as the task shows it: (3, f, H, W)."""
    if sample.shape[1] == 1:
        return changed(task, sample[:, 0])[:, None]
    return sample[:, reordered(task, sample.shape[1], rng)]


def step_loss(network: SelfNetwork, x: Tensor, answers: Tensor, classes: Tensor) -> tuple[Tensor, list[float]]:
    """Return the loss of uint8 windows (B, 3, f, H, W), whose second half shows the samples of the first half again.

    It is the sum of the cross entropies of the task, of which window shows the same sample (InfoNCE, van den Oord et
    al. 2018), and of the class. Also returns the share of tasks that are solved.
    """
    y = network(x.float() / 127.5 - 1)
    logits = network.task(y)
    first, second = F.normalize(network.match(y), dim=1).chunk(2)
    num = len(x) // WINDOWS
    same = torch.arange(num, device=x.device)
    loss = F.cross_entropy(logits, answers)
    for one, two in zip(first.split(num), second.split(num), strict=True):
        loss = loss + F.cross_entropy(one @ two.T / TEMPERATURE, same) / (WINDOWS // 2)
    if network.label is not None:
        loss = loss + F.cross_entropy(network.label(y), classes)
    return loss, [float((logits.argmax(1) == answers).float().mean())]
