"""Several shapes in one run: every file goes where it loses least, and every batch is of one shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch.utils.data import Sampler

from rin_video.errors import UsageError


class Buckets:
    """Shapes as text, `48x80` (H, W) or `16x48x80` (F, H, W), and which of them suits a file. None: one shape."""

    def __init__(self, shapes: Sequence[str], rank: int) -> None:
        self.shapes = [_parse(text, rank) for text in shapes]

    def assign(self, sizes: Sequence[tuple[int, int, int]]) -> list[int]:
        """For every file, given (frames that it has to spare, H, W), the bucket.

        The nearest aspect ratio first, then the longest that the file can fill, then the nearest area.
        """
        return [self._best(size) if self.shapes else 0 for size in sizes]

    def describe(self, chosen: Sequence[int]) -> list[str]:
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
    """Batches of draws (epoch, index) without end, each of one bucket; what batch k holds follows from (seed, k) alone.

    In an epoch every draw comes once, but for the last batch of a bucket, which is filled up from its first. All ranks
    get batches of the same bucket at the same time.
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
        whole = batch_size * num_ranks
        self.batches_per_epoch = sum(-(-len(members) // whole) for members in self.members.values())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batches = -1, []
        for batch in count(self.first_batch):
            if batch // self.batches_per_epoch != epoch:
                epoch = batch // self.batches_per_epoch
                batches = self.epoch(epoch)
            start = self.rank * self.batch_size  # consecutive rows, as their noise and their names have it
            mine = batches[batch % self.batches_per_epoch][start : start + self.batch_size]
            yield [(epoch, index) for index in mine]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of all ranks together, in their order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        whole = self.batch_size * self.num_ranks
        batches = []
        for _, members in sorted(self.members.items()):
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            while len(order) % whole:
                order += order[: whole - len(order) % whole]
            batches += [order[i : i + whole] for i in range(0, len(order), whole)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _parse(text: str, rank: int) -> tuple[int, ...]:
    parts = str(text).split("x")
    if len(parts) != rank or not all(part.isdecimal() and int(part) for part in parts):
        form = "16x48x80 (frames, height, width)" if rank == 3 else "48x80 (height, width)"
        raise UsageError(f"data.buckets has {text}: write {form}")
    return tuple(int(part) for part in parts)
