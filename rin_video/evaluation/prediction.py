"""Scores of predictions: errors against the true frames, against simple guesses, and what becomes of moving things."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rin_video.errors import UsageError
from rin_video.evaluation.frame_errors import WINDOW, psnr, squared_errors, ssim
from rin_video.evaluation.intervals import RESAMPLES, Array, Estimate, mean, ratio_of_means

MOVING = 0.1  # deviation from the median picture, of values in [0, 1], from which a pixel counts as moving


class PredictionScores:
    """Collects the scores of predicted clips, batch by batch; only numbers are kept.

    All scores are those of frames `given` to F - 1, and of values in [0, 1]. A frame's PSNR is 100 dB at most. Names of
    scores of a guess begin with its name: `copy` repeats the last given frame, `linear` continues the change between
    the last two given frames (for `given` of 2 or more), clipped to [0, 1].

    - `squared_error`, `psnr`, `ssim`: mean over frames and clips, of the first sample of each clip
    - `best_squared_error`, `best_psnr`, `best_ssim`: of the best sample of each clip, each by its own measure, if there
      are several
    - `squared_error_over_copy`, `squared_error_over_linear`: mean squared error over that of the guess; below 1 is
      better than the guess
    - `moving_recall`, `moving_precision`: see `moving_overlap`

    `notes` says which scores are missing and why.
    """

    def __init__(self, given: int) -> None:
        if given < 1:
            raise UsageError(f"{given} frames are given, predictions need 1 at least")
        self.given = given
        self.notes: list[str] = []
        self._shape: tuple[int, ...] | None = None
        self._values: dict[str, list[float]] = defaultdict(list)
        self._groups: list[int] = []

    def update(self, truth: ArrayLike, samples: ArrayLike, groups: ArrayLike | None = None) -> None:
        """Add clips (n, C, F, H, W) and m predictions of each (n, m, C, F, H, W), uint8 or in [0, 1].

        `groups` (n,) number the files of the clips, for intervals that know that clips of one file are alike.

        Raises:
            UsageError: shapes that differ, too few frames, or values outside of [0, 1].
        """
        truth, samples = np.asarray(truth), np.asarray(samples)
        if truth.ndim != 5 or samples.ndim != 6 or samples.shape[:1] + samples.shape[2:] != truth.shape:
            raise UsageError(
                f"predictions have shape {samples.shape} and the clips {truth.shape}: (n, samples, C, F, H, W) and "
                "(n, C, F, H, W) of the same n, C, F, H, W are needed"
            )
        shape = (samples.shape[1], *truth.shape[1:])
        if self._shape not in (None, shape):
            raise UsageError(f"clips have shape (samples, C, F, H, W) {shape}, those before {self._shape}: use one")
        if shape[2] <= self.given:
            raise UsageError(f"clips of {shape[2]} frames, {self.given} of them given, have none to predict")
        if self._shape is None:
            self._note_missing(shape)
        self._shape = shape
        numbers = range(len(self._groups), len(self._groups) + len(truth)) if groups is None else np.asarray(groups)
        for clip, drawn, group in zip(truth, samples, numbers, strict=True):
            self._add(pixels(clip, "the clips"), pixels(drawn, "the predictions"))
            self._groups.append(int(group))

    def compute(self, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
        """Return the scores over all clips, with intervals by clip or by group.

        Raises:
            UsageError: fewer than 2 clips.
        """
        values = {name: np.array(numbers) for name, numbers in self._values.items()}

        def ratio(top: str, bottom: str) -> Estimate:
            return ratio_of_means(
                values[top], values[bottom], self._groups, resamples=resamples, seed=seed, name="predictions"
            )

        found = {
            name: mean(numbers, self._groups, resamples=resamples, seed=seed, name="predictions")
            for name, numbers in values.items()
            if not name.startswith("_")
        }
        guesses = [name for name in ("copy", "linear") if f"{name}_squared_error" in found]
        for guess in guesses:
            if values[f"{guess}_squared_error"].any():
                found[f"squared_error_over_{guess}"] = ratio("squared_error", f"{guess}_squared_error")
            else:
                self._note(f"squared_error_over_{guess} is missing: the guess has no error in any clip")
        for name in ("", *(f"{guess}_" for guess in guesses)):
            for score in ("recall", "precision"):
                if values[f"_{name}{score}_whole"].any():
                    found[f"{name}moving_{score}"] = ratio(f"_{name}{score}_part", f"_{name}{score}_whole")
                else:
                    where = "the true frames" if score == "recall" else "the prediction"
                    self._note(f"{name}moving_{score} is missing: nothing in {where} moves by more than {MOVING}")
        return found

    def _add(self, truth: Array, samples: Array) -> None:
        """Add the numbers of one clip (C, F, H, W) and its samples (m, C, F, H, W)."""
        future, predicted = truth[:, self.given :], samples[:, :, self.given :]
        still = np.median(truth, 1, keepdims=True)
        errors = self._errors(predicted, future)
        for name, numbers in errors.items():
            self._values[name].append(float(numbers[0]))
            if len(samples) > 1:
                best: Callable[..., float] = np.min if name == "squared_error" else np.max
                self._values[f"best_{name}"].append(float(best(numbers)))
        self._add_moving("", predicted[0], future, still)
        for guess, frames in guesses(truth, self.given).items():
            for name, numbers in self._errors(frames[None], future).items():
                self._values[f"{guess}_{name}"].append(float(numbers[0]))
            self._add_moving(f"{guess}_", frames, future, still)

    def _errors(self, predicted: Array, future: Array) -> dict[str, Array]:
        """Return the mean over frames of each measure, (m,) for samples (m, C, F, H, W)."""
        squared = squared_errors(predicted, future)
        found = {"squared_error": squared.mean(1), "psnr": psnr(squared).mean(1)}
        if min(future.shape[-2:]) >= WINDOW:
            found["ssim"] = ssim(predicted, future).mean(1)
        return found

    def _add_moving(self, name: str, predicted: Array, future: Array, still: Array) -> None:
        """Add parts and wholes of recall and precision of what moves."""
        for score, (a, b) in {"recall": (future, predicted), "precision": (predicted, future)}.items():
            part, whole = moving_overlap(a - still, b - still)
            self._values[f"_{name}{score}_part"].append(part)
            self._values[f"_{name}{score}_whole"].append(whole)

    def _note_missing(self, shape: tuple[int, ...]) -> None:
        if min(shape[-2:]) < WINDOW:
            self._note(
                f"ssim is missing: frames of {shape[-2]}x{shape[-1]} are smaller than its {WINDOW}x{WINDOW} window"
            )
        if self.given < 2:
            self._note("linear extrapolation is missing: it needs 2 given frames")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def guesses(truth: Array, given: int) -> dict[str, Array]:
    """Return the frames (C, F - given, H, W) that follow a clip (C, F, H, W) by copying and by linear extrapolation."""
    last = truth[:, given - 1 : given]
    steps = np.arange(1, truth.shape[1] - given + 1).reshape(-1, 1, 1)
    found = {"copy": np.repeat(last, len(steps), 1)}
    if given > 1:
        found["linear"] = (last + (last - truth[:, given - 2 : given - 1]) * steps).clip(0, 1)
    return found


def moving_overlap(deviation: Array, other: Array) -> tuple[float, float]:
    """Return how much of a deviation from the median picture another one has in its place, and how much there is.

    Deviations are those of frames from the median picture of the true clip, over all its frames: what moves, without
    what stands still. Values of at most 0.1 do not count. The part is the sum of clip(other sign(deviation), 0,
    |deviation|), the whole that of |deviation|. Part over whole of (true, predicted) is the **recall of what moves**:

    - 1 for the true frames, 0 for the median picture, in which moving things vanished;
    - for moving things in another place, the share of them that overlaps; for the wrong sign, 0;
    - also 1 for frames in which everything is painted. Part over whole of (predicted, true), the **precision of what
      moves**, is then low: it is the share of the predicted deviation that is true.
    """
    size = np.abs(deviation)
    size *= size > MOVING
    part = np.clip(other * np.sign(deviation), 0, size)
    return float(part.sum()), float(size.sum())


def pixels(frames: np.ndarray, name: str) -> Array:
    """Return uint8 or float frames as float64 in [0, 1].

    Raises:
        UsageError: values outside of [0, 1], or NaN.
    """
    if frames.dtype == np.uint8:
        return frames / 255
    frames = np.asarray(frames, np.float64)
    if not (frames.min() >= 0 and frames.max() <= 1):  # also for NaN
        low, high = frames.min(), frames.max()
        raise UsageError(f"values of {name} lie from {low:g} to {high:g}: uint8 or floats in [0, 1] are needed")
    return frames
