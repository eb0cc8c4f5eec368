"""Scores of predictions: against loops, and clips of a moving square whose scores are computed by hand."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rin_video import UsageError
from rin_video.evaluation.frame_errors import psnr, ssim
from rin_video.evaluation.prediction import PredictionScores, guesses, moving_overlap

FRAMES, GIVEN, SIZE, STEP = 8, 2, 24, 2
GROUND, SQUARE, WIDTH = 0.2, 0.9, 4


def moving_square(row=0, value=SQUARE, width=WIDTH):
    """Return a clip (1, 8, 24, 24) whose square starts at the left and moves right by half its width per frame."""
    clip = np.full((1, FRAMES, SIZE, SIZE), GROUND)
    for frame in range(FRAMES):
        clip[:, frame, row : row + WIDTH, STEP * frame : STEP * frame + width] = value
    return clip


TRUTH = np.stack([moving_square(0), moving_square(9), moving_square(20)])


def scores(predicted, truth=TRUTH, given=GIVEN):
    return scores_of_samples(truth, np.asarray(predicted)[:, None], given)


def scores_of_samples(truth, samples, given):
    found = PredictionScores(given)
    found.update(truth, samples)
    return {name: estimate.value for name, estimate in found.compute(resamples=20).items()}


def test_perfect_prediction():
    found = scores(TRUTH)
    assert found["squared_error"] == found["squared_error_over_copy"] == 0
    assert found["psnr"] == 100
    assert_allclose([found["ssim"], found["moving_recall"], found["moving_precision"]], 1, rtol=1e-12)


def test_copying_and_extrapolation_by_hand():
    """The copy overlaps the square by half in the first frame after it, of 6; frames have 16 pixels that move."""
    found = scores(np.repeat(TRUTH[:, :, GIVEN - 1 : GIVEN], FRAMES, 2))
    assert_allclose(found["moving_recall"], 1 / 12)
    assert_allclose(found["moving_precision"], 1 / 12)
    difference = (SQUARE - GROUND) ** 2
    assert_allclose(found["squared_error"], difference * (16 + 5 * 32) / 6 / SIZE**2)
    per_frame = [10 * math.log10(SIZE**2 / (difference * count)) for count in (16, *[32] * 5)]
    assert_allclose(found["psnr"], np.mean(per_frame))
    for name in ("psnr", "ssim", "squared_error", "moving_recall", "moving_precision"):
        assert_allclose(found[f"copy_{name}"], found[name], rtol=1e-12)
    assert_allclose(found["squared_error_over_copy"], 1)
    # The line: columns 0 and 1 fall from 0.2 to 0, 2 and 3 stay at 0.9, 4 and 5 rise to 1. True there: 4 to 7, once.
    assert_allclose(found["linear_moving_recall"], 1 / 12)
    assert_allclose(found["linear_moving_precision"], 2 * 0.7 / (6 * 2 * (0.2 + 0.7 + 0.8)))
    first = 2 * 0.2**2 + 2 * 0.7**2 + 2 * 0.1**2 + 2 * 0.7**2
    later = 2 * 0.2**2 + 2 * 0.7**2 + 2 * 0.8**2 + 4 * 0.7**2
    # In the third frame (6 to 9) and later ones nothing overlaps.
    assert_allclose(found["linear_squared_error"], WIDTH * (first + 5 * later) / 6 / SIZE**2)
    assert_allclose(found["squared_error_over_linear"], found["squared_error"] / found["linear_squared_error"])


@pytest.mark.parametrize(
    ("value", "width", "recall", "precision"),
    [
        (SQUARE, WIDTH // 2, 0.5, 1),  # half of the square
        (GROUND + 0.35, WIDTH, 0.5, 1),  # half of its contrast
        (1.0, WIDTH, 1, 0.7 / 0.8),  # too much of it
        (0.0, WIDTH, 0, 0),  # the wrong sign
        (SQUARE, SIZE, 1, None),  # a bar painted over all that follows
    ],
)
def test_recall_and_precision_of_a_square(value, width, recall, precision):
    predicted = np.stack([moving_square(row, value, width) for row in (0, 9, 20)])
    found = scores(predicted)
    assert_allclose(found["moving_recall"], recall, atol=1e-12)
    if precision is None:
        precision = 6 * WIDTH / sum(SIZE - STEP * frame for frame in range(GIVEN, FRAMES))
    assert_allclose(found["moving_precision"], precision, atol=1e-12)


def test_painting_everything_and_nothing():
    everything = scores(np.full_like(TRUTH, SQUARE))
    assert_allclose(everything["moving_recall"], 1)
    assert_allclose(everything["moving_precision"], WIDTH**2 / SIZE**2)
    found = PredictionScores(GIVEN)
    found.update(TRUTH, np.full_like(TRUTH, GROUND + 0.09)[:, None])  # the median picture, a little too bright
    wiped = found.compute(resamples=20)
    assert_allclose(wiped["moving_recall"].value, 0.09 / 0.7)
    assert "moving_precision" not in wiped
    assert found.notes == ["moving_precision is missing: nothing in the prediction moves by more than 0.1"]
    assert scores(np.full_like(TRUTH, GROUND))["moving_recall"] == 0


def test_overlap_of_signs():
    """Of deviations 0.5, -0.4 and 0.05, the last is too small; 0.2 of the first and all of the second are predicted."""
    part, whole = moving_overlap(np.array([0.5, -0.4, 0.05]), np.array([0.2, -0.9, 0.05]))
    assert_allclose((part, whole), (0.2 + 0.4, 0.9))
    assert moving_overlap(np.array([0.5, -0.4]), np.array([-0.5, 0.4]))[0] == 0


def test_a_still_clip_has_no_recall_and_no_ratio():
    still = np.full((3, 3, 6, 16, 16), 128, np.uint8)
    found = PredictionScores(1)
    found.update(still, still[:, None] + 9)
    names = found.compute(resamples=20)
    assert {*names} == {"squared_error", "psnr", "ssim", "copy_squared_error", "copy_psnr", "copy_ssim"}
    assert_allclose(names["squared_error"].value, (9 / 255) ** 2)
    assert len([note for note in found.notes if "moving" in note]) == 4
    assert "squared_error_over_copy is missing: the guess has no error in any clip" in found.notes
    assert "linear extrapolation is missing: it needs 2 given frames" in found.notes


def ssim_by_hand(x, y):
    """Return the mean over all windows of two pictures (H, W), by loops."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
            found.append(
                (2 * mean_p * mean_q + 1e-4)
                * (2 * covariance + 9e-4)
                / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))
            )
    return np.mean(found)


def test_ssim_and_psnr_equal_loops():
    generator = np.random.default_rng(0)
    truth = generator.random((3, 2, 13, 12))
    predicted = (truth + 0.2 * generator.normal(size=(4, *truth.shape))).clip(0, 1)
    expected = [
        [np.mean([ssim_by_hand(predicted[m, c, f], truth[c, f]) for c in range(3)]) for f in range(2)] for m in range(4)
    ]
    assert_allclose(ssim(predicted, truth), expected, rtol=1e-12)
    assert_allclose(psnr(np.array([0.01, 1.0, 0.0])), [20, 0, 100], atol=1e-12)


def test_best_of_several_samples_is_taken_by_clip_and_measure():
    generator = np.random.default_rng(0)
    truth = generator.random((5, 3, 6, 16, 16))
    samples = (truth[:, None] + generator.normal(size=(5, 4, 3, 6, 16, 16)) * 0.1).clip(0, 1)
    found = PredictionScores(2)
    found.update(truth, samples)
    values = found.compute(resamples=20)
    future, predicted = truth[:, :, 2:], samples[:, :, :, 2:]
    errors = ((predicted - future[:, None]) ** 2).mean((2, 3, 4, 5))
    assert_allclose(values["squared_error"].value, errors[:, 0].mean())
    assert_allclose(values["best_squared_error"].value, errors.min(1).mean())
    by_frame = 10 * np.log10(1 / ((predicted - future[:, None]) ** 2).mean((2, 4, 5)))
    assert_allclose(values["best_psnr"].value, by_frame.mean(2).max(1).mean())
    similar = np.array([ssim(s, t) for s, t in zip(predicted, future, strict=True)]).mean(2)
    assert_allclose(values["best_ssim"].value, similar.max(1).mean())


def test_guesses():
    clip = np.array([0.1, 0.3, 0.4, 0.9, 0.0]).reshape(1, 5, 1, 1)
    found = guesses(clip, 3)
    assert_allclose(found["copy"].ravel(), [0.4, 0.4])
    assert_allclose(found["linear"].ravel(), [0.5, 0.6])
    assert_allclose(guesses(clip, 2)["linear"].ravel(), [0.5, 0.7, 0.9])
    assert_allclose(guesses(clip, 4)["linear"].ravel(), [1.0])
    assert {*guesses(clip, 1)} == {"copy"}


def test_batches_types_and_order_make_no_difference():
    generator = np.random.default_rng(0)
    truth = generator.integers(256, size=(6, 1, 5, 12, 14), dtype=np.uint8)
    samples = generator.integers(256, size=(6, 2, 1, 5, 12, 14), dtype=np.uint8)
    first, second = PredictionScores(2), PredictionScores(2)
    first.update(truth, samples)
    order = [4, 0, 5, 2, 1, 3]
    for rows in (order[:1], order[1:]):
        second.update(truth[rows].astype(np.float32) / np.float32(255), samples[rows])
    one, two = first.compute(), second.compute()
    assert one.keys() == two.keys()
    assert_allclose([*one.values()], [*two.values()], rtol=1e-6)
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in one.values())


def test_intervals_count_files():
    """Four equal clips per file have the interval of one clip per file."""
    generator = np.random.default_rng(0)
    truth, samples = generator.random((8, 1, 4, 12, 12)), generator.random((8, 1, 1, 4, 12, 12))
    once, often = PredictionScores(2), PredictionScores(2)
    once.update(truth, samples)
    for _ in range(4):
        often.update(truth, samples, groups=np.arange(8))
    one, four = once.compute(), often.compute()
    assert one.keys() == four.keys()
    assert_allclose([*four.values()], [*one.values()], rtol=1e-9)


@pytest.mark.parametrize(
    ("truth", "samples", "given", "message"),
    [
        (np.zeros((2, 1, 4, 8, 8)), np.zeros((2, 1, 1, 4, 8, 9)), 2, "predictions have shape"),
        (np.zeros((2, 1, 4, 8, 8)), np.zeros((2, 1, 4, 8, 8)), 2, "predictions have shape"),
        (np.zeros((2, 1, 4, 8, 8)), np.zeros((2, 1, 1, 4, 8, 8)), 4, "clips of 4 frames, 4 of them given"),
        (
            np.zeros((2, 1, 4, 8, 8)),
            np.full((2, 1, 1, 4, 8, 8), 1.5),
            2,
            "values of the predictions lie from 1.5 to 1.5",
        ),
        (np.full((2, 1, 4, 8, 8), np.nan), np.zeros((2, 1, 1, 4, 8, 8)), 2, "values of the clips lie from nan to nan"),
        (np.zeros((1, 1, 4, 8, 8)), np.zeros((1, 1, 1, 4, 8, 8)), 2, "at least 2"),
    ],
)
def test_bad_predictions_are_reported_in_one_line(truth, samples, given, message):
    with pytest.raises(UsageError, match=message) as caught:
        scores_of_samples(truth, samples, given)
    assert "\n" not in str(caught.value)


def test_frames_smaller_than_the_window_have_no_ssim():
    found = PredictionScores(2)
    found.update(np.zeros((2, 1, 4, 8, 16)), np.zeros((2, 1, 1, 4, 8, 16)))
    assert not [name for name in found.compute() if "ssim" in name]
    assert "ssim is missing: frames of 8x16 are smaller than its 11x11 window" in found.notes
    with pytest.raises(UsageError, match="those before"):
        found.update(np.zeros((2, 1, 4, 16, 16)), np.zeros((2, 1, 1, 4, 16, 16)))
    with pytest.raises(UsageError, match="0 frames are given"):
        PredictionScores(0)
