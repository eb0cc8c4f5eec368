"""Scores from nearest neighbours: precision and recall, density and coverage."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rin_video.errors import UsageError
from rin_video.evaluation.distances import find_mean, linear_draws
from rin_video.evaluation.feature_checks import BLOCK, CheckedFeatures, blocks, check_features
from rin_video.evaluation.intervals import RESAMPLES, Array, Estimate, percentile_interval, share

CLOSED = 1 + 1e-9  # a row on the surface of a ball is inside, whatever the rounding


def neighbour_scores(
    samples: ArrayLike,
    real: ArrayLike,
    k: int = 5,
    *,
    groups_a: ArrayLike | None = None,
    groups_b: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return precision, recall, density and coverage of features of samples (n, d) and real data (m, d).

    The ball of a row reaches to its k-th nearest neighbour in its own set; rows of its own group (`groups_a` of the
    samples, `groups_b` of the real data) are no neighbours, because clips of one file are alike.

    - precision: share of samples inside the ball of a real row (Kynkaanniemi et al. 2019, eq. 1 and 2)
    - recall: share of real rows inside the ball of a sample
    - density: number of real balls around a sample, over k; it may exceed 1 (Naeem et al. 2020, eq. 4)
    - coverage: share of real rows whose ball contains a sample (eq. 5)

    The intervals count both sets, by group. Those of the shares are Wilson's, with a binomial variance for the rows
    that are counted and one for those that decide. Repeated draws in simulations varied by 0.3 to 1.2 times their
    width: they are too wide rather than too narrow, most where sets differ in size or the share is near 1. That of
    density is a bootstrap for balls of fixed size, which had 0.6 to 1.2 times the width of repeated draws.

    Raises:
        UsageError: features that `check_features` refuses, or fewer than k rows of other groups.
    """
    set_a = check_features(samples, groups_a, "the samples")
    set_b = check_features(real, groups_b, "the real data", set_a.rows.shape[1])
    centre = find_mean(set_b.rows)
    radii_a, radii_b = (squared_radii(part, k, centre, name) for part, name in ((set_a, "samples"), (set_b, "real")))
    balls_around, samples_in = np.zeros(len(set_a.rows)), np.zeros(len(set_b.rows))
    recalled = np.zeros(len(set_b.rows), bool)
    for rows, columns, squared in squared_distances(set_a.rows, set_b.rows, centre):
        inside = squared <= radii_b[columns] * CLOSED
        balls_around[rows] += inside.sum(1)
        samples_in[columns] += inside.sum(0)
        recalled[columns] |= (squared <= radii_a[rows, None] * CLOSED).any(0)
    density = float(balls_around.mean()) / k
    draws = density + linear_draws(balls_around / k, set_a.groups, resamples, seed, 0)
    draws += linear_draws(samples_in * density / max(samples_in.mean(), 1e-12), set_b.groups, resamples, seed, 1)
    found = percentile_interval(density, draws, min(set_a.num_groups, set_b.num_groups))
    own_a, own_b = (None if x is None else y.groups for x, y in ((groups_a, set_a), (groups_b, set_b)))
    return {
        "precision": share(balls_around > 0, own_a, judges=set_b.num_groups),
        "recall": share(recalled, own_b, judges=set_a.num_groups),
        "density": found._replace(low=max(found.low, 0.0)),
        "coverage": share(samples_in > 0, own_b, judges=set_a.num_groups),
    }


def squared_radii(features: CheckedFeatures, k: int, centre: Array, name: str) -> Array:
    """Return (n,) squared distances of rows to their k-th nearest neighbours of other groups.

    Raises:
        UsageError: a row has fewer than k.
    """
    n, largest = len(features.rows), int(np.bincount(features.groups).max())
    if not 1 <= k <= n - largest:
        raise UsageError(
            f"precision and recall with k = {k} need at least {k} neighbours from other files for each row, the {name} "
            f"set has {n - largest} ({n} rows, {largest} in one file): add files, or lower k"
        )
    nearest = np.full((n, k), np.inf)
    for rows, columns, squared in squared_distances(features.rows, features.rows, centre):
        squared[features.groups[rows, None] == features.groups[columns]] = np.inf
        nearest[rows] = np.partition(np.concatenate([nearest[rows], squared], 1), k - 1, axis=1)[:, :k]
    return nearest.max(1)


def squared_distances(x: NDArray, y: NDArray, centre: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Yield (rows, columns, squared distances) for blocks of x (n, d) and y (m, d), in float64.

    |x|^2 + |y|^2 - 2 x . y loses digits far from the origin, so `centre` (d,) is subtracted. Distances that are zero
    within rounding are 0, so that a copy has none.
    """
    for i, part in enumerate(blocks(x)):
        rows, part = slice(i * BLOCK, i * BLOCK + len(part)), part - centre
        for j, other in enumerate(blocks(y)):
            other = other - centre
            sizes = (part**2).sum(1)[:, None] + (other**2).sum(1)
            squared = sizes - 2 * part @ other.T
            squared[squared < 1e-13 * sizes] = 0
            yield rows, slice(j * BLOCK, j * BLOCK + len(other)), squared
