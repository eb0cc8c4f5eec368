"""An endless iterator over batches that survives the loss of its workers.

A sample that raises `UsageError`, kills its worker or hangs is excluded from then on: a warning names it, a neighbour
replaces it, and the run continues. Any other error ends the run and names the sample.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import active_children
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rin_video.config import DataConfig
from rin_video.datasets.batch import Batch
from rin_video.datasets.fault_tolerance import (
    IDLE,
    STARTING,
    Failure,
    FaultTolerantDataset,
    enough_shared_memory,
    shared_memory_error,
)
from rin_video.datasets.mixed import make_sampler
from rin_video.datasets.probing import SECONDS_TO_START, did_not_start, end_with_parent, how_it_ended
from rin_video.errors import UsageError

log = logging.getLogger("rin_video")

SECONDS_BETWEEN_LOOKS = 0.25  # interval of checks of the workers while no batch arrives
SECONDS_BETWEEN_REPORTS = 30.0  # interval of reports about what the workers are reading
SECONDS_TO_END = 3.0  # grace period before workers are killed
SIGCHLD, SIGBUS = getattr(signal, "SIGCHLD", None), getattr(signal, "SIGBUS", None)  # None: Windows


class TrainLoader:
    """An endless iterator over batches, starting at `first_batch`; seed and number determine the content of a batch.

    The `group` batches of one optimizer step contain one kind of data. As a context manager it ends its workers after
    the block.

    A worker that dies, or reads one sample for longer than `options.read_timeout` seconds, is replaced when the next
    batch is requested; its death raises no error before. Raises `UsageError` if more than `options.max_failures`
    samples were excluded or workers lost, and immediately if the dataset raises another error or shared memory is too
    small.
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
        self.draws = FaultTolerantDataset(dataset, options.num_workers)
        self.batch_size, self.seed, self.next_batch = batch_size, seed, first_batch
        self.rank, self.num_ranks, self.group, self.pin_memory = rank, num_ranks, group, pin_memory
        self.worker_init_fn = worker_init_fn
        self.crashes = 0
        self.workers: list[Any] = []
        self._reported = 0.0
        self.indices: list[int] = []  # of the samples in the last batch, with replacements
        self._quiet: _Quiet | None = None
        # If the loader is not closed, multiprocessing sends workers a SIGTERM at exit, which they ignore, and joins
        # them.
        self._kill = weakref.finalize(self, _kill, self.workers, os.getpid())
        atexit.register(self._kill)
        self._batches = self._start()

    @property
    def num_bad(self) -> int:
        """The number of excluded samples."""
        return int(self.draws.bad.sum())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.monotonic()
        while True:
            try:
                batch = next(self._batches)
                break
            except Exception as error:  # with workers, an error of torch; those of the dataset arrive as a Failure
                if not self.workers:
                    raise
                self._look_after_workers(error, start)
        if isinstance(batch, Failure):
            raise batch.error()
        self.indices, batch = batch
        if self.num_bad > self.options.max_failures:
            raise UsageError(
                f"{self.num_bad} samples could not be read, data.max_failures is {self.options.max_failures}: "
                "see the warnings above"
            )
        self.next_batch += 1
        return batch

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers within seconds, whatever they are doing."""
        try:
            self._end_workers()
        finally:
            self._kill()
            atexit.unregister(self._kill)
            if self._quiet:
                self._quiet.end()

    def _start(self) -> Iterator[Any]:
        where: dict[str, Any] = {
            "seed": self.seed,
            "first_batch": self.next_batch,
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "group": self.group,
        }
        workers = self.options.num_workers
        loader = DataLoader(
            self.draws,
            batch_size=None,  # an item of the dataset is a batch
            sampler=make_sampler(self.dataset, self.batch_size, **where),
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=partial(_init_worker, self.worker_init_fn),
            pin_memory=self.pin_memory,
            timeout=min(SECONDS_BETWEEN_LOOKS, self.options.read_timeout / 2) if workers else 0,
            prefetch_factor=self.options.prefetch if workers else None,
            # A generator of its own: replacing workers must not shift the random numbers of the training step.
            generator=torch.Generator().manual_seed(self.seed + self.next_batch),
        )
        if not workers:
            return iter(loader)
        self.draws.since.fill_(time.monotonic())
        self.draws.at.fill_(STARTING)
        before = active_children()
        try:
            with enough_shared_memory():
                batches = iter(loader)
        except BaseException:  # torch sends the started workers a SIGTERM, which they ignore
            _kill([child for child in active_children() if child not in before], os.getpid())
            raise
        # This and `_shutdown_workers` below are private: torch has no public access to its workers.
        self.workers += batches._workers  # type: ignore[attr-defined]
        if not (self._quiet and self._quiet.is_on()):
            self._quiet = _Quiet.begin()
        return batches

    def _look_after_workers(self, error: Exception, start: float) -> None:
        """Determine why no batch has arrived: replace lost workers, or return if it makes sense to wait longer."""
        timed_out = str(error).startswith("DataLoader timed out")  # torch has no class for it (pytorch pull 60725)
        if not timed_out:  # receiving a batch from a dying worker may fail before its death is visible
            wait([worker.sentinel for worker in self.workers], timeout=1.0)
        now, limit = time.monotonic(), self.options.read_timeout
        dead = {slot: worker.exitcode for slot, worker in enumerate(self.workers) if not worker.is_alive()}
        at, since = self.draws.at.tolist(), self.draws.since.tolist()  # `note` writes them in the opposite order
        reading = {slot: now - since[slot] for slot, index in enumerate(at) if index >= 0 and slot not in dead}
        hung = [slot for slot, seconds in reading.items() if seconds > limit]
        if dead or hung:
            self._replace_workers(at, dead, hung)
        elif not timed_out:
            with enough_shared_memory():
                raise error
        elif not reading and now - max(start, *since) > SECONDS_TO_START:
            if STARTING in at:
                raise did_not_start(None)
            raise UsageError(
                f"no batch has arrived for {now - start:.0f} s, although the workers have read it: see the messages "
                "above, or set data.num_workers=0 to read in this process"
            )
        elif now - max(start, self._reported) > SECONDS_BETWEEN_REPORTS:
            self._reported = now
            named = [f"{self.draws.name_of(at[slot])} for {seconds:.0f} s" for slot, seconds in reading.items()]
            log.warning("no batch for %.0f s; workers are reading: %s", now - start, ", ".join(named) or "nothing")

    def _replace_workers(self, at: Sequence[int], dead: Mapping[int, int], hung: Sequence[int]) -> None:
        """Start new workers at the next batch, and exclude the samples that the lost workers were reading."""
        for slot in sorted({*dead, *hung}):
            ended = how_it_ended(dead[slot]) if slot in dead else ""
            if at[slot] >= 0:
                what = f"kills the process that reads it ({ended})" if ended else "hangs"
                if not self.draws.bad[at[slot]]:  # two workers may have been reading it
                    log.warning("excluded from now on: %s %s", self.draws.name_of(at[slot]), what)
                self.draws.bad[at[slot]] = 1
            elif SIGBUS and dead[slot] == -SIGBUS:
                raise shared_memory_error()
            elif at[slot] == STARTING and dead[slot] >= 0:
                raise did_not_start(dead[slot])
            else:
                log.warning("an idle worker died (%s) and is replaced", ended)
        self.crashes += 1
        if self.crashes > self.options.max_failures:
            raise UsageError(
                f"data workers died or hung {self.crashes} times, data.max_failures is "
                f"{self.options.max_failures}: see the warnings above"
            )
        for slot in hung:
            self.workers[slot].kill()
        self._end_workers()
        self._batches = self._start()

    def _end_workers(self) -> None:
        """Ask the workers to end, then kill those that do not within the grace period."""
        batches, self._batches = self._batches, iter(())
        if not self.workers:
            return
        try:
            # torch only calls this when the iterator is collected, which a traceback delays, and waits for hung
            # workers.
            ending = threading.Thread(target=batches._shutdown_workers, daemon=True)  # type: ignore[attr-defined]
            ending.start()
            ending.join(SECONDS_TO_END)
        finally:
            _kill(self.workers, os.getpid())


class _Quiet:
    """A handler of SIGCHLD that calls the previous one and suppresses its RuntimeErrors.

    When a worker dies, torch's handler raises wherever the main thread is, even within a training step. `TrainLoader`
    detects the death itself when it waits for a batch.
    """

    def __init__(self, previous: Callable[[int, Any], Any]) -> None:
        self.previous = previous

    @classmethod
    def begin(cls) -> _Quiet | None:
        previous = signal.getsignal(SIGCHLD) if SIGCHLD and _in_main_thread() else None
        if SIGCHLD is None or not callable(previous):
            return None
        quiet = cls(previous)
        signal.signal(SIGCHLD, quiet)
        return quiet

    def is_on(self) -> bool:
        return SIGCHLD is not None and signal.getsignal(SIGCHLD) is self

    def end(self) -> None:
        """Restore the previous handler, unless another one has been installed since."""
        if SIGCHLD and self.is_on() and _in_main_thread():
            signal.signal(SIGCHLD, self.previous)

    def __call__(self, number: int, frame: Any) -> None:
        with suppress(RuntimeError):
            self.previous(number, frame)


def _init_worker(also: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a worker."""
    gc.freeze()  # do not collect inherited objects: their cleanup may wait for threads that a fork does not copy
    end_with_parent()
    if also:
        also(worker)
    info = get_worker_info()
    assert info is not None
    info.dataset.note(IDLE)  # type: ignore[attr-defined]


def _kill(workers: list[Any], owner: int) -> None:
    if os.getpid() == owner:  # a forked process has copies of the handles
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
    workers.clear()


def _unchanged(batch: Any) -> Any:
    return batch


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
