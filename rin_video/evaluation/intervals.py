"""95 % intervals: bootstrap over groups of rows (all clips of one file are one group), and Wilson's for shares."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rin_video.errors import UsageError

Array = NDArray[np.float64]
Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
RESAMPLES = 1000


class Estimate(NamedTuple):
    """A number and its 95 % interval; `low` and `high` are NaN where no interval was asked for."""

    value: float
    low: float
    high: float


def number_groups(groups: ArrayLike | None, num_rows: int, name: str = "the data") -> NDArray[np.int64]:
    """Return each row's group as a number 0 to G - 1, numbered by first occurrence; without groups each row is one.

    If all rows belong to one group, such as the clips of one long film, each row is a group as well: an interval needs
    two at least. It is then too narrow, because the rows are alike.

    Raises:
        UsageError: the lengths differ.
    """
    if groups is None:
        return np.arange(num_rows)
    groups = np.asarray(groups)
    if groups.shape != (num_rows,):
        raise UsageError(f"{name} has {num_rows} rows, but its groups have shape {groups.shape}: give one per row")
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    if len(first) < 2:
        return np.arange(num_rows)
    return np.argsort(np.argsort(first))[numbers]


def draw_weights(num_groups: int, resamples: int, seed: int, stream: int = 0) -> NDArray[np.uint16]:
    """Return (resamples, num_groups) counts: how often each bootstrap resample contains each group.

    `stream` separates the draws of two sets that are resampled independently.
    """
    generator = np.random.default_rng([seed, stream])
    weights = np.empty((resamples, num_groups), np.uint16)
    for row in weights:
        row[:] = np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups)
    return weights


def student_factor(num_groups: int) -> float:
    """Return what widens a percentile interval of few groups to the size of Student's.

    It is t sqrt(n / (n - 1)) / z: the bootstrap's variance lacks the factor n / (n - 1), and the quantile of t with
    n - 1 degrees of freedom exceeds the normal z (Hesterberg 2015, section 5.3). The quantile is the expansion of
    Abramowitz and Stegun 26.7.5, which is 0.1 % off for 6 groups and 1 % for 4.
    """
    v, z = num_groups - 1, Z
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return t / z * math.sqrt(num_groups / v)


def percentile_interval(value: float, draws: Array, num_groups: int) -> Estimate:
    """Return `value` with the 2.5 % and 97.5 % percentiles of its bootstrap draws, widened for few groups."""
    draws = draws[np.isfinite(draws)]  # of two groups, half of the resamples contain one alone
    if not len(draws):
        return Estimate(float(value), math.nan, math.nan)
    low, high = value + student_factor(num_groups) * (np.percentile(draws, [2.5, 97.5]) - value)
    return Estimate(float(value), float(low), float(high))


def ratio_of_means(
    top: ArrayLike,
    bottom: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    name: str = "the data",
) -> Estimate:
    """Return sum(top) / sum(bottom) of paired values (n,), with an interval by resampling groups.

    A group whose values are far from the others' counts by its sum, so rows with a small denominator cannot dominate.
    The result is NaN where the denominators add up to 0.

    Raises:
        UsageError: fewer than 2 rows, or values that are not finite.
    """
    top, bottom = check_values(top, name), check_values(bottom, name)
    numbers = number_groups(groups, len(top), name)
    sums = np.stack([np.bincount(numbers, part) for part in (top, bottom)], 1)
    sums = sums[np.lexsort(sums.T)]  # the draws do not depend on the order of the rows
    weights = draw_weights(len(sums), resamples, seed).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sums[:, 0].sum() / sums[:, 1].sum()
        draws = np.divide(*(weights @ sums).T)
    return percentile_interval(float(value), draws, len(sums))


def mean(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    name: str = "the data",
) -> Estimate:
    """Return the mean of values (n,) over rows, with an interval by resampling groups.

    Raises:
        UsageError: fewer than 2 rows, or values that are not finite.
    """
    values = check_values(values, name)
    return ratio_of_means(values, np.ones_like(values), groups, resamples=resamples, seed=seed, name=name)


def share(
    hits: ArrayLike, groups: ArrayLike | None = None, *, judges: int | None = None, name: str = "the data"
) -> Estimate:
    """Return the share of true values among `hits` (n,), with Wilson's interval (Wilson 1927).

    Where rows of one group are alike, the interval is that of the effective number of rows p (1 - p) / variance, the
    variance being that between groups. It is not empty where all or no rows are hits: then the number is that of the
    groups. `judges` is the number of random rows that decide what a hit is: they add a variance of p (1 - p) / judges.

    Raises:
        UsageError: fewer than 2 rows.
    """
    values = check_values(np.asarray(hits, np.float64), name)
    n, p = float(len(values)), float(values.mean())
    if groups is not None:
        numbers = number_groups(groups, len(values), name)
        num_groups = int(numbers.max()) + 1
        residuals = np.bincount(numbers, values - p)
        variance = float(residuals @ residuals) / n**2 * num_groups / (num_groups - 1)
        n = min(n, p * (1 - p) / variance) if 0 < p < 1 and variance else num_groups
    n = n if judges is None else 1 / (1 / n + 1 / judges)
    centre, reach = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((centre + sign * reach) / (1 + Z**2 / n) for sign in (-1, 1))
    return Estimate(p, min(max(low, 0.0), p), max(min(high, 1.0), p))  # at 0 and 1, p is the limit but for rounding


def check_values(values: ArrayLike, name: str) -> Array:
    """Return values (n,) as float64.

    Raises:
        UsageError: fewer than 2 values, or some that are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UsageError(f"{name} has values of shape {values.shape}, at least 2 in one row are needed")
    if bad := int((~np.isfinite(values)).sum()):
        raise UsageError(f"{name} has {bad} values of {len(values)} that are NaN or infinite")
    return values
