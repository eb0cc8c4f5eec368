"""Features of a set of samples, for all metrics that compare distributions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rin_video.errors import UsageError
from rin_video.evaluation.sets import SampleSet
from rin_video.features import Extractor
from rin_video.progress import progress_bar
from rin_video.ranks import is_first
from rin_video.training.distributed import in_all, join_process_group, rows_of

BATCH = 16  # samples read at a time


@dataclass(frozen=True)
class Features:
    """The features of samples, by view; samples that could not be read are left out."""

    views: dict[str, np.ndarray]  # (n, d), or (n, rows, d) with several rows per sample; float32
    probabilities: np.ndarray | None  # (n, classes) of the extractor's classifier
    groups: np.ndarray  # (n,) the file of each sample
    labels: np.ndarray  # (n,) the class of each sample; -1: none
    pixels: str  # a digest of the pixels of all samples, in order
    copies: int  # the number of samples with the same pixels as an earlier one
    digests: frozenset[bytes]  # of the pixels of each sample
    numbers: np.ndarray  # (n,) the number of each sample in its set
    unreadable: list[str]  # messages of samples that could not be read

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, rows: np.ndarray) -> Features:
        """Return the features of some samples."""
        return replace(
            self,
            views={name: view[rows] for name, view in self.views.items()},
            probabilities=None if self.probabilities is None else self.probabilities[rows],
            groups=self.groups[rows],
            labels=self.labels[rows],
            numbers=self.numbers[rows],
        )


class Measured(NamedTuple):
    """The sets of an evaluation and their features."""

    samples: SampleSet
    real: SampleSet
    train: SampleSet | None
    sample_features: Features
    real_features: Features
    train_features: Features | None
    pairs: list[tuple[int, int]]  # the samples that are closest to a training sample, and that training sample


def extract(
    extractor: Extractor, samples: SampleSet, what: str, *, strict: bool = False, classify: bool = False
) -> Features:
    """Return the features of all samples; with several processes, each extracts a part.

    `what` names the samples in the progress bar. Samples that cannot be read raise `UsageError` if `strict`, and
    otherwise are skipped and listed. `classify` adds the probabilities of the extractor's classifier. Raises
    `UsageError` if a feature is not finite, or no sample can be read.
    """
    state = join_process_group()
    part = rows_of(len(samples), state.process_index, state.num_processes)
    parts = in_all(lambda: _extract(extractor, samples, part, what, strict=strict, classify=classify))
    rows = [row for part in parts for row in part]
    read = [row for row in rows if isinstance(row, _Row)]
    unreadable = [row for row in rows if not isinstance(row, _Row)]
    if not read:
        raise UsageError(f"no sample of {samples.name} can be read: {unreadable[0] if unreadable else 'it is empty'}")
    numbers = np.array([row.number for row in read])
    views = {name: np.stack([row.views[name] for row in read]) for name in read[0].views}
    for name, view in views.items():
        if not np.isfinite(view).all():
            bad = int((~np.isfinite(view)).reshape(len(view), -1).any(1).argmax())
            raise UsageError(
                f"the {name} features of {samples.file_of(int(numbers[bad]))} ({extractor.name}) are not finite: check "
                "the weights of the extractor, or use other --features"
            )
    digests = [row.digest for row in read]
    chances = [row.probabilities for row in read if row.probabilities is not None]
    return Features(
        views,
        np.stack(chances) if chances else None,
        samples.groups[numbers],
        samples.labels[numbers],
        hashlib.sha256(b"".join(digests)).hexdigest(),
        sum(count - 1 for count in Counter(digests).values()),
        frozenset(digests),
        numbers,
        unreadable,
    )


class _Row(NamedTuple):
    """One sample."""

    number: int
    digest: bytes
    views: dict[str, np.ndarray]
    probabilities: np.ndarray | None


def _extract(
    extractor: Extractor, samples: SampleSet, rows: range, what: str, *, strict: bool, classify: bool
) -> list[_Row | str]:
    """Return a row for each sample, or a message if it cannot be read."""
    found: list[_Row | str] = []
    with progress_bar(len(rows), f"features of {what}", "sample", disable=not is_first()) as bar:
        for batch in _batches(samples, rows, found, strict=strict):
            numbers, pixels = zip(*batch, strict=True)
            x = torch.stack(pixels)
            views = {name: view.float().cpu().numpy() for name, view in extractor(x).items()}
            chances = extractor.probabilities(x) if classify else None
            for place, number in enumerate(numbers):
                one = {name: view[place] for name, view in views.items()}
                chance = None if chances is None else chances[place].double().cpu().numpy()
                digest = hashlib.sha256(np.ascontiguousarray(pixels[place].numpy()).data).digest()
                found.append(_Row(number, digest, one, chance))
            bar.update(len(batch))
    return found


def _batches(
    samples: SampleSet, rows: range, failed: list[_Row | str], *, strict: bool
) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield (number, pixels) of up to BATCH samples at a time."""
    batch: list[tuple[int, Tensor]] = []
    for number in rows:
        try:
            batch.append((number, samples.read(number)))
        except UsageError as error:
            if strict:
                raise
            failed.append(str(error))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
