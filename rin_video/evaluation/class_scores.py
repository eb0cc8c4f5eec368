"""Scores from class probabilities and labels: inception score and accuracy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from rin_video.errors import UsageError
from rin_video.evaluation.intervals import RESAMPLES, Estimate, mean, share


def inception_score(
    probabilities: ArrayLike, *, groups: ArrayLike | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Return exp of the mean KL(p(y|x) || p(y)) of class probabilities (n, classes) (Salimans et al. 2016, section 4).

    All rows form one set: the usual ten parts of n / 10 rows each lower the score. It lies between 1 and the number of
    classes. The interval is a bootstrap of its logarithm's linear part in the rows' weights.

    Raises:
        UsageError: rows that are no probabilities, or fewer than 2.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not p.size:
        raise UsageError(f"class probabilities have shape {p.shape}, (samples, classes) is needed")
    if not ((p >= 0).all() and np.allclose(p.sum(1), 1, atol=1e-3)):
        raise UsageError("class probabilities must be at least 0 and add up to 1 in each row: apply softmax to scores")
    p = p / p.sum(1, keepdims=True)
    marginal = p.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(p > 0, p * (np.log(p) - np.log(marginal)), 0).sum(1)
    found = mean(divergence, groups, resamples=resamples, seed=seed, name="the samples")
    return Estimate(*map(math.exp, found))


def accuracy(predicted: ArrayLike, labels: ArrayLike, *, groups: ArrayLike | None = None) -> Estimate:
    """Return the share of predicted classes (n,) that equal the labels (n,), with Wilson's interval.

    Raises:
        UsageError: the numbers differ, or are below 2.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape:
        raise UsageError(f"there are {predicted.shape} predicted classes, but {labels.shape} labels")
    return share(predicted == labels, groups, name="the predicted classes")
