"""The order of samples, which depends on the seed and the position alone, so that a run can be resumed anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


class SampleDataset(Dataset[dict[str, Any]]):
    """The base class of datasets whose items are {"x": (C, *grid), "label": number or -1}, optionally "embedding".

    `draw(index, epoch)` returns an item of an epoch; (index, epoch) determines its clip, crop and augmentation.
    """

    def group_of(self, index: int) -> int:
        """Return the number of the file that contains the item; without files, each item is one of its own."""
        return index


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """An endless sampler of batches of (epoch, index); (seed, epoch) determines the permutation of each epoch.

    Batch k of rank r takes the positions after those of rank r - 1, so that all ranks together visit the data once per
    epoch. Starting at `first_batch` gives the same batches as a run from the beginning.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, first_batch: int = 0, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_batch, self.rank, self.num_ranks = first_batch, rank, num_ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, list[int]] = {}
        for batch in count(self.first_batch):
            start = (batch * self.num_ranks + self.rank) * self.batch_size
            draws = [divmod(position, self.length) for position in range(start, start + self.batch_size)]
            needed = {epoch for epoch, _ in draws}
            orders = {epoch: orders.get(epoch) or self.order(epoch) for epoch in needed}
            yield [(epoch, orders[epoch][place]) for epoch, place in draws]

    def order(self, epoch: int) -> list[int]:
        """Return the permutation of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.length, generator=generator).tolist()


class EpochDataset(Dataset[Any]):
    """A dataset that is indexed by (epoch, index), in any process.

    It calls `dataset.draw(index, epoch)`, or `dataset[index]` if the dataset has no `draw`.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        draw = getattr(self.dataset, "draw", None)
        return draw(index, epoch) if draw else self.dataset[index]


def name_of(dataset: Any, index: int) -> str:
    """Return the name of a sample: by the dataset's `name_of`, its `files`, or "sample N"."""
    own, files = getattr(dataset, "name_of", None), getattr(dataset, "files", None)
    return str(own(index) if own else files[index] if files else f"sample {index}")
