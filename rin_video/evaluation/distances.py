"""Distances between two feature sets: Frechet distance (FID, FVD) and kernel distance (KID)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rin_video.evaluation.feature_checks import BLOCK, CheckedFeatures, blocks, check_features
from rin_video.evaluation.intervals import RESAMPLES, Array, Estimate, draw_weights, percentile_interval


def frechet_distance(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups_a: ArrayLike | None = None,
    groups_b: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the squared Frechet distance between Gaussians fitted to features a (n, d) and b (m, d).

    It is |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with the unbiased covariances S (Heusel et al. 2017,
    eq. 6), in float64. With A, B the centred rows over sqrt(n - 1), the last trace is the sum of the singular values
    of A B^T: no root of a matrix, no regularisation, exact also for n < d.

    The value is biased upward at small n (see `too_few` and `real_floor`). The interval is that of the value's random
    error; it does not contain the bias. It is a bootstrap of the value's linear part in the rows' weights (the
    infinitesimal jackknife, Efron 1982): one decomposition in all, and without the bias that repeated rows give to
    the plain bootstrap. `resamples=0` omits it.

    Raises:
        UsageError: features that `check_features` refuses.
    """
    set_a = check_features(a, groups_a, "the samples")
    set_b = check_features(b, groups_b, "the real data", set_a.rows.shape[1])
    mean_a, mean_b = find_mean(set_a.rows), find_mean(set_b.rows)
    root_a, root_b = covariance_root(set_a.rows, mean_a), covariance_root(set_b.rows, mean_b)
    shift = mean_a - mean_b
    cross = root_a @ root_b.T
    u, s, vt = np.linalg.svd(cross, full_matrices=False) if resamples else (None, singular_values(cross), None)
    value = max(float(shift @ shift + (root_a**2).sum() + (root_b**2).sum() - 2 * s.sum()), 0.0)
    if u is None or vt is None:
        return Estimate(value, math.nan, math.nan)
    kept = s > 1e-12 * s[0]  # the others add nothing, and their vectors are noise
    scale = s[kept] ** -0.5
    influence_a = row_influences(set_a.rows, mean_a, 2 * shift, root_b.T @ (vt[kept].T * scale))
    influence_b = row_influences(set_b.rows, mean_b, -2 * shift, root_a.T @ (u[:, kept] * scale))
    draws = value + linear_draws(influence_a, set_a.groups, resamples, seed, 0)
    draws += linear_draws(influence_b, set_b.groups, resamples, seed, 1)
    estimate = percentile_interval(value, draws, min(set_a.num_groups, set_b.num_groups))
    return estimate._replace(low=max(estimate.low, 0.0))


def find_mean(rows: NDArray) -> Array:
    """Return the mean (d,) of rows in float64."""
    return np.sum([part.sum(0, dtype=np.float64) for part in blocks(rows)], 0) / len(rows)


def covariance_root(rows: NDArray, mean: Array) -> Array:
    """Return R (at most d, d) with R^T R = the unbiased covariance of rows (n, d).

    R is the centred rows themselves for n <= d, otherwise the triangle of their QR decomposition, which is updated
    block by block.
    """
    n, d = rows.shape
    if n <= d:
        return (rows - mean) / math.sqrt(n - 1)
    root = np.empty((0, d))
    for part in blocks(rows, max(BLOCK, d)):
        root = np.asarray(np.linalg.qr(np.concatenate([root, part - mean]), mode="r"))
    return root / math.sqrt(n - 1)


def singular_values(matrix: Array) -> Array:
    """Return the singular values alone."""
    return np.asarray(np.linalg.svd(matrix, compute_uv=False), np.float64)


def row_influences(rows: NDArray, mean: Array, shift: Array, projection: Array) -> Array:
    """Return (n,): n times the derivative of the distance by each row's weight, at equal weights.

    For row x of set a, centred: x . 2 (mean_a - mean_b) + (|x|^2 - x^T G x) n / (n - 1). G is the
    optimal transport map from a's Gaussian to b's. With the singular vectors A B^T = U S V^T, x^T G x is the row's
    squared length under B^T V S^(-1/2), which is `projection`.
    """
    found, unbiased = [], len(rows) / (len(rows) - 1)
    for part in blocks(rows):
        x = part - mean
        found.append(x @ shift + unbiased * ((x**2).sum(1) - ((x @ projection) ** 2).sum(1)))
    return np.concatenate(found)


def linear_draws(influences: Array, groups: NDArray[np.int64], resamples: int, seed: int, stream: int) -> Array:
    """Return (resamples,) bootstrap draws of the weighted mean of the influences (n,), by group."""
    totals = np.bincount(groups, influences - influences.mean())
    draws = np.empty(resamples)
    for part, weights in zip(blocks(draws), blocks(draw_weights(len(totals), resamples, seed, stream)), strict=True):
        part[:] = weights.astype(np.float64) @ totals / len(influences)
    return draws


def kernel_distance(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups_a: ArrayLike | None = None,
    groups_b: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the squared maximum mean discrepancy between features a (n, d) and b (m, d), without bias at any n.

    The kernel is (x . y / d + 1)^3 (Binkowski et al. 2018, section 4). All pairs are used instead of random subsets;
    pairs of rows of one group are left out, as a row's pair with itself is (Gretton et al. 2012, eq. 3). The value is
    negative about half of the time where both sets have one distribution.

    The interval is a bootstrap by group of both sets. Pairs of a group with its own repetitions are left out, which
    would bias the draws. `resamples=0` omits it.

    Raises:
        UsageError: features that `check_features` refuses.
    """
    set_a = check_features(a, groups_a, "the samples")
    set_b = check_features(b, groups_b, "the real data", set_a.rows.shape[1])
    weights_a, weights_b = (with_ones(part, resamples, seed, stream) for stream, part in enumerate((set_a, set_b)))
    draws = kernel_means(set_a, set_a, weights_a, weights_a) + kernel_means(set_b, set_b, weights_b, weights_b)
    draws -= 2 * kernel_means(set_a, set_b, weights_a, weights_b)
    return percentile_interval(float(draws[0]), draws[1:], min(set_a.num_groups, set_b.num_groups))


def with_ones(features: CheckedFeatures, resamples: int, seed: int, stream: int) -> NDArray[np.uint16]:
    """Return bootstrap weights of the groups; the first row, all ones, is the sample itself."""
    drawn = draw_weights(features.num_groups, resamples, seed, stream)
    return np.concatenate([np.ones((1, features.num_groups), np.uint16), drawn])


def kernel_means(a: CheckedFeatures, b: CheckedFeatures, weights_a: NDArray, weights_b: NDArray) -> Array:
    """Return (R,) weighted means of the kernel over all pairs of rows, a block of pairs at a time.

    If a is b, pairs of one group are left out. `weights` (R, G) are those of the groups.
    """
    totals, same = np.zeros(len(weights_a)), a is b
    parts_a, parts_b = (list(zip(blocks(x.rows), blocks(x.groups), strict=True)) for x in (a, b))
    for i, (x, groups_x) in enumerate(parts_a):
        weight_x = weights_a[:, groups_x].astype(np.float64)
        for j, (y, groups_y) in enumerate(parts_b):
            if same and j < i:
                continue  # the kernel is symmetric
            kernel = (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3
            if same:
                kernel[groups_x[:, None] == groups_y] = 0
            totals += (2 if same and i != j else 1) * ((weight_x @ kernel) * weights_b[:, groups_y]).sum(1)
    sizes_a, sizes_b = (weights * np.bincount(x.groups) for weights, x in ((weights_a, a), (weights_b, b)))
    pairs = sizes_a.sum(1) * sizes_b.sum(1) - (sizes_a**2).sum(1) * same
    with np.errstate(invalid="ignore"):
        return totals / pairs  # NaN for a resample of a single group
