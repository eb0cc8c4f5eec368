"""The dataset of images in folders and shards."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from rin_video.config import DataConfig, data_config
from rin_video.datasets.buckets import Buckets
from rin_video.datasets.embeddings import open_embeddings
from rin_video.datasets.epochs import SampleDataset
from rin_video.datasets.folders import number_classes, relabel
from rin_video.datasets.index import describe_skipped, make_index
from rin_video.datasets.reading import PIL_MODES, read_image
from rin_video.datasets.resize_crop import ResizeCrop, SampleRNG, class_list, size_range, unaugmented
from rin_video.errors import UsageError
from rin_video.wording import counted

__all__ = ["ImageFolder", "read_image"]


class ImageFolder(SampleDataset):
    """A dataset of the images in a folder or in tar shards.

    Items are `{"x": uint8 (C, H, W), "label": class or -1}`, plus "embedding" (vectors, width) if configured. An image
    is resized until it just covers `image_size`, a number or (H, W), and then cropped. An item depends on (seed, epoch,
    index) alone. `index` is a file that caches the properties of the data between runs; the other options are the
    fields of `DataConfig`, passed by name or as one `config`. Raises `UsageError` if no image can be read.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        image_size: int | tuple[int, int],
        *,
        channels: int = 3,
        seed: int = 0,
        index: Path | None = None,
        config: DataConfig | None = None,
        **options: Any,
    ) -> None:
        if channels not in PIL_MODES:
            raise UsageError(f"images must have 1, 3 or 4 channels, not {channels}")
        self.config = config or data_config(**options)
        self.root, self.channels = Path(root), channels
        self.resize_crop = make_resize_crop(image_size, self.config)
        self.shape = (channels, *self.resize_crop.size)
        self.rng = SampleRNG(seed)
        self.index = make_index(root, "image", self.config, path=index, progress=True)
        self.index.require_some(self.config.strict)
        self.skipped = self.index.unusable
        entries = self.index.usable
        self.files, self.sizes = [entry.source for entry in entries], [entry.info.size for entry in entries]
        self.class_names = [entry.class_name for entry in entries]
        self.classes, self.labels = number_classes(self.class_names)
        self.embeddings = open_embeddings(entries, self.config, index)
        self.buckets = Buckets(self.config.buckets, rank=2)
        self.bucket_of = self.buckets.assign([(1, *size) for size in self.sizes])
        self.resize_crops = [make_resize_crop(shape, self.config) for shape in self.buckets.shapes] or [
            self.resize_crop
        ]

    def select(self, files: Sequence[int]) -> ImageFolder:
        """Return the dataset of some of the files, by number, with the classes and embeddings of the complete one."""
        part = copy.copy(self)
        part.rng = SampleRNG(self.seed)
        for name in ("files", "sizes", "class_names", "labels", "bucket_of"):
            values = getattr(self, name)
            setattr(part, name, [values[file] for file in files])
        part.embeddings = self.embeddings and self.embeddings.select(files)
        return part

    def without_augmentation(self) -> ImageFolder:
        """Return the dataset with centre crops and without random changes."""
        part = copy.copy(self)
        part.rng, part.config = SampleRNG(self.seed), unaugmented(self.config)
        part.resize_crops = [make_resize_crop(crop.size, part.config) for crop in self.resize_crops]
        part.resize_crop = make_resize_crop(self.resize_crop.size, part.config)
        return part

    def use_classes(self, classes: list[str]) -> None:
        """Number the classes as in other data, `classes`; files without class get label -1."""
        self.classes, self.labels = classes, relabel(self.class_names, classes)

    @property
    def seed(self) -> int:
        """The seed of the random numbers."""
        return self.rng.seed

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of `dataset[index]`, in all workers."""
        self.rng.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.draw(index, self.rng.epoch)

    def draw(self, index: int, epoch: int) -> dict[str, Tensor | int]:
        """Return item `index` of an epoch. Raises `UsageError` if the file cannot be read."""
        index = range(len(self))[index]
        resize_crop = self.resize_crops[self.bucket_of[index]]
        can_reduce = resize_crop.scales == (1.0, 1.0)  # a small crop needs the full resolution
        image = read_image(
            self.files[index],
            self.channels,
            at_least=resize_crop.size if can_reduce else None,
            max_pixels=self.config.max_pixels,
        )
        x = resize_crop(image, self.rng.draw(index, epoch))
        item: dict[str, Tensor | int] = {"x": x, "label": self.labels[index]}
        return item if self.embeddings is None else {**item, "embedding": self.embeddings[index]}

    def name_of(self, index: int) -> str:
        """Return the name of the item's file."""
        return str(self.files[index])

    def group_of(self, index: int) -> int:
        """Return the number of the item's file."""
        return range(len(self))[index]

    def describe(self) -> str:
        """Return a summary in a few lines: files, classes, sizes, enlarged images, skipped files."""
        lines = [f"{counted(len(self), 'image')}, {size_range(self.sizes)}{class_list(self.classes)}"]
        lines += [self.embeddings.describe()] if self.embeddings else []
        lines += self.buckets.describe(self.bucket_of)
        lines += self.resize_crop.describe_enlarged(self.sizes) + describe_skipped(self.skipped)
        notes = Counter(note for entry in self.index.usable for note in entry.info.notes)
        lines += [f"{count} of {len(self)}: {note}" for note, count in notes.most_common(3)]
        return "\n".join(lines + self.index.describe_ignored())


def make_resize_crop(size: Any, options: DataConfig) -> ResizeCrop:
    """Build the resize-crop transform to `size` (a number or (H, W)) with the options of the data."""
    return ResizeCrop(
        size,
        crop=options.crop,
        flip=options.augment_horizontal_flip,
        crop_scale=options.crop_scale,
        color=options.augment_color,
    )
