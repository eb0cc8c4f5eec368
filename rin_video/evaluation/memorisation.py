"""Memorisation: are samples closer to the training data than held-out data are?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rin_video.errors import UsageError
from rin_video.evaluation.distances import find_mean
from rin_video.evaluation.feature_checks import CheckedFeatures, blocks, check_features
from rin_video.evaluation.intervals import RESAMPLES, Array, Estimate, draw_weights, percentile_interval, share
from rin_video.evaluation.neighbours import squared_distances


class Memorisation(NamedTuple):
    """Distances of samples to their nearest training samples, over those of held-out data.

    Ratios near 1 mean new samples, near 0 copies. Blurred samples are near everything and lower the ratio as well: the
    pairs show which it is.
    """

    ratio: Estimate  # of the medians
    low_ratio: Estimate  # of the 10 % quantiles: a tenth of copies shows here
    share_closer: Estimate  # share of samples closer than 99 % of held-out ones; 0.01 for new samples
    pairs: list[tuple[int, int]]  # the closest (row of the samples, row of the training data), closest first


def memorisation(
    samples: ArrayLike,
    train: ArrayLike,
    held_out: ArrayLike,
    *,
    groups_a: ArrayLike | None = None,
    groups_b: ArrayLike | None = None,
    pairs: int = 8,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Memorisation:
    """Compare the distances of samples (n, d) and held-out data (m, d) to their nearest rows of training data (N, d).

    The intervals are a bootstrap of samples and held-out data, by group (`groups_a`, `groups_b`), for fixed training
    data; that of the share is Wilson's for a fixed limit. A distance depends on the number of training rows, so both
    sets use the same ones.

    Raises:
        UsageError: features that `check_features` refuses, or a tenth of the held-out data in the training data.
    """
    drawn = check_features(samples, groups_a, "the samples")
    width = drawn.rows.shape[1]
    trained, held = (
        check_features(x, groups, name, width)
        for x, groups, name in ((train, None, "the training data"), (held_out, groups_b, "the held-out data"))
    )
    distances, neighbours = nearest(drawn.rows, trained.rows)
    others, _ = nearest(held.rows, trained.rows)
    if copies := int((others == 0).sum()):
        limit = np.quantile(others, 0.1, method="inverted_cdf")
        if limit == 0:
            raise UsageError(
                f"{copies} of {len(others)} held-out samples are in the training data as well: memorisation cannot be "
                "measured. Hold out other files"
            )
    ratio, low_ratio = (
        quantile_ratio(distances, drawn, others, held, q, resamples=resamples, seed=seed) for q in (0.5, 0.1)
    )
    closer = distances < np.quantile(others, 0.01, method="inverted_cdf")
    closest = np.argsort(distances, kind="stable")[:pairs]
    return Memorisation(
        ratio,
        low_ratio,
        share(closer, None if groups_a is None else drawn.groups),
        [(int(drawn.order[i]), int(trained.order[neighbours[i]])) for i in closest],
    )


def nearest(rows: NDArray, others: NDArray) -> tuple[Array, NDArray[np.int64]]:
    """Return the distance (n,) of each row to its nearest row of the others, and that one's number (n,)."""
    found, index = np.full(len(rows), np.inf), np.zeros(len(rows), np.int64)
    for part, columns, squared in squared_distances(rows, others, find_mean(others)):
        column = squared.argmin(1)
        value = squared[np.arange(len(column)), column]
        better = value < found[part]
        found[part] = np.where(better, value, found[part])
        index[part] = np.where(better, column + columns.start, index[part])
    pairs = zip(blocks(rows), blocks(others[index]), strict=True)  # again, without the rounding of large numbers
    return np.concatenate([np.sqrt(((x - y.astype(np.float64)) ** 2).sum(1)) for x, y in pairs]), index


def quantile_ratio(
    top: Array,
    top_set: CheckedFeatures,
    bottom: Array,
    bottom_set: CheckedFeatures,
    q: float,
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """Return the ratio of the q-quantiles of two sets of values, with an interval by resampling the groups of both."""
    value = np.quantile(top, q, method="inverted_cdf") / np.quantile(bottom, q, method="inverted_cdf")
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = weighted_quantiles(top, top_set.groups, draw_weights(top_set.num_groups, resamples, seed, 0), q)
        drawn /= weighted_quantiles(
            bottom, bottom_set.groups, draw_weights(bottom_set.num_groups, resamples, seed, 1), q
        )
    found = percentile_interval(float(value), drawn, min(top_set.num_groups, bottom_set.num_groups))
    return found._replace(low=max(found.low, 0.0))


def weighted_quantiles(values: Array, groups: NDArray[np.int64], weights: NDArray, q: float) -> Array:
    """Return (R,) q-quantiles of values (n,) whose groups count as often as weights (R, G) say."""
    order = np.argsort(values, kind="stable")
    found = []
    for part in blocks(weights, 64):
        sums = np.cumsum(part[:, groups[order]], 1, dtype=np.float64)
        found.append(values[order][(sums >= q * sums[:, -1:]).argmax(1)])
    return np.concatenate(found) if found else np.empty(0)
