"""Precision, recall, density, coverage and memorisation: against brute force, a peer, and sets made for the purpose."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch_fidelity.metric_prc import prc_features_to_metric

from rin_video import UsageError
from rin_video.evaluation import memorisation as memorisation_module
from rin_video.evaluation.distances import kernel_distance
from rin_video.evaluation.floors import real_floor
from rin_video.evaluation.intervals import Z
from rin_video.evaluation.memorisation import memorisation, nearest
from rin_video.evaluation.neighbours import neighbour_scores

D = 8


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def scores_by_hand(samples, real, k, groups=None):
    """Return the four scores by loops, with neighbours from other groups of the real data only."""
    groups = range(len(real)) if groups is None else groups

    def ball(rows, i, own):
        return sorted(math.dist(rows[i], rows[j]) for j in range(len(rows)) if own[j] != own[i])[k - 1]

    sample_balls = [ball(samples, i, range(len(samples))) for i in range(len(samples))]
    real_balls = [ball(real, i, groups) for i in range(len(real))]
    inside = np.array([[math.dist(x, y) <= r for y, r in zip(real, real_balls, strict=True)] for x in samples])
    reached = np.array([[math.dist(x, y) <= r for y in real] for x, r in zip(samples, sample_balls, strict=True)])
    return {
        "precision": inside.any(1).mean(),
        "recall": reached.any(0).mean(),
        "density": inside.sum() / (k * len(samples)),
        "coverage": inside.any(0).mean(),
    }


def values(scores):
    return {name: estimate.value for name, estimate in scores.items()}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_scores_equal_brute_force(generator, k):
    samples, real = generator.normal(size=(30, 3)) * 1.3, generator.normal(size=(40, 3)) + 0.5
    groups = generator.integers(12, size=40)
    assert_allclose(
        [*values(neighbour_scores(samples, real, k)).values()], [*scores_by_hand(samples, real, k).values()]
    )
    found, expected = neighbour_scores(samples, real, k, groups_b=groups), scores_by_hand(samples, real, k, groups)
    assert_allclose([*values(found).values()], [*expected.values()])


def test_precision_and_recall_equal_those_of_torch_fidelity(generator):
    """Several blocks of rows, far from the origin."""
    samples, real = 50 + generator.normal(size=(1100, D)) * 1.2, 50 + generator.normal(size=(1300, D))
    peer = prc_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=5000, save_cpu_ram=False
    )
    found = values(neighbour_scores(samples, real, 3))
    assert_allclose([found["precision"], found["recall"]], [peer["precision"], peer["recall"]], rtol=1e-6)


def test_neighbour_scores_of_known_sets(generator):
    real = generator.normal(size=(200, D)).astype(np.float32)
    copies = values(neighbour_scores(real[::-1], real))
    assert copies == {
        "precision": 1,
        "recall": 1,
        "density": pytest.approx(6 / 5),
        "coverage": 1,
    }  # k others and itself
    far = values(neighbour_scores(real + 100, real))
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    modes = np.concatenate([real[:100], real[:100] + 50])
    dropped = values(neighbour_scores(real[100:], modes))  # one of two modes
    assert dropped["recall"] <= 0.5
    assert dropped["coverage"] <= 0.5
    assert dropped["precision"] > 0.8


def test_groups_keep_copies_of_a_file_from_shrinking_the_balls(generator):
    """Of eight clips per file that are nearly equal, the fifth neighbour is one of the file, or of the next file."""
    centres, groups = generator.normal(size=(40, D)), np.repeat(np.arange(40), 8)
    real = centres[groups] + 1e-3 * generator.normal(size=(320, D))
    samples = generator.normal(size=(100, D))
    assert neighbour_scores(samples, real)["precision"].value < 0.1
    grouped = neighbour_scores(samples, real, groups_b=groups)
    once = neighbour_scores(samples, centres, k=1)
    assert_allclose(grouped["precision"], once["precision"], atol=0.03)
    assert_allclose(grouped["coverage"], once["coverage"], atol=0.03)  # the interval is that of 40 files
    with pytest.raises(UsageError, match=r"k = 5 need at least 5 neighbours .* has 4 \(20 rows, 16 in one file\)"):
        neighbour_scores(samples, real[:20], groups_b=np.repeat(np.arange(5), [16, 1, 1, 1, 1]))


@pytest.mark.parametrize(("sizes", "at_most"), [((200, 200), 1.6), ((60, 400), 3)])
def test_intervals_have_the_spread_of_repeated_draws(generator, sizes, at_most):
    """Both sets are drawn again, so also what the other set decides varies."""
    n, m = sizes
    drawn = [
        neighbour_scores(generator.normal(size=(n, D)), generator.normal(size=(m, D)) * 0.8, resamples=200)
        for _ in range(60)
    ]
    for name in ("precision", "density", "coverage"):
        spread = np.std([one[name].value for one in drawn])
        width = np.mean([one[name].high - one[name].low for one in drawn]) / (2 * Z)
        assert 0.7 * spread < width < at_most * spread, name


def test_neighbour_scores_and_memorisation_do_not_depend_on_the_order_of_rows(generator):
    a, b, c = generator.normal(size=(3, 150, D)).astype(np.float32)
    groups, order = generator.integers(60, size=150), generator.permutation(150)
    found = neighbour_scores(a, b, groups_a=groups, seed=1)
    assert found == neighbour_scores(a[order], b[::-1], groups_a=groups[order], seed=1)
    first = memorisation(a, b, c, groups_a=groups, seed=1)
    second = memorisation(a[order], b[::-1], c[order], groups_a=groups[order], seed=1)
    assert first[:3] == second[:3]
    assert [(order[i], 149 - j) for i, j in second.pairs] == first.pairs


def test_floor_of_neighbours_and_kernel_knows_the_files(generator):
    """With the groups of both halves, the kernel distance of real data has a floor about 0, and balls reach others."""
    groups = np.repeat(np.arange(60), 8)
    real = generator.normal(size=(60, D))[groups] + 1e-3 * generator.normal(size=(480, D))
    value, used = real_floor(kernel_distance, real, groups, n=500)
    unaware, _ = real_floor(lambda a, b, **_: kernel_distance(a, b, resamples=0), real, groups, n=500)
    assert used == 240
    assert abs(value) < 0.3 * unaware
    floors, _ = real_floor(neighbour_scores, real, groups, n=500)
    alone, _ = real_floor(lambda a, b, **_: neighbour_scores(a, b), real, groups, n=500)
    assert alone["precision"] < 0.1 < 0.4 < floors["precision"]
    assert set(floors) == {"precision", "recall", "density", "coverage"}


def test_floor_chooses_whole_samples(generator):
    """Half of the rows of a half: with units, all frames of half of the samples."""
    units = np.repeat(np.arange(80), 4)
    rows = generator.normal(size=(80, D))[units] + 1e-3 * generator.normal(size=(320, D))
    seen = []

    def count(a, b, **_):
        alike = np.linalg.norm(a[:, None] - a, axis=-1) < 0.1
        seen.append(len(np.unique(alike, axis=0)))
        return len(b)

    real_floor(count, rows, units, n=80, splits=1, units=units)
    assert seen[-1] == 20
    real_floor(count, rows, units, n=80, splits=1)
    assert seen[-1] > 25


def test_nearest_is_exact_far_from_the_origin(generator):
    rows, others = 1000 + generator.normal(size=(1100, 3)), 1000 + generator.normal(size=(1200, 3))
    others[1150] = rows[5]
    distances, index = nearest(rows, others)
    pairs = np.linalg.norm(rows[:, None] - others, axis=-1)
    assert_array_equal(index, pairs.argmin(1))
    assert_allclose(distances, pairs.min(1), rtol=1e-12)
    assert (distances[5], index[5]) == (0, 1150)


def test_memorisation_tells_copies_from_new_samples(generator):
    train, held_out = generator.normal(size=(400, D)), generator.normal(size=(200, D))
    new = memorisation(generator.normal(size=(300, D)), train, held_out)
    assert new.ratio.low < 1 < new.ratio.high
    assert new.low_ratio.low < 1 < new.low_ratio.high
    assert new.share_closer.value < 0.04
    copies = memorisation(train[100:140] + 1e-6 * generator.normal(size=(40, D)), train, held_out)
    assert copies.ratio.high < 1e-4
    assert copies.share_closer.value == 1
    assert [j - i for i, j in copies.pairs] == [100] * 8
    mixed = memorisation(np.concatenate([generator.normal(size=(170, D)), train[:30]]), train, held_out)
    assert mixed.ratio.high < 1.05
    assert mixed.ratio.low > 0.5  # the median of 15 % of copies is that of new samples
    assert mixed.low_ratio.value == 0
    assert 0.14 <= mixed.share_closer.value < 0.19
    assert {i for i, _ in mixed.pairs} <= {*range(170, 200)}
    with pytest.raises(UsageError, match="60 of 200 held-out samples are in the training data"):
        memorisation(train[:50] + 1, train, np.concatenate([train[:60], held_out[:140]]))


def test_interval_of_the_memorisation_ratio_covers_one(generator):
    """Clips of one file are alike: the interval is that of 50 files."""
    numbers = np.repeat(np.arange(50), 4)
    hits = []
    for seed in range(80):
        samples, held_out, train = (
            generator.normal(size=(n, D))[groups] + 1e-3 * generator.normal(size=(len(groups), D))
            for n, groups in ((50, numbers), (50, numbers), (100, np.arange(100)))
        )
        found = memorisation(
            samples, train, held_out, groups_a=numbers, groups_b=numbers, resamples=200, seed=seed
        ).ratio
        hits.append(found.low <= 1 <= found.high)
    assert np.mean(hits) >= 0.9


def test_weighted_quantiles_are_those_of_repeated_values(generator):
    values, groups = generator.normal(size=9), np.array([0, 0, 0, 1, 2, 2, 3, 3, 3])
    weights = generator.integers(4, size=(100, 4)) + 1
    for q in (0.1, 0.5):
        found = memorisation_module.weighted_quantiles(values, groups, weights, q)
        expected = [np.quantile(np.repeat(values, row[groups]), q, method="inverted_cdf") for row in weights]
        assert_array_equal(found, expected)
