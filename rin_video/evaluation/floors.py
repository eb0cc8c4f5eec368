"""What real data scores against real data, and where samples are too few."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rin_video.evaluation.feature_checks import check_features
from rin_video.evaluation.intervals import number_groups


def real_floor(
    metric: Callable[..., Any],
    real: ArrayLike,
    groups: ArrayLike | None,
    n: int,
    splits: int = 4,
    seed: int = 0,
    *,
    units: ArrayLike | None = None,
) -> tuple[Any, int] | None:
    """Return the metric between two disjoint halves of real features (N, d), and the rows per half.

    A generator that draws from the distribution of the data would score about this much. Groups (files) are never
    divided between the halves. Each half has n rows, or fewer if the data or its files do not allow it: the second
    result is the number used, the same in all splits. The value is the mean over `splits` random divisions.

    `units` (N,) number the samples where a sample has several rows, such as its frames. Whole samples are chosen then,
    because frames of many samples differ more than those of a few.

    `metric(a, b, resamples=0)` returns an `Estimate`, a number, or a mapping of names to these; the floor is a float or
    a dict of floats. It is also given `groups_a` and `groups_b` if there are groups. The floor is None if the data has
    fewer than 2 groups, or a half fewer than 2 rows.

    Raises:
        UsageError: features that `check_features` refuses.
    """
    found = check_features(real, groups, "the real data")
    if groups is not None and len(np.unique(np.asarray(groups))) < 2:
        return None
    numbers = number_groups(None if units is None else np.asarray(units)[found.order], len(found.rows))
    generator = np.random.default_rng(seed)
    halves = [divide(found.groups, generator) for _ in range(splits)]
    used = min(n, *(len(half) for pair in halves for half in pair))
    if used < 2:
        return None
    values = []
    for pair in halves:
        turn = generator.permutation(numbers.max() + 1)[numbers]
        a, b = (np.sort(half[np.argsort(turn[half], kind="stable")[:used]]) for half in pair)
        own = {} if groups is None else {"groups_a": found.groups[a], "groups_b": found.groups[b]}
        values.append(metric(found.rows[a], found.rows[b], **own, resamples=0))
    if isinstance(values[0], Mapping):
        return {name: mean_value([value[name] for value in values]) for name in values[0]}, used
    return mean_value(values), used


def divide(groups: NDArray[np.int64], generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of two halves of about equal size; each group (numbers 0 to G - 1) is in one of them.

    The groups come in random order, a large one before a smaller one where their sizes differ, and each goes to the
    smaller half.
    """
    sizes = np.bincount(groups)
    side = np.zeros(len(sizes), np.int64)
    filled = [0, 0]
    order = generator.permutation(len(sizes))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        side[group] = filled[1] < filled[0] or (filled[1] == filled[0] and generator.integers(2))
        filled[side[group]] += sizes[group]
    return np.flatnonzero(side[groups] == 0), np.flatnonzero(side[groups] == 1)


def mean_value(values: list[Any]) -> float:
    """Return the mean of numbers or of the values of estimates."""
    return float(np.mean([getattr(value, "value", value) for value in values]))


def too_few(n: int, d: int) -> str:
    """Return a warning where n samples per set are too few for a Frechet distance of d features, otherwise ''.

    The bias it names is that of two sets of n from one Gaussian with equal variances, over the total variance: about
    d / 2n, and 2 - (1.7 - 0.2 n / d) sqrt(n / d) below n = d. Features of unequal variance have less.
    """
    if n >= 10 * d:
        return ""
    bias = 2 - (1.7 - 0.2 * n / d) * math.sqrt(n / d) if n < d else d / (2 * n)
    why = "the covariances are singular and the distance" if n <= d else "the Frechet distance"
    return (
        f"{n} samples are few for {d} features: {why} is too large (by about {bias:.0%} of the total variance for "
        f"features of equal variance): compare at equal n only, next to the floor, or use the kernel distance; "
        f"{10 * d} samples or more make the bias small"
    )
