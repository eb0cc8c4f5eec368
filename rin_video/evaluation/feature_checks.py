"""Checks and canonical order of the feature sets that the metrics compare."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rin_video.errors import UsageError
from rin_video.evaluation.intervals import number_groups

BLOCK = 1024  # rows that are converted to float64 at a time


class CheckedFeatures(NamedTuple):
    """Checked features (n, d) in an order of their own, and each row's group and place in the input."""

    rows: NDArray[np.floating]
    groups: NDArray[np.int64]  # (n,) numbers 0 to G - 1
    order: NDArray[np.int64]  # (n,): row i was row order[i] of the input

    @property
    def num_groups(self) -> int:
        """The number of groups."""
        return int(self.groups.max()) + 1


def check_features(
    features: ArrayLike, groups: ArrayLike | None, name: str, width: int | None = None
) -> CheckedFeatures:
    """Return features (n, d) in an order that depends on their values only.

    So a metric does not depend on the order of the input, to the last digit. Float32 and float64 are kept, other types
    become float64. `width` is the d of the other set.

    Raises:
        UsageError: no matrix, fewer than 2 rows, another width, or values that are NaN or infinite.
    """
    rows = np.asarray(features)
    rows = np.ascontiguousarray(rows, None if rows.dtype in (np.float32, np.float64) else np.float64)
    if rows.ndim != 2 or not rows.shape[-1]:
        raise UsageError(f"features of {name} have shape {rows.shape}, (rows, width) is needed")
    if len(rows) < 2:
        raise UsageError(f"{name} has {len(rows)} rows of features, at least 2 are needed: add clips or images")
    if width not in (None, rows.shape[1]):
        raise UsageError(
            f"features of {name} have width {rows.shape[1]}, those of the other set {width}: use one extractor for both"
        )
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise UsageError(
            f"features of {name} are NaN or infinite in {bad.sum()} of {len(rows)} rows, first in row {bad.argmax()}: "
            "look at that sample, or compute features in float32"
        )
    numbers = number_groups(groups, len(rows), name)
    sums = np.concatenate([part.astype(np.float64).sum(1) for part in blocks(rows)])
    order = np.lexsort([*rows.T[:8], sums])
    return CheckedFeatures(rows[order], number_groups(numbers[order], len(rows)), order)


def refuse_equal(rows: NDArray, name: str) -> None:
    """Raise `UsageError` if all rows (n, d) are equal. Those of frame differences may be: such clips do not move."""
    if (rows == rows[0]).all():
        raise UsageError(f"all {len(rows)} samples of {name} have equal features: is it one file repeated?")


def blocks(rows: NDArray, size: int = BLOCK) -> list[NDArray]:
    """Return the rows as views of at most `size` rows each."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
