"""Clips and images for a model with a tokenizer for each: a ratio determines which steps use images."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import Dataset, Sampler

from rin_video.config import DataConfig
from rin_video.datasets.adapters import adapt, check_label_number, draw, without_augmentation
from rin_video.datasets.buckets import BucketSampler
from rin_video.datasets.epochs import EpochSampler, SampleDataset
from rin_video.datasets.folders import sort_classes
from rin_video.errors import UsageError
from rin_video.wording import counted


class MixedDataset(SampleDataset):
    """The concatenation of a dataset of clips and one of images; a fraction `image_ratio` of the steps uses images.

    The classes are the union by name: folders `cats` of clips and of images are the same class. A part without classes
    gets no labels. Raises `UsageError` if the ratio is outside (0, 1).
    """

    def __init__(self, clips: Dataset[Any], images: Dataset[Any], image_ratio: float = DataConfig.image_ratio) -> None:
        if not 0 < image_ratio < 1:
            raise UsageError(f"image_ratio is {image_ratio:g}: the fraction of steps must be above 0 and below 1")
        clips, images = adapt(clips), adapt(images)
        self.clips, self.images, self.image_ratio = clips, images, image_ratio
        self.parts: tuple[Any, Any] = (clips, images)
        names = [list(getattr(part, "classes", [])) for part in self.parts]
        self.classes: list[str] = sort_classes({*names[0], *names[1]})
        self.renumber = [[self.classes.index(name) for name in part] for part in names]
        num_buckets = max(self._buckets(clips)) + 1
        self.bucket_of = self._buckets(clips) + [num_buckets + bucket for bucket in self._buckets(images)]

    def __len__(self) -> int:
        return len(self.parts[0]) + len(self.parts[1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(index, 0)

    def draw(self, index: int, epoch: int) -> dict[str, Any]:
        """Return item `index` of an epoch. Raises `DatasetError` if its label is not a class of its part."""
        which, place = self.place_of(index)
        item, numbers = draw(self.parts[which], place, epoch), self.renumber[which]
        if numbers:
            check_label_number(item["label"], len(numbers), self.parts[which].name_of)
        return {**item, "label": numbers[item["label"]] if numbers and item["label"] >= 0 else -1}

    def place_of(self, index: int) -> tuple[int, int]:
        """Return the part of an index, 0 (clips) or 1 (images), and the index in that part."""
        index = range(len(self))[index]
        return (0, index) if index < len(self.parts[0]) else (1, index - len(self.parts[0]))

    def without_augmentation(self) -> MixedDataset:
        """Return the dataset without random changes of its samples."""
        parts = [without_augmentation(part) for part in self.parts]
        plain = copy.copy(self)
        plain.clips, plain.images = plain.parts = (parts[0], parts[1])
        return plain

    def use_classes(self, classes: list[str]) -> None:
        """Number the classes as in other data, `classes`."""
        for part in self.parts:
            part.use_classes(classes if part.classes else [])
        self.classes, self.renumber = classes, [list(range(len(part.classes))) for part in self.parts]

    def group_of(self, index: int) -> int:
        """Return the number of the item's file; the files of images come after those of clips."""
        which, place = self.place_of(index)
        return which * len(self.clips) + int(self.parts[which].group_of(place))  # type: ignore[arg-type]

    def name_of(self, index: int) -> str:
        """Return the name of the item."""
        which, place = self.place_of(index)
        return getattr(self.parts[which], "name_of", lambda i: f"{('clip', 'image')[which]} {i}")(place)

    def describe(self) -> str:
        """Return a summary of both parts in a few lines."""
        lines = [getattr(part, "describe", lambda p=part: counted(len(p), "sample"))() for part in self.parts]
        lines.append(f"{self.image_ratio:.0%} of the steps use images")
        if self.classes and not all(self.renumber):
            lines.append(f"the {'images' if self.renumber[0] else 'clips'} have no classes and get no labels")
        return "\n".join(lines)

    @staticmethod
    def _buckets(part: Any) -> list[int]:
        return list(getattr(part, "bucket_of", None) or [0] * len(part))


class MixtureSampler(Sampler[list[tuple[int, int]]]):
    """An endless sampler of batches of (epoch, index), each of clips or of images; k alone determines batch k.

    The `group` batches of one optimizer step are of one kind. Step s uses images if floor((s + 1) * ratio) exceeds
    floor(s * ratio).
    """

    def __init__(
        self, mixture: MixedDataset, batch_size: int, *, group: int = 1, first_batch: int = 0, **where: Any
    ) -> None:
        self.mixture, self.batch_size, self.group = mixture, batch_size, group
        self.first_batch, self.where = first_batch, where

    def is_of_images(self, batch: int) -> bool:
        """Return whether a batch consists of images."""
        step, ratio = batch // self.group, self.mixture.image_ratio
        return math.floor((step + 1) * ratio) > math.floor(step * ratio)

    def images_before(self, batch: int) -> int:
        """Return the number of image batches before this batch."""
        complete_steps = math.floor(batch // self.group * self.mixture.image_ratio) * self.group
        return complete_steps + (batch % self.group if self.is_of_images(batch) else 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        done = self.images_before(self.first_batch)
        clips, images = (
            iter(make_sampler(part, self.batch_size, first_batch=first, **self.where))
            for part, first in zip(self.mixture.parts, (self.first_batch - done, done), strict=True)
        )
        offset = len(self.mixture.parts[0])
        for batch in count(self.first_batch):
            if self.is_of_images(batch):
                yield [(epoch, offset + index) for epoch, index in next(images)]
            else:
                yield next(clips)


def make_sampler(dataset: Any, batch_size: int, *, group: int = 1, **where: Any) -> Sampler[list[tuple[int, int]]]:
    """Build the sampler for a dataset; `where` has seed, first_batch, rank and num_ranks."""
    if isinstance(dataset, MixedDataset):
        return MixtureSampler(dataset, batch_size, group=group, **where)
    if getattr(getattr(dataset, "buckets", None), "shapes", ()):
        return BucketSampler(dataset.bucket_of, batch_size, **where)
    return EpochSampler(len(dataset), batch_size, **where)
