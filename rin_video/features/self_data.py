"""The data that the extractor "self" is trained on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.errors import UsageError
from rin_video.features.pictures import resize
from rin_video.progress import progress_bar

SAMPLES = 512  # samples that are read at most
PROBED = 16  # samples whose pixels identify the data


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
