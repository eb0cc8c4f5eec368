"""Frechet and kernel distance, intervals, floors and class scores: against closed forms, peers and simulations."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from rin_video import UsageError
from rin_video.evaluation import intervals
from rin_video.evaluation.class_scores import accuracy, inception_score
from rin_video.evaluation.distances import frechet_distance, kernel_distance
from rin_video.evaluation.floors import real_floor, too_few

D = 8
DISTANCES = {"frechet": frechet_distance, "kernel": kernel_distance}


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def frechet_of_gaussians(mean_a, cov_a, mean_b, cov_b):
    """Return the closed form by eigenvalues of the product, in complex numbers as torch-fidelity does."""
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots


def frechet_by_covariances(a, b):
    a, b = a.astype(float), b.astype(float)
    return frechet_of_gaussians(a.mean(0), np.atleast_2d(np.cov(a.T)), b.mean(0), np.atleast_2d(np.cov(b.T)))


def unequal_gaussians(generator):
    """Return two samplers of Gaussians of width D, and their Frechet distance."""
    root_a, root_b = generator.normal(size=(2, D, D)) / math.sqrt(D)
    shift = np.full(D, 0.5)
    truth = frechet_of_gaussians(np.zeros(D), root_a @ root_a.T, shift, root_b @ root_b.T)
    return (
        lambda n: generator.normal(size=(n, D)) @ root_a.T,
        lambda n: generator.normal(size=(n, D)) @ root_b.T + shift,
        truth,
    )


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 8), (3000, 2500, 8), (2, 3, 1), (40, 9, 8), (1500, 1500, 300)])
def test_frechet_distance_is_that_of_the_fitted_gaussians(generator, n, m, d):
    a, b = generator.normal(size=(n, d)), 0.3 + generator.normal(size=(m, d)) @ generator.normal(size=(d, d))
    if d > 100:  # commuting covariances, for which the trace is a sum of roots
        a, b = (x @ np.diag(np.arange(1, d + 1)) / d for x in (a, a[::-1] * 2))
        b += 1
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T))
    else:
        expected = frechet_by_covariances(a, b)
    assert_allclose(frechet_distance(a, b, resamples=0).value, expected, rtol=1e-10)


def test_frechet_distance_of_few_samples_in_many_dimensions_is_exact(generator):
    """A rotation maps a plane into 1000 dimensions: the distance stays, where roots of covariances lose digits."""
    a, b = generator.normal(size=(50, 2)), 2 * generator.normal(size=(60, 2)) + 1
    basis, _ = np.linalg.qr(generator.normal(size=(1000, 2)))
    assert_allclose(
        frechet_distance(a @ basis.T, b @ basis.T, resamples=0).value, frechet_by_covariances(a, b), rtol=1e-12
    )


def test_frechet_distance_equals_that_of_torch_fidelity(generator):
    a, b = generator.normal(size=(300, 64)), 0.1 + 1.2 * generator.normal(size=(400, 64))
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    peer = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert_allclose(frechet_distance(a, b, resamples=0).value, peer, rtol=1e-10)


def test_frechet_distance_of_equal_sets_is_zero(generator):
    a = generator.normal(size=(200, 500)).astype(np.float32)
    found = frechet_distance(a, a[::-1])
    assert found.value < 1e-9
    assert found.low == 0


def test_linear_bootstrap_of_the_frechet_distance_has_the_spread_of_the_full_one(generator):
    draw_a, draw_b, _ = unequal_gaussians(generator)
    a, b = draw_a(500), draw_b(500)
    found = frechet_distance(a, b, resamples=4000)
    full = [frechet_by_covariances(*(x[generator.integers(500, size=500)] for x in (a, b))) for _ in range(1500)]
    assert_allclose((found.high - found.low) / (2 * intervals.Z), np.std(full), rtol=0.08)


def test_row_influences_are_derivatives_of_the_frechet_distance(generator):
    """Finite differences by the weight of a row agree, for n above and below d."""
    from rin_video.evaluation import distances as module

    for n in (200, 5):
        a, b = generator.normal(size=(n, D)), generator.normal(size=(7, D)) + 0.5
        mean_a, mean_b = a.mean(0), b.mean(0)
        root_a, root_b = module.covariance_root(a, mean_a), module.covariance_root(b, mean_b)
        _, s, vt = np.linalg.svd(root_a @ root_b.T, full_matrices=False)
        kept = s > 1e-12 * s[0]
        projection = root_b.T @ (vt[kept].T / np.sqrt(s[kept]))
        found = module.row_influences(a, mean_a, 2 * (mean_a - mean_b), projection)

        def by_weights(weights, a=a, b=b, n=n):
            weights = weights / weights.sum()
            mean = weights @ a
            rows = (a - mean) * np.sqrt(weights * n / (n - 1))[:, None]
            others = (b - b.mean(0)) / math.sqrt(len(b) - 1)
            nuclear = np.linalg.svd(rows @ others.T, compute_uv=False).sum()
            return ((mean - b.mean(0)) ** 2).sum() + (rows**2).sum() + (others**2).sum() - 2 * nuclear

        for row in range(3):
            step = 1e-5 * np.eye(n)[row]
            derivative = (by_weights(1 + step) - by_weights(1 - step)) / 2e-5
            assert_allclose((found[row] - found.mean()) / n, derivative, rtol=1e-5, atol=1e-8)


def test_intervals_of_distances_cover_the_truth(generator):
    """Frechet: that of unequal Gaussians. Kernel: that of equal ones, 0, whose interval is wider than it has to be."""
    draw_a, draw_b, truth = unequal_gaussians(generator)
    found = [frechet_distance(draw_a(1500), draw_b(1500), resamples=300, seed=i) for i in range(100)]
    assert 0.90 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99
    found = [kernel_distance(draw_a(100), draw_a(100), resamples=100, seed=i) for i in range(100)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.95
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))  # no bias


def test_groups_widen_the_interval(generator):
    """Eight equal rows per group are one row for the interval: it is that of the rows drawn once."""
    a, b = generator.normal(size=(100, D)), generator.normal(size=(100, D)) * 1.5
    numbers = np.repeat(np.arange(100), 8)
    for distance, tolerance in ((frechet_distance, 0.03), (kernel_distance, 1e-9)):
        once = distance(a, b)
        grouped = distance(a.repeat(8, 0), b.repeat(8, 0), groups_a=numbers, groups_b=numbers)
        alone = distance(a.repeat(8, 0), b.repeat(8, 0))
        assert_allclose(grouped.high - grouped.low, once.high - once.low, rtol=tolerance)
        assert alone.high - alone.low < 0.6 * (grouped.high - grouped.low)
    assert_allclose(grouped.value, once.value, rtol=1e-9)  # pairs of one group are left out of the kernel distance


def kernel_by_hand(a, b):
    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    within = [sum(kernel(x, y) for x, y in permutations(rows, 2)) / (len(rows) * (len(rows) - 1)) for rows in (a, b)]
    return sum(within) - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kernel_distance_is_the_mean_over_all_pairs(generator):
    a, b = generator.normal(size=(5, 3)), generator.normal(size=(7, 3)) + 1
    assert_allclose(kernel_distance(a, b).value, kernel_by_hand(a, b), rtol=1e-12)
    a, b = generator.normal(size=(2, 1100, 16))  # several blocks
    peer = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=1, kid_subset_size=1100)
    assert_allclose(kernel_distance(a, b, resamples=0).value, peer["kernel_inception_distance_mean"], rtol=1e-9)


def test_kernel_distance_bootstrap_resamples_groups(generator):
    """One draw, by hand: each pair of different groups counts by the product of both weights."""
    a, groups = generator.normal(size=(6, 3)), np.array([0, 0, 1, 2, 2, 2])
    b = generator.normal(size=(4, 3))
    from rin_video.evaluation import distances as module
    from rin_video.evaluation.feature_checks import CheckedFeatures

    set_a = CheckedFeatures(a, groups, np.arange(6))
    set_b = CheckedFeatures(b, np.arange(4), np.arange(4))
    weights_a, weights_b = np.array([[2, 1, 0]]), np.array([[0, 1, 3, 0]])
    kernel = (a @ a.T / 3 + 1) ** 3
    within = np.mean([kernel[i, j] for i, j in ((0, 2), (1, 2))])  # of groups 0 and 1, in both orders
    across = np.average((a @ b.T / 3 + 1) ** 3, weights=np.outer([2, 2, 1, 0, 0, 0], [0, 1, 3, 0]))
    assert_allclose(module.kernel_means(set_a, set_a, weights_a, weights_a), within)
    assert_allclose(module.kernel_means(set_a, set_b, weights_a, weights_b), across)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_distances_do_not_depend_on_the_order_of_rows(distance, generator):
    a, b = generator.normal(size=(2, 300, D)).astype(np.float32)
    groups, order = generator.integers(60, size=300), generator.permutation(300)
    found = distance(a, b, groups_a=groups, seed=3)
    assert found == distance(a[order], b[order], groups_a=99 - groups[order], seed=3)
    assert found.low < found.value < found.high
    assert found != distance(a, b, groups_a=groups, seed=4)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((1, D)), None, "the samples has 1 rows"),
        (None, np.eye(D)[:, 1:], "width 7, those of the other set 8"),
        (np.where(np.eye(D) > 0, np.nan, 0), None, "NaN or infinite in 8 of 8 rows, first in row 0"),
        (None, np.where(np.eye(9, D) > 0, np.inf, 0), "the real data are NaN or infinite in 8 of 9 rows"),
        (np.zeros(D), None, "have shape"),
    ],
)
def test_bad_features_are_reported_in_one_line(distance, a, b, message):
    good = np.eye(D)
    with pytest.raises(UsageError, match=message) as caught:
        distance(good if a is None else a, good if b is None else b)
    assert "\n" not in str(caught.value)


def test_samples_without_motion_have_a_distance(generator):
    """Their difference pictures are equal: a Gaussian without variance."""
    b = generator.normal(size=(200, D))
    a = np.full((100, D), 0.5)
    expected = ((0.5 - b.mean(0)) ** 2).sum() + np.trace(np.cov(b.T))
    assert_allclose(frechet_distance(a, b).value, expected)
    assert frechet_distance(b, a).low > 0
    assert kernel_distance(a, b).low > 0


def test_groups_of_another_length_are_refused_and_a_single_one_is_none(generator):
    a, b = generator.normal(size=(2, 20, D))
    with pytest.raises(UsageError, match="20 rows, but its groups have shape"):
        frechet_distance(a, b, groups_a=np.arange(19))
    assert kernel_distance(a, b, groups_b=np.zeros(20)) == kernel_distance(a, b)


def test_floor_is_the_distance_between_halves_of_the_files(generator):
    """Every half has files of its own: rows of a file are near a centre, and no centre is in both halves."""
    groups = np.repeat(np.arange(30), generator.integers(1, 9, size=30))
    rows = generator.normal(size=(30, D))[groups] + 1e-3 * generator.normal(size=(len(groups), D))
    seen = []

    def nearest(a, b, resamples, groups_a=None, groups_b=None):
        seen.append((len(a), len(b)))
        assert groups_a is None or not set(groups_a) & set(groups_b)
        return np.sqrt(((a[:, None] - b) ** 2).sum(-1)).min()

    value, used = real_floor(nearest, rows, groups, n=1000)
    assert value > 0.05
    assert set(seen) == {(used, used)}
    assert len(seen) == 4
    assert len(groups) // 2 - 8 <= used <= len(groups) // 2
    assert real_floor(nearest, rows, groups, n=10)[1] == 10
    order = generator.permutation(len(rows))
    assert real_floor(nearest, rows[order], groups[order], n=10) == real_floor(nearest, rows, groups, n=10)
    both = real_floor(lambda a, b, **_: {"x": nearest(a, b, 0)}, rows, groups, n=10)
    assert both == ({"x": real_floor(nearest, rows, groups, n=10)[0]}, 10)
    assert real_floor(nearest, rows, np.zeros(len(rows)), n=10) is None  # one file has no second half
    assert real_floor(nearest, rows[:3], None, n=10) is None


@pytest.mark.parametrize(("n", "d"), [(64, 256), (192, 256), (256, 256), (768, 256), (2000, 256)])
def test_warning_of_few_samples_names_the_bias(generator, n, d):
    text = too_few(n, d)
    assert text.startswith(f"{n} samples are few for {d} features")
    assert ("singular" in text) == (n <= d)
    a, b = generator.normal(size=(2, n, d))
    share = (frechet_distance(a, b, resamples=0).value - 2 * d / n) / d
    assert_allclose(int(text.partition("%")[0].rpartition(" ")[2]), 100 * share, atol=3)
    assert not too_few(10 * d, d)


def test_mean_and_ratio_cover_the_truth_of_few_groups(generator):
    """Percentiles widened by Student's factor cover the mean of 6 groups of unequal size."""
    hits, narrow, ratios = [], [], []
    for seed in range(150):
        groups = np.repeat(np.arange(6), [4, 5, 6, 7, 8, 9])
        values = 1 + generator.normal(size=6)[groups] + 0.1 * generator.normal(size=len(groups))
        found = intervals.mean(values, groups, resamples=300, seed=seed)
        hits.append(found.low <= 1 <= found.high)
        alone = intervals.mean(values, resamples=300, seed=seed)
        narrow.append(alone.low <= 1 <= alone.high)
        bottom = 1 + generator.random(100)
        ratio = intervals.ratio_of_means(bottom * 2 + generator.normal(size=100), bottom, resamples=300, seed=seed)
        ratios.append(ratio.low <= 2 <= ratio.high)
    assert 0.90 <= np.mean(hits) <= 0.98
    assert np.mean(narrow) < 0.75
    assert 0.92 <= np.mean(ratios) <= 0.98


@pytest.mark.parametrize(("num_groups", "quantile"), [(4, 3.1824), (6, 2.5706), (11, 2.2281), (101, 1.9840)])
def test_student_factor(num_groups, quantile):
    expected = quantile / intervals.Z * math.sqrt(num_groups / (num_groups - 1))
    assert_allclose(intervals.student_factor(num_groups), expected, rtol=0.011 if num_groups == 4 else 0.002)


def wilson(p, n):
    """Return the two solutions x of |p - x| = z sqrt(x (1 - x) / n)."""
    z2 = intervals.Z**2
    return tuple(sorted(np.roots([1 + z2 / n, -2 * p - z2 / n, p**2])))


def test_share_has_wilsons_interval():
    assert_allclose(accuracy([1, 1, 2, 3], [1, 1, 2, 0]), (0.75, 0.3006, 0.9544), atol=1e-4)  # Newcombe 1998, method 3
    assert_allclose(accuracy(np.arange(20), np.arange(20)), (1, 0.8389, 1), atol=1e-4)
    assert accuracy(np.arange(2100), np.arange(2100)).high == 1
    groups = np.repeat(np.arange(5), 4)
    assert_allclose(accuracy(np.arange(20), np.arange(20), groups=groups), (1, 0.5655, 1), atol=1e-4)  # 5 of 5
    alike = intervals.share(np.repeat([True, False, True, True, False], 4), groups)
    assert alike[1:] == pytest.approx(wilson(0.6, 4), abs=1e-9)  # 5 groups; the variance between them has 4 degrees
    both = intervals.share([True] * 12 + [False] * 8, judges=30)
    assert both[1:] == pytest.approx(wilson(0.6, 12))  # 1/20 + 1/30 = 1/12
    with pytest.raises(UsageError, match="labels"):
        accuracy([1, 2], [1])


def test_inception_score(generator):
    sure = np.eye(4).repeat(5, 0)
    assert_allclose(inception_score(sure), (4, 4, 4), rtol=0.2)
    assert_allclose(inception_score(sure).value, 4)
    assert_allclose(inception_score(np.full((20, 4), 0.25)), (1, 1, 1))
    scores = generator.normal(size=(500, 10)) * 2
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    peer = isc_features_to_metric(torch.from_numpy(scores), splits=1)["inception_score_mean"]
    found = inception_score(p)
    assert_allclose(found.value, peer, rtol=1e-10)
    resampled = []
    for _ in range(500):
        q = p[generator.integers(500, size=500)]
        resampled.append(math.exp((q * np.log(q / q.mean(0))).sum(1).mean()))
    assert_allclose((found.high - found.low) / (2 * intervals.Z), np.std(resampled), rtol=0.12)
    with pytest.raises(UsageError, match="add up to 1"):
        inception_score(scores)
