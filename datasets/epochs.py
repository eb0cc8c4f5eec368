"""In which order samples are drawn: a function of the seed and the position alone, so that a run can stop anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


class SampleDataset(Dataset[dict[str, Any]]):
    """A dataset of samples as training takes them: {"x": (C, *grid), "label": number or -1}, perhaps "embedding".

    `draw(index, epoch)` gives the item as that epoch sees it: its clip, crop and augmentation follow from the two.
    """


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of draws (epoch, index) without end; every epoch is a permutation made from (seed, epoch).

    Batch k of rank r takes the positions that follow those of rank r - 1, so that all ranks together walk through the
    data once an epoch. Starting at `first_batch` gives what a run from the beginning would have come to.
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
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.length, generator=generator).tolist()


class EpochDataset(Dataset[Any]):
    """A dataset that is asked for (epoch, index), in whatever process.

    Ours have `draw(index, epoch)`; any other gives `dataset[index]`.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        draw = getattr(self.dataset, "draw", None)
        return draw(index, epoch) if draw else self.dataset[index]
