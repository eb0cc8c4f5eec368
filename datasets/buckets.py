"""Buckets of several sample shapes: a file goes to the bucket that crops it least, and a batch has one shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch.utils.data import Sampler

from rin_video.errors import UsageError


class Buckets:
    """Sample shapes, and the assignment of files to them.

    `shapes` are texts such as `48x80` (H, W), or `16x48x80` (F, H, W) for `rank` 3; without any, all files share bucket
    0. Raises `UsageError` if a text cannot be parsed.
    """

    def __init__(self, shapes: Sequence[str], rank: int) -> None:
        self.shapes = [_parse(text, rank) for text in shapes]

    def assign(self, sizes: Sequence[tuple[int, int, int]]) -> list[int]:
        """Return the bucket of each file; `sizes` has (available frames, H, W) for each.

        Criteria, in this order: the nearest aspect ratio, the longest clip that the file can fill, the nearest area.
        """
        return [self._best(size) if self.shapes else 0 for size in sizes]

    def describe(self, chosen: Sequence[int]) -> list[str]:
        """Return a line per bucket with the number of its samples; `chosen` has the bucket of each sample."""
        counts = Counter(chosen)
        return [f"bucket {'x'.join(map(str, s))}: {counts[i]}" for i, s in enumerate(self.shapes)]

    def _best(self, size: tuple[int, int, int]) -> int:
        frames, height, width = size

        def loss(i: int) -> tuple[float, int, float]:
            F, H, W = (1, *self.shapes[i])[-3:]
            aspect = abs(math.log(H * width / (W * height)))
            return round(aspect, 3), -F, abs(math.log(H * W / (height * width)))

        return min((i for i, shape in enumerate(self.shapes) if (1, *shape)[-3] <= frames), key=loss)


class BucketSampler(Sampler[list[tuple[int, int]]]):
    """An endless sampler of batches of (epoch, index), each from one bucket; (seed, k) alone determines batch k.

    Each epoch visits every sample once; the last batch of a bucket is filled up with the first samples of its order.
    All ranks get batches of the same bucket at the same time.
    """

    def __init__(
        self,
        bucket_of: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.members: dict[int, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            self.members.setdefault(bucket, []).append(index)
        self.batch_size, self.seed, self.first_batch = batch_size, seed, first_batch
        self.rank, self.num_ranks = rank, num_ranks
        global_batch_size = batch_size * num_ranks
        self.batches_per_epoch = sum(-(-len(members) // global_batch_size) for members in self.members.values())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batches = -1, []
        for batch in count(self.first_batch):
            if batch // self.batches_per_epoch != epoch:
                epoch = batch // self.batches_per_epoch
                batches = self.epoch(epoch)
            start = self.rank * self.batch_size  # consecutive rows, to match the order of noise and names
            mine = batches[batch % self.batches_per_epoch][start : start + self.batch_size]
            yield [(epoch, index) for index in mine]

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the global batches of an epoch, in order, as lists of indices."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        global_batch_size = self.batch_size * self.num_ranks
        batches = []
        for _, members in sorted(self.members.items()):
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            while len(order) % global_batch_size:
                order += order[: global_batch_size - len(order) % global_batch_size]
            batches += [order[i : i + global_batch_size] for i in range(0, len(order), global_batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _parse(text: str, rank: int) -> tuple[int, ...]:
    parts = str(text).split("x")
    if len(parts) != rank or not all(part.isdecimal() and int(part) for part in parts):
        form = "16x48x80 (frames, height, width)" if rank == 3 else "48x80 (height, width)"
        raise UsageError(f"data.buckets has {text}: write {form}")
    return tuple(int(part) for part in parts)
