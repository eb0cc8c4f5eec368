"""The extractor "self": a small network that is trained on the user's own data, once, and cached beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rin_video.errors import UsageError
from rin_video.features.base import EXTRACTORS, Extractor, Request, as_pictures, refuse_argument
from rin_video.features.pictures import resize
from rin_video.features.self_alterations import ALTERATIONS
from rin_video.features.self_data import SAMPLES, Source
from rin_video.features.self_network import FEATURES, SelfNetwork
from rin_video.features.self_tasks import CHANGES, ORDERS
from rin_video.features.self_training import BATCH, SEED, STEPS, WINDOWS, train
from rin_video.files import atomic_write
from rin_video.tensor_files import DIGEST, tensors_digest, write_tensors

log = logging.getLogger("rin_video")

VERSION = 5  # of the network and its training: a change retrains
SIZE = 64  # pixels of the longer side that the network sees at most


@EXTRACTORS.register("self")
class SelfTrained(Extractor):
    """A network that is trained on the user's own clips or images, on one core in about two minutes.

    Its tasks for clips are the order and speed of the frames (`ORDERS`), how the pictures were altered (`ALTERATIONS`),
    which windows belong to one clip, and the class if the data has labels; for images `CHANGES` take the place of the
    order. Distances compare only between
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
        settings: dict[str, Any] = {
            "version": VERSION,
            "size": list(self.size),
            "tasks": list(CHANGES if source.is_image else ORDERS),
            "alterations": list(ALTERATIONS),
            "data": source.digest(),
            "samples": min(len(source), SAMPLES),
            "steps": STEPS,
            "batch": [BATCH, WINDOWS],
            "seed": SEED,
        }
        weights, results = cached(source, settings, request, self.device)
        num_classes = results.get("classes", 0)
        with torch.random.fork_rng(devices=[]):
            network = SelfNetwork(len(settings["tasks"]), len(ALTERATIONS), num_classes)
        network.load_state_dict(weights)
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.digest = f"sha256:{tensors_digest(weights)}"
        self.protocol = {
            "network": "small network, trained on the data",
            "size": list(self.size),
            "resize": "bilinear, antialiased",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "layer": f"{FEATURES} principal directions of the last hidden layer, of variance 1 on the data",
            "frames": "all",
            "training": settings | results,
        }

    def extract(self, x: Tensor) -> dict[str, Tensor]:
        """Return the view "clip" or "image", (B, 16)."""
        if x.ndim == 4:
            return {"image": self.in_batches(self.encode, x[:, :, None])}
        return {"clip": self.in_batches(self.encode, x)}

    def encode(self, x: Tensor) -> Tensor:
        """Return the features of uint8 clips (B, 3, F, H, W)."""
        frames = resize(as_pictures(x), self.size).unflatten(0, (len(x), -1)).transpose(1, 2)
        return self.network.features(frames / 127.5 - 1)


def fit_size(size: Iterable[int]) -> tuple[int, int]:
    """Return the size (H, W) with at most 64 pixels on the longer side."""
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
