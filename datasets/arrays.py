"""The dataset of arrays, for any modality: .npy and .safetensors files with one sample or many."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rin_video.config import DataConfig, data_config
from rin_video.datasets.array_files import ArrayInfo, read_array, sample_shape
from rin_video.datasets.epochs import SampleDataset
from rin_video.datasets.sources import Source, shown
from rin_video.errors import UsageError
from rin_video.wording import counted


class ArrayFolder(SampleDataset):
    """A dataset of the arrays in a folder, a file or tar shards.

    Items are `{"x": uint8 or float32 (C, *grid), "label": class or -1}`. A file contains one sample (C, *grid) or many
    (N, C, *grid), uint8 or floats in [0, 1]; only the requested sample is read. `index` is a file that caches the
    properties of the data between runs; the other options are the fields of `DataConfig`, passed by name or as one
    `config`. Raises `UsageError` if no file has samples of that `shape`, and when an item is drawn with values outside
    [0, 1].
    """

    def __init__(
        self,
        root: str | PathLike[str],
        shape: Sequence[int],
        *,
        index: Path | None = None,
        config: DataConfig | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        from rin_video.datasets.folders import number_classes
        from rin_video.datasets.index import make_index, refuse_skipped

        self.root, self.shape, self.seed = root, tuple(shape), seed
        config = config or data_config(**options)
        found = make_index(root, "array", config, path=index, progress=True)
        self.skipped = found.unusable
        self.files: list[Source] = []
        self.infos: list[ArrayInfo] = []
        self.class_names: list[str | None] = []  # of each sample
        self.places: list[tuple[int, int | None]] = []  # which file, which sample in it
        for entry in found.usable:
            count = self._num_samples(entry.info)
            if count == 0:
                self.skipped.append((entry.source, self._misfit(entry.source, entry.info)))
                continue
            self.places += [(len(self.files), None if count is None else i) for i in range(count or 1)]
            self.class_names += [entry.class_name] * (count or 1)
            self.files.append(entry.source)
            self.infos.append(entry.info)
        refuse_skipped(len(self.files), self.skipped, config.strict)
        self.classes, self.labels = number_classes(self.class_names)

    def keys(self) -> list[str]:
        """Return the name of each sample by which its side is chosen: that of its file, and its row if it has many."""
        from rin_video.datasets.held_out import file_keys

        keys = file_keys(self.root, self.files)
        return [keys[file] if row is None else f"{keys[file]}[{row}]" for file, row in self.places]

    def select(self, samples: Sequence[int]) -> ArrayFolder:
        """Return the dataset of some of the samples, by number, with the classes of the complete one."""
        part = copy.copy(self)
        part.places = [self.places[i] for i in samples]
        part.class_names, part.labels = [self.class_names[i] for i in samples], [self.labels[i] for i in samples]
        return part

    def use_classes(self, classes: list[str]) -> None:
        """Number the classes as in other data, `classes`; samples without class get label -1."""
        from rin_video.datasets.folders import relabel

        self.classes, self.labels = classes, relabel(self.class_names, classes)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        index = range(len(self))[index]
        file, place = self.places[index]
        x = read_array(self.files[file], self.infos[file], place)
        if x.dtype != torch.uint8:
            x = x.float()
            low, high = x.aminmax()
            if not (low >= 0 and high <= 1):  # false for NaN too
                raise UsageError(f"{shown(self.files[file])} has values from {low:g} to {high:g}: scale them to [0, 1]")
        return {"x": x, "label": self.labels[index]}

    def name_of(self, index: int) -> str:
        """Return the name of the item's file, and its row if the file has many."""
        file, place = self.places[index]
        return f"{self.files[file]}" + (f" [{place}]" if place is not None else "")

    def group_of(self, index: int) -> int:
        """Return the number of the item: the rows of a file are separate samples."""
        return range(len(self))[index]

    def describe(self) -> str:
        """Return a summary in a few lines: arrays, shape, dtypes, classes, skipped files."""
        from rin_video.datasets.index import describe_skipped
        from rin_video.datasets.resize_crop import class_list

        size = "x".join(map(str, self.shape))
        kinds = ", ".join(sorted({info.dtype for info in self.infos}))
        num_files = len({file for file, _ in self.places})
        lines = [
            f"{counted(len(self), 'array')} of shape {size} ({kinds}) in {counted(num_files, 'file')}"
            f"{class_list(self.classes)}"
        ]
        return "\n".join(lines + describe_skipped(self.skipped))

    def _num_samples(self, info: ArrayInfo) -> int | None:
        """Return the number of samples in a file: None if the file is one sample, 0 if its shape does not fit."""
        if info.shape == self.shape:
            return None
        return info.shape[0] if info.shape[1:] == self.shape else 0

    def _misfit(self, source: Source, info: ArrayInfo) -> str:
        wanted = ", ".join(map(str, self.shape))
        text = f"{shown(source)} has shape {info.shape}, but the model takes ({wanted}) or (N, {wanted})"
        shape = sample_shape(info)
        if shape is not None:
            channels, *frames, H, W = shape
            return f"{text}: train on it with model.channels={channels} --frames {[*frames, 0][0]} --size {H}x{W}"
        if len(info.shape) in (4, 5) and info.shape[-1] in (1, 3):
            return f"{text}: move the channels first, np.moveaxis(x, -1, 1)"
        if len(info.shape) == 3 and len(self.shape) in (3, 4) and self.shape[0] in (1, 3):  # images or clips
            return f"{text}: add an axis of channels, x[:, None]"
        return text
