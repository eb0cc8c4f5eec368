"""The sets of an evaluation: real samples, training samples and generated samples, all read by the loaders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rin_video.config import DataConfig
from rin_video.datasets.adapters import adapt
from rin_video.datasets.array_files import probe_array, sample_shape
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.epochs import EpochDataset, name_of
from rin_video.datasets.extensions import KINDS
from rin_video.datasets.folders import detect_kind, find_sources
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.open import open_dataset
from rin_video.datasets.probe import probe_video
from rin_video.datasets.reading import probe_image
from rin_video.datasets.resize_crop import unaugmented
from rin_video.datasets.sources import shown
from rin_video.errors import UsageError
from rin_video.media import as_pixels, sample_files
from rin_video.wording import counted


@dataclass(frozen=True)
class SampleSet:
    """Some samples of a dataset, in a fixed order and without augmentation."""

    dataset: Any
    indices: list[int]  # of the dataset
    name: str  # where the samples come from, for messages
    labels: np.ndarray  # (n,) class of each sample by its number in the classes of the data; -1: none

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, number: int) -> dict[str, Any]:
        """Return sample `number` of the set with its conditions. Raises `UsageError` if it cannot be read."""
        return EpochDataset(self.dataset)[0, self.indices[number]]

    def read(self, number: int) -> Tensor:
        """Return the pixels of sample `number` of the set: uint8 (C, *grid)."""
        return as_pixels(self.item(number)["x"])

    def file_of(self, number: int) -> str:
        """Return the name of the file of a sample."""
        return name_of(self.dataset, self.indices[number])

    def digest(self) -> str:
        """Return a digest of the files, the places in them, and the options of reading."""
        options = getattr(self.dataset, "config", None)
        reading = dataclasses.asdict(options) if isinstance(options, DataConfig) else {}
        about = [self.indices, [self.file_of(i) for i in range(len(self))], reading]
        return hashlib.blake2b(json.dumps(about, default=str).encode(), digest_size=16).hexdigest()

    def take(self, numbers: Sequence[int]) -> SampleSet:
        """Return the set of some of the samples."""
        return dataclasses.replace(
            self, indices=[self.indices[i] for i in numbers], labels=self.labels[np.array(numbers, dtype=int)]
        )

    @property
    def groups(self) -> np.ndarray:
        """The file of each sample as a number (n,): samples of one file are not independent."""
        group_of = getattr(self.dataset, "group_of", lambda index: index)
        return np.array([group_of(index) for index in self.indices], dtype=np.int64)

    @property
    def skipped(self) -> int:
        """The number of files that cannot be used."""
        return len(getattr(self.dataset, "skipped", ()))


def reading_options(options: DataConfig) -> DataConfig:
    """Return the options to read data for an evaluation: no augmentation, and all clips that fit into a file."""
    return dataclasses.replace(unaugmented(options), sampling="time", windows=1, buckets=[])


def choose(dataset: Any, num: int | None, name: str, classes: Sequence[str] = ()) -> SampleSet:
    """Choose `num` samples of a dataset, evenly spaced, or all of them if there are fewer or `num` is None."""
    count = len(dataset) if num is None else min(num, len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    return SampleSet(dataset, indices, name, labels_of(dataset, indices, classes))


def choose_others(chosen: SampleSet, num: int) -> SampleSet | None:
    """Choose up to `num` further samples of the dataset of a set, evenly spaced; None if there are no others."""
    left = sorted(set(range(len(chosen.dataset))) - set(chosen.indices))
    if not left:
        return None
    indices = [left[i] for i in np.linspace(0, len(left) - 1, min(num, len(left))).round().astype(int)]
    return SampleSet(chosen.dataset, indices, chosen.name, np.full(len(indices), -1))


def labels_of(dataset: Any, indices: Sequence[int], classes: Sequence[str]) -> np.ndarray:
    """Return the classes of samples as numbers in `classes`, -1 for none.

    The class of a sample is that of its folder, or the end of its file's name after a number (`0003-circle.mp4`), as
    `rin-video sample` writes it.
    """
    own, labels = list(getattr(dataset, "classes", [])), getattr(dataset, "labels", None)
    if not classes:
        return np.full(len(indices), -1)
    if own and labels is not None and len(labels) == len(dataset) and set(own) <= set(classes):
        numbers = [classes.index(name) for name in own]
        return np.array([numbers[labels[i]] if labels[i] >= 0 else -1 for i in indices])
    ends = {sample_files(Path(), 1, "", [name])[0].name.partition("-")[2]: i for i, name in enumerate(classes)}
    stems = [Path(re.sub(r" \[\d+\]$", "", name_of(dataset, index))).stem for index in indices]
    parts = [stem.partition("-") for stem in stems]
    return np.array([ends.get(name, -1) if number.isdecimal() else -1 for number, _, name in parts])


def open_samples(
    path: str | os.PathLike[str], shape: tuple[int, ...] | None, num: int | None, classes: Sequence[str] = ()
) -> SampleSet:
    """Open generated samples: a folder of clips, images or arrays, one array of many samples, or shards.

    The samples are read as they are: none is resized or cut. `shape` (C, *grid) is that of the model; None takes it
    from the first file. The first `num` samples are used. Raises `UsageError` if the samples differ in size or length,
    or if there are fewer than `num`.
    """
    shape = shape or first_shape(path)
    dataset = open_dataset(path, shape, DataConfig(strict=False))
    check_sizes(dataset, path, shape)
    if num is not None and num > len(dataset):
        raise UsageError(
            f"{shown(os.fspath(path))} has {len(dataset)} samples, not {num}: use --num {len(dataset)}, or draw more"
        )
    numbered = sorted(range(len(dataset)), key=lambda index: natural_key(name_of(dataset, index)))
    indices = numbered[:num]
    return SampleSet(dataset, indices, os.fspath(path), labels_of(dataset, indices, classes))


def natural_key(text: str) -> list[tuple[int, str]]:
    """Return a sort key by which `10.png` comes after `9.png`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def first_shape(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return the shape (C, *grid) of the first sample in a folder, a file or shards."""
    kind = detect_kind(path)
    first = find_sources(path, KINDS[kind])[0]
    if kind == "video":
        info = probe_video(first)
        return (3, info.num_frames, *info.size)
    if kind == "image":
        return (3, *probe_image(first).size)
    shape = sample_shape(probe_array(first))
    if shape is None:
        raise UsageError(
            f"{shown(first)} has shape {probe_array(first).shape}: samples are (C, H, W) or (C, F, H, W), or a batch "
            "of them, with 1 or 3 channels"
        )
    return shape


def check_sizes(dataset: Any, path: str | os.PathLike[str], shape: tuple[int, ...]) -> None:
    """Raise `UsageError` if a sample has another size or number of frames than `shape`, or cannot be read."""
    wanted = "x".join(map(str, shape[1:]))
    if dataset.skipped:
        (_, reason), *others = dataset.skipped
        more = f" ({counted(len(others), 'more file')} cannot be used)" if others else ""
        raise UsageError(f"{reason}{more}. All samples must be clips or images of {wanted}")
    if isinstance(dataset, ClipFolder):
        sizes = [(info.num_frames, *info.size) for info in dataset.infos]
    elif isinstance(dataset, ImageFolder):
        sizes = [tuple(size) for size in dataset.sizes]
    else:
        return  # arrays are never resized
    for file, size in zip(dataset.files, sizes, strict=True):
        if tuple(size) != tuple(shape[1:]):
            raise UsageError(
                f"{shown(file)} is {'x'.join(map(str, size))}, but the samples are {wanted}: all samples must have one "
                "size and length"
            )


def codec_of(samples: SampleSet) -> str:
    """Return the codec of samples: that of the video stream, the type of the images, or "none" for arrays."""
    dataset = samples.dataset
    if isinstance(dataset, ClipFolder):
        return "+".join(sorted({info.codec for info in dataset.infos}))
    if isinstance(dataset, ImageFolder):
        suffixes = {Path(str(file)).suffix.lower().lstrip(".") for file in dataset.files}
        return "+".join(sorted({"jpeg" if suffix == "jpg" else suffix for suffix in suffixes}))
    return "none"


def in_memory(samples: Tensor | np.ndarray, name: str) -> SampleSet:
    """Return samples (B, C, *grid) in memory, uint8 or in [0, 1], as a set."""
    pixels = as_pixels(samples)
    return SampleSet(adapt([{"x": x} for x in pixels]), list(range(len(pixels))), name, np.full(len(pixels), -1))


def is_picture_set(shape: tuple[int, ...]) -> bool:
    """Return whether samples (C, *grid) are images or clips with 1 or 3 channels."""
    return len(shape) in (3, 4) and shape[0] in (1, 3)
