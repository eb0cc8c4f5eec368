"""A folder and a model's shape to the dataset that fits."""

from __future__ import annotations

import os
from typing import Any

from rin_video.config import DataConfig
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.images import ImageFolder
from rin_video.errors import UsageError


def open_dataset(
    path: str | os.PathLike[str], shape: tuple[int, ...] | None, options: DataConfig, *, seed: int = 0
) -> ImageFolder | ClipFolder:
    """Images (C, H, W) or clips (C, F, H, W), by the rank of `shape`. Raises `UsageError` for other ranks."""
    if shape is None or len(shape) not in (3, 4):
        raise UsageError(f"a folder holds images or clips, the model takes {shape}: give the Trainer a Dataset instead")
    channels, *frames, height, width = shape
    common: dict[str, Any] = {
        "channels": channels,
        "augment_horizontal_flip": options.augment_horizontal_flip,
        "crop": options.crop,
        "seed": seed,
    }
    if not frames:
        return ImageFolder(path, (height, width), **common)
    return ClipFolder(
        path, (height, width), frames[0], stride=options.stride, fps=options.fps, decoder=options.decoder, **common
    )
