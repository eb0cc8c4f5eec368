"""Opening of a folder, shards, arrays or a hub dataset as the dataset that fits the shape of a model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from rin_video.config import DataConfig
from rin_video.datasets.arrays import ArrayFolder
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.folders import detect_kind
from rin_video.datasets.hub import HubDataset, is_hub
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.mixed import MixedDataset
from rin_video.errors import UsageError

INDEX = "index.jsonl"  # in the folder of a run

Opened: TypeAlias = ImageFolder | ClipFolder | ArrayFolder | HubDataset | MixedDataset


def open_dataset(
    path: str | os.PathLike[str],
    shape: tuple[int, ...] | None,
    options: DataConfig,
    *,
    seed: int = 0,
    index: Path | None = None,
) -> Opened:
    """Open data of the sample shape `shape`: images (C, H, W), clips (C, F, H, W), or arrays of any shape.

    With `options.images`, clips are mixed with images. `index` is a file that caches the properties of the data between
    runs. Raises `UsageError` if the data does not fit the shape or the options.
    """
    if options.images is not None:
        return _open_mixture(path, shape, options, seed, index)
    if shape is None:
        raise UsageError("the model has no fixed shape: pass the Trainer a Dataset instead")
    with_embeddings = options.embeddings or options.text_encoder is not None
    cache = index.parent / "pipes" if index else None
    arrays = not is_hub(path) and (len(shape) not in (3, 4) or holds_arrays(path, options, cache))
    if with_embeddings and (is_hub(path) or arrays):
        raise UsageError(f"{path}: embeddings and captions require folders or shards of clips or images")
    for name in ("image_column", "label_column"):
        if not is_hub(path) and getattr(options, name) is not None:
            raise UsageError(f"{path}: data.{name} requires a Hugging Face dataset, which this is not: leave it out")
    if is_hub(path):
        return HubDataset(path, shape, options, seed=seed)
    if arrays:
        return ArrayFolder(path, shape, index=index, config=options, seed=seed)
    channels, *frames, height, width = shape
    common: dict[str, Any] = {"channels": channels, "seed": seed, "index": index, "config": options}
    if not frames:
        return ImageFolder(path, (height, width), **common)
    return ClipFolder(path, (height, width), frames[0], **common)


def _open_mixture(
    path: str | os.PathLike[str], shape: tuple[int, ...] | None, options: DataConfig, seed: int, index: Path | None
) -> MixedDataset:
    assert options.images is not None
    if shape is None or len(shape) != 4:
        raise UsageError(
            f"data.images={options.images} is mixed with clips, but the model has shape {shape}: pass --frames, or "
            "pass the images alone as data"
        )
    alone = replace(options, images=None)
    clips = open_dataset(path, shape, alone, seed=seed, index=index)
    beside = index.with_name(f"images-{index.name}") if index else None
    still = replace(alone, buckets=[], fps=None, stride=1, span="window", avoid_cuts=False)
    images = open_dataset(options.images, (shape[0], *shape[2:]), still, seed=seed, index=beside)
    return MixedDataset(clips, images, options.image_ratio)


def holds_arrays(path: str | os.PathLike[str], options: DataConfig, cache: Path | None = None) -> bool:
    """Return whether the data consists of arrays only."""
    try:
        return detect_kind(path, allow_pipe=options.allow_pipe, cache=cache) == "array"
    except UsageError:
        return False
