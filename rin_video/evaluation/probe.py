"""A linear classifier on features, which measures whether samples show their class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

RIDGE = 1e-2  # weight decay, relative to features of unit variance
STEPS = 100


def train_probe(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Train multinomial logistic regression on features (n, d) with labels (n,); samples with label -1 are left out.

    The features are standardised, and the weights are regularised (L2). The loss is convex, so the result does not
    depend on a random start. Returns a function from features (m, d) to classes (m,).
    """
    rows = labels >= 0
    x, y = torch.from_numpy(features[rows]).double(), torch.from_numpy(labels[rows]).long()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + RIDGE * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)

    def predict(features: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x = (torch.from_numpy(features).double() - mean) / std
            return (x @ weight + bias).argmax(1).numpy()

    return predict
