"""The scores of an evaluation: each with its interval, and the same measure between real samples (the floor)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rin_video.errors import UsageError
from rin_video.evaluation.class_scores import accuracy, inception_score
from rin_video.evaluation.distances import frechet_distance, kernel_distance
from rin_video.evaluation.extraction import Features
from rin_video.evaluation.floors import real_floor, too_few
from rin_video.evaluation.intervals import Estimate
from rin_video.evaluation.memorisation import memorisation
from rin_video.evaluation.neighbours import neighbour_scores
from rin_video.evaluation.probe import train_probe

RESAMPLES = 1000
MAX_ROWS = 4096  # rows of a view that a distance is computed of
NEIGHBOURS = 5  # of precision, recall, density and coverage
MAIN_VIEWS = ("clip", "image")  # views with one row per sample
DISTANCES: dict[str, Callable[..., Estimate]] = {
    "frechet_distance": frechet_distance,
    "kernel_distance": kernel_distance,
}


@dataclass
class Score:
    """A number with its 95 % interval, and its value for real samples."""

    value: float
    low: float
    high: float
    better: str  # "lower", "higher" or "near 1"
    n: int  # number of samples
    floor: float | None = None  # the same measure of real samples against other real samples
    floor_n: int | None = None  # number of samples in each half of the floor

    @classmethod
    def of(cls, estimate: Estimate, better: str, n: int, floor: tuple[float, int] | None = None) -> Score:
        """Make a score of an estimate, and of a floor (value, n)."""
        value, count = floor if floor is not None else (None, None)
        return cls(float(estimate.value), float(estimate.low), float(estimate.high), better, n, value, count)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def distance_scores(samples: Features, real: Features, pool: Features, warn: Callable[[str], None]) -> dict[str, Score]:
    """Return the Frechet and kernel distances of every view.

    `pool` has all real samples, of which disjoint halves (by file) give the floor. `warn` is called if there are too
    few samples for the features.
    """
    scores: dict[str, Score] = {}
    doubtful: list[tuple[int, str]] = []  # widths of the views with too few rows
    for view in samples.views:
        a, groups_a = rows_of_view(samples, view)
        b, groups_b = rows_of_view(real, view, len(samples))
        c, groups_c = rows_of_view(pool, view, len(samples))
        units = np.repeat(np.arange(len(pool)), len(c) // len(pool))
        per_sample = max(len(a) // len(samples), 1)
        if too_few(min(len(a), len(b)), a.shape[1]):
            doubtful.append((a.shape[1], view))
        for name, distance in DISTANCES.items():
            estimate = distance(a, b, groups_a=groups_a, groups_b=groups_b, resamples=RESAMPLES)
            floor = floor_of(distance, c, groups_c, min(len(a), len(b)), units)
            pair = None if floor is None else (floor[0], floor[1] // per_sample)
            scores[f"{view}/{name}"] = Score.of(estimate, "lower", len(samples), pair)
    if doubtful:
        width, views = max(doubtful)[0], ", ".join(view for _, view in doubtful)
        warn(
            f"Frechet distances ({views}) are too high with {min(len(samples), len(real))} samples: {width} features "
            f"need about {10 * width:,}. Compare them only at the same number of samples and beside the floor, or use "
            "the kernel distances"
        )
    return scores


def coverage_scores(samples: Features, real: Features, pool: Features, warn: Callable[[str], None]) -> dict[str, Score]:
    """Return precision, recall, density and coverage in the main view; none if there are too few files."""
    view = main_view(samples)
    a, b = samples.views[view], real.views[view]
    k = NEIGHBOURS
    others = min(rows_of_others(samples.groups), rows_of_others(real.groups))
    if others < k:
        warn(f"precision, recall, density and coverage are left out: they need {k} neighbours in other files")
        return {}
    if others < 10 * k:
        warn(f"precision, recall, density and coverage say nothing yet: {k} neighbours are many of {others} samples")
    found = neighbour_scores(a, b, k, groups_a=samples.groups, groups_b=real.groups, resamples=RESAMPLES)
    floors = floor_of(partial(neighbour_scores, k=k), pool.views[view], pool.groups, min(len(a), len(b)))
    return {
        f"{view}/{name}": Score.of(
            estimate, "higher", len(samples), None if floors is None else (floors[0][name], floors[1])
        )
        for name, estimate in found.items()
    }


def class_scores(
    samples: Features, real: Features, train: Features | None, classes: list[str], warn: Callable[[str], None]
) -> dict[str, Score]:
    """Return the inception score, and the class accuracy of samples with labels.

    The accuracy is that of a linear classifier, which is trained on the features of real training samples; its accuracy
    on other real samples is the floor.
    """
    scores: dict[str, Score] = {}
    if samples.probabilities is not None:
        floor = None
        if real.probabilities is not None:
            floor = (inception_score(real.probabilities).value, len(real))
        scores["inception_score"] = Score.of(inception_score(samples.probabilities), "higher", len(samples), floor)
    labelled = samples.take(np.flatnonzero(samples.labels >= 0))
    if not classes or not len(labelled):
        return scores
    if train is None or len({*train.labels.tolist()} - {-1}) < 2:
        warn("class_accuracy needs labelled training samples besides the real ones: hold out a part (data.validation)")
        return scores
    view = main_view(samples)
    probe = train_probe(train.views[view], train.labels, len(classes))
    known = real.take(np.flatnonzero(real.labels >= 0))
    floor = None
    if len(known):
        floor = (accuracy(probe(known.views[view]), known.labels).value, len(known))
    estimate = accuracy(probe(labelled.views[view]), labelled.labels)
    scores["class_accuracy"] = Score.of(estimate, "higher", len(labelled), floor)
    return scores


def memorisation_scores(
    samples: Features, real: Features, train: Features, pairs: int = 8
) -> tuple[dict[str, Score], list[tuple[int, int]]]:
    """Return how much closer samples are to training samples than held-out ones are, and the closest pairs.

    The pairs are (number of the sample, number of the training sample) in their sets.
    """
    view = main_view(samples)
    found = memorisation(
        samples.views[view],
        train.views[view],
        real.views[view],
        groups_a=samples.groups,
        groups_b=real.groups,
        pairs=pairs,
        resamples=RESAMPLES,
    )
    expected = math.ceil(0.01 * len(real)) / (len(real) + 1)  # of new samples, for the 1 % quantile of n real ones
    scores = {
        "memorisation/distance_ratio": Score.of(found.ratio, "near 1", len(samples), (1.0, len(real))),
        "memorisation/low_distance_ratio": Score.of(found.low_ratio, "near 1", len(samples), (1.0, len(real))),
        "memorisation/share_closer": Score.of(found.share_closer, "lower", len(samples), (expected, len(real))),
    }
    return scores, [(int(samples.numbers[i]), int(train.numbers[j])) for i, j in found.pairs]


def floor_of(
    metric: Callable[..., Any], rows: np.ndarray, groups: np.ndarray, n: int, units: np.ndarray | None = None
) -> tuple[Any, int] | None:
    """Return the metric between halves of real samples, and their rows; None if the halves are too small for it.

    `units` number the samples that the rows are of.
    """
    try:
        return real_floor(metric, rows, groups, n, units=units)
    except UsageError:
        return None


def rows_of_others(groups: np.ndarray) -> int:
    """Return the smallest number of rows that are not of the file of a row."""
    return len(groups) - int(np.unique(groups, return_counts=True)[1].max())


def main_view(features: Features) -> str:
    """Return the view with one row per sample."""
    for view in MAIN_VIEWS:
        if view in features.views:
            return view
    raise UsageError(f"the extractor has only the views {', '.join(features.views)}: it needs one of a whole sample")


def rows_of_view(features: Features, view: str, num: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (n, d) of a view, and the file of each row.

    Of a view with several rows per sample, at most about `MAX_ROWS` are used: the same number of each sample, and in
    turn all of them. With `num`, as many of each sample as of a set of `num` samples.
    """
    values = features.views[view]
    if values.ndim == 2:
        return values, features.groups
    n, rows, _ = values.shape
    kept = min(rows, max(1, MAX_ROWS // (num or n)))
    places = (np.arange(n)[:, None] + np.arange(kept) * rows // kept) % rows
    chosen = values[np.arange(n)[:, None], places]
    return chosen.reshape(n * kept, -1), np.repeat(features.groups, kept)


def join(first: Features, second: Features | None, *, same_files: bool) -> Features:
    """Return two sets as one; `same_files` says that their groups are those of one dataset."""
    if second is None:
        return first
    shift = 0 if same_files else int(first.groups.max()) + 1
    return dataclasses.replace(
        first,
        views={name: np.concatenate([first.views[name], second.views[name]]) for name in first.views},
        probabilities=None,
        groups=np.concatenate([first.groups, second.groups + shift]),
        labels=np.concatenate([first.labels, second.labels]),
        numbers=np.concatenate([first.numbers, second.numbers]),
    )


def describe(scores: Mapping[str, Score]) -> list[str]:
    """Return the scores as lines of a table."""
    width = max(map(len, scores), default=5)
    floor_n = {score.floor_n for score in scores.values() if score.floor_n is not None}
    title = f"floor (n = {min(floor_n)})" if len(floor_n) == 1 else "floor"
    lines = [f"{'score':<{width}}  {'value':>9}  {'95 % interval':>20}  {title:>16}  better"]
    for name, score in scores.items():
        interval = f"{number(score.low)} to {number(score.high)}"
        floor = "" if score.floor is None else number(score.floor)
        if score.floor_n is not None and len(floor_n) > 1:
            floor += f" (n = {score.floor_n})"
        lines.append(f"{name:<{width}}  {number(score.value):>9}  {interval:>20}  {floor:>16}  {score.better}")
    return lines


def number(value: float) -> str:
    """Format a score with four significant digits."""
    return f"{value:.4g}"
