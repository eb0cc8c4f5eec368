"""Batches without end, whatever the files do to the processes that read them.

A file that cannot be read after all, one that kills its worker and one that hangs are left out from then on: a
neighbour takes the place of each, the loss is counted and said, and the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rin_video.config import DataConfig
from rin_video.datasets.draws import Draws
from rin_video.datasets.mixture import make_sampler
from rin_video.datasets.sources import shown
from rin_video.errors import DatasetError, UsageError, in_one_line

log = logging.getLogger("rin_video")


class SafeDraws(Dataset[Any]):
    """`Draws` that remembers in shared memory what each worker is at, and draws a neighbour of what is bad."""

    def __init__(self, dataset: Dataset[Any], slots: int) -> None:
        self.draws, self.length = Draws(dataset), len(dataset)  # type: ignore[arg-type]
        self.bad = torch.zeros(self.length, dtype=torch.uint8).share_memory_()
        self.at = torch.full((max(slots, 1),), -1, dtype=torch.int64).share_memory_()  # index being read
        self.since = torch.zeros(max(slots, 1), dtype=torch.float64).share_memory_()
        self.bucket_of: Sequence[int] | None = getattr(dataset, "bucket_of", None)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        worker = get_worker_info()
        slot = worker.id if worker else 0
        for candidate in self._neighbours(index):
            if self.bad[candidate]:
                continue
            self.since[slot] = time.monotonic()
            self.at[slot] = candidate
            try:
                return self.draws[epoch, candidate]
            except DatasetError:
                raise
            except UsageError as error:
                self.bad[candidate] = 1
                log.warning("left out from now on: %s", error)
            finally:
                self.at[slot] = -1
        raise UsageError(f"not one of {self.length} samples can be read any more: look at the warnings above")

    def _neighbours(self, index: int) -> Iterator[int]:
        """The index itself, then those behind it, of the same bucket."""
        for step in range(self.length):
            candidate = (index + step) % self.length
            if self.bucket_of is None or self.bucket_of[candidate] == self.bucket_of[index]:
                yield candidate


class Batches:
    """An endless iterator over batches, from `first_batch` on. What they hold follows from the seed and their number.

    The `group` batches of one optimizer step are of one kind of data.
    Raises UsageError once more than `options.max_failures` samples had to be left out.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        options: DataConfig,
        batch_size: int,
        *,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        group: int = 1,
        pin_memory: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> None:
        self.dataset, self.options = dataset, options
        self.draws = SafeDraws(dataset, options.num_workers)
        self.batch_size, self.seed, self.next_batch = batch_size, seed, first_batch
        self.rank, self.num_ranks, self.group, self.pin_memory = rank, num_ranks, group, pin_memory
        self.worker_init_fn = worker_init_fn
        self.crashes = 0
        self._batches = self._start()

    @property
    def num_bad(self) -> int:
        """How many samples are left out."""
        return int(self.draws.bad.sum())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            try:
                batch = next(self._batches)
            except UsageError as error:
                raise in_one_line(error) from None
            except RuntimeError as error:  # what torch raises for a worker that died or went silent
                if not self.options.num_workers or not _lost_worker(error):
                    raise
                self._replace_workers(error)
                continue
            if self.num_bad > self.options.max_failures:
                raise UsageError(
                    f"{self.num_bad} samples could not be read, data.max_failures is {self.options.max_failures}: "
                    "look at the warnings above"
                )
            self.next_batch += 1
            return batch

    def close(self) -> None:
        """End the workers."""
        self._batches = iter(())

    def _start(self) -> Iterator[Any]:
        where: dict[str, Any] = {
            "seed": self.seed,
            "first_batch": self.next_batch,
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "group": self.group,
        }
        workers = self.options.num_workers
        return iter(
            DataLoader(
                self.draws,
                batch_sampler=make_sampler(self.dataset, self.batch_size, **where),
                num_workers=workers,
                worker_init_fn=self.worker_init_fn,
                pin_memory=self.pin_memory,
                # A batch may hold many slow files: the limit for each is kept in `_replace_workers`.
                timeout=self.options.read_timeout if workers else 0,
                prefetch_factor=self.options.prefetch if workers else None,
            )
        )

    def _replace_workers(self, error: RuntimeError) -> None:
        """New workers from the batch that is due; what the lost ones were at is left out."""
        now, limit = time.monotonic(), self.options.read_timeout
        hung = "timed out" in str(error)
        active = [
            int(index)
            for index, since in zip(self.draws.at.tolist(), self.draws.since.tolist(), strict=True)
            if index >= 0 and (not hung or now - since > limit / 2)
        ]
        dead = self._dead_workers()
        guilty = (
            active
            if hung or not dead
            else [i for slot, i in enumerate(self.draws.at.tolist()) if slot in dead and i >= 0]
        )
        for index in guilty:
            self.draws.bad[index] = 1
            name = getattr(self.dataset, "name_of", str)(index)
            log.warning(
                "left out from now on: %s %s", shown(name), "hangs" if hung else "kills the process that reads it"
            )
        self.crashes += 1
        if self.crashes > self.options.max_failures:
            raise UsageError(f"processes that read data died or hung {self.crashes} times: {error}") from error
        old, self._batches = self._batches, iter(())
        if workers := getattr(old, "_workers", []):
            old._shutdown_workers()  # type: ignore[attr-defined]  # here and now: the traceback may keep it alive
        for worker in workers:
            if worker.is_alive():  # one that hangs, and may heed no signal but this
                worker.kill()
        self.draws.at.fill_(-1)
        self._batches = self._start()

    def _dead_workers(self) -> set[int]:
        workers = getattr(self._batches, "_workers", [])
        return {slot for slot, worker in enumerate(workers) if not worker.is_alive()}


def _lost_worker(error: RuntimeError) -> bool:
    text = str(error)
    return "DataLoader worker" in text or "DataLoader timed out" in text
