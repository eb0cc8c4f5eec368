"""The dataset that workers read: it assembles batches and replaces samples that cannot be read with neighbours."""

from __future__ import annotations

import errno
import logging
import pickle
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from rin_video.datasets.batch import Batch, collate
from rin_video.datasets.epochs import EpochDataset, name_of
from rin_video.datasets.sources import shown
from rin_video.errors import DatasetError, UsageError, first_line
from rin_video.wording import in_bytes

log = logging.getLogger("rin_video")

IDLE, STARTING = -1, -2  # states of a worker that is not reading a sample


class FaultTolerantDataset(Dataset[Any]):
    """A dataset whose items are batches: a list of (epoch, index) gives (indices, `Batch`).

    Records in shared memory which sample each worker is reading and since when, and substitutes a neighbour for samples
    that cannot be read. In a worker, an error that must end the run is returned as a `Failure` instead of the batch.
    """

    def __init__(self, dataset: Dataset[Any], num_workers: int) -> None:
        self.draws, self.length = EpochDataset(dataset), len(dataset)  # type: ignore[arg-type]
        self.bucket_of: Sequence[int] | None = getattr(dataset, "bucket_of", None)
        slots = max(num_workers, 1)
        self.bad = torch.zeros(self.length, dtype=torch.uint8)
        self.at = torch.full((slots,), STARTING, dtype=torch.int64)  # index being read
        self.since = torch.zeros(slots, dtype=torch.float64)  # seconds of the monotonic clock
        if num_workers:
            with enough_shared_memory():
                for shared in (self.bad, self.at, self.since):
                    shared.share_memory_()

    def __getitem__(self, places: Sequence[tuple[int, int]]) -> Any:
        try:
            found = [self._read(epoch, index) for epoch, index in places]
            self.note(IDLE)
            return [index for index, _ in found], self._collate(found)
        except UsageError as error:
            if get_worker_info() is None:
                raise
            return Failure(error)

    def name_of(self, index: int) -> str:
        """Return a sample's name on one line: its file, if the dataset has files."""
        return shown(name_of(self.draws.dataset, index))

    def note(self, at: int) -> None:
        """Record the sample that this process starts to read (an index), or its state (IDLE, STARTING)."""
        worker = get_worker_info()
        slot = worker.id if worker else 0
        self.since[slot] = time.monotonic()
        self.at[slot] = at

    def _read(self, epoch: int, index: int) -> tuple[int, Any]:
        """Return (index, sample) of the requested sample, or of the neighbour that replaces it."""
        for candidate in self._neighbours(index):
            if self.bad[candidate]:
                continue
            self.note(candidate)  # stays recorded if a signal or SystemExit ends the process
            try:
                return candidate, self.draws[epoch, candidate]
            except DatasetError:  # other samples would fail too
                raise
            except UsageError as error:
                self.bad[candidate] = 1
                log.warning("excluded from now on: %s", error)
            except Exception as error:
                raise UsageError(
                    f"{self.name_of(candidate)} cannot be read: {_one_line(error)} (a dataset that raises UsageError "
                    "instead only excludes the sample)"
                ) from error
        raise UsageError(f"none of {self.length} samples can be read: see the warnings above")

    def _neighbours(self, index: int) -> Iterator[int]:
        """Yield the index itself, then the following ones of the same bucket."""
        for step in range(self.length):
            candidate = (index + step) % self.length
            if self.bucket_of is None or self.bucket_of[candidate] == self.bucket_of[index]:
                yield candidate

    def _collate(self, found: Sequence[tuple[int, Any]]) -> Batch:
        samples = [sample for _, sample in found]
        try:
            with enough_shared_memory():
                return collate(samples)
        except UsageError:
            raise
        except Exception as error:
            odd, reason = found[0][0], error
            for index, sample in found:
                try:
                    collate([samples[0], sample])
                except Exception as cause:  # noqa: PERF203
                    odd, reason = index, cause
                    break
            raise UsageError(
                f"{self.name_of(odd)} cannot be collated with {self.name_of(found[0][0])}: {_one_line(reason)}"
            ) from error


class Failure:
    """A UsageError that a worker returns instead of a batch, with its cause and the traceback as text.

    If the worker raised it, DataLoader would raise another error here, which looks like an error of DataLoader itself.
    """

    def __init__(self, error: UsageError) -> None:
        self.message = str(error)
        self.traceback = "".join(traceback.format_exception(error))
        try:
            self.cause = pickle.loads(pickle.dumps(error.__cause__))
        except Exception:  # some classes of errors cannot be pickled
            self.cause = RuntimeError(_one_line(error.__cause__ or error))

    def error(self) -> UsageError:
        """Return the error, with its cause, to raise in the main process."""
        error = UsageError(self.message)
        error.__cause__ = self.cause or RuntimeError("in a worker")
        error.__cause__.__cause__ = RuntimeError(f"\n{self.traceback}")
        return error


@contextmanager
def enough_shared_memory() -> Iterator[None]:
    """Convert torch errors about shared memory to a `UsageError` with a remedy."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if (
            not full and "shared memory" not in text and "</torch_" not in text
        ):  # torch's names of files in shared memory
            raise
        raise shared_memory_error() from error


def shared_memory_error() -> UsageError:
    """Return the error for shared memory that is too small, with its size and the remedies."""
    folder = Path("/dev/shm")
    size = f" ({folder}: {in_bytes(shutil.disk_usage(folder).total)})" if folder.is_dir() else ""
    return UsageError(
        f"shared memory{size} is too small for the batches of the workers: give the container more (docker run "
        "--shm-size=8g), lower data.num_workers or data.prefetch, or set data.num_workers=0 to use no workers"
    )


def _one_line(error: BaseException) -> str:
    kind, text = type(error).__name__, first_line(error)
    return shown(kind if text == kind else f"{kind}: {text}")
