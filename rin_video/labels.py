"""Class labels: names and numbers, checked against what a model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rin_video.errors import UsageError

Labels: TypeAlias = "Tensor | np.ndarray | Sequence[int | str] | int | str"


def class_index(label: Any, classes: Sequence[str], num_classes: int) -> int:
    """A class by name or number as its number. Raises `UsageError` for one that the model does not have."""
    if not num_classes:
        raise UsageError(f"class {label} is asked for, but the model has no classes")
    names = [str(name) for name in classes]
    if str(label) in names:  # a class called 2 is class 2, be it written as a number or as a name
        return names.index(str(label))
    numbered = bool(names) and all(name.isdecimal() for name in names)
    if str(label).isdecimal() and numbered and int(label) in map(int, names):
        return [int(name) for name in names].index(int(label))
    if str(label).isdecimal() and not numbered and int(label) < num_classes:
        return int(label)
    there = f"0 to {num_classes - 1}" + (f" ({', '.join(names)})" if names else "")
    raise UsageError(f"the model has no class {label}: it has {', '.join(names) if numbered else there}")


def check_labels(label: Labels | None, batch_size: int, num_classes: int, classes: Sequence[str] = ()) -> Tensor | None:
    """Labels for a batch: (B,) whole numbers from -1 (none), or (B, num_classes) weights.

    `label` is one class for all, or a list, an array or a tensor with one for each; names are looked up in `classes`.
    Raises `UsageError` for a class that the model does not have.
    """
    if label is None:
        return None
    if isinstance(label, np.ndarray) and label.dtype.kind in "UO":  # names
        label = label.tolist()
    if isinstance(label, str) or (isinstance(label, Sequence) and any(isinstance(one, str) for one in label)):
        label = class_index(label, classes, num_classes) if isinstance(label, str) else [
            class_index(one, classes, num_classes) if isinstance(one, str) else one for one in label
        ]  # fmt: skip
    labels = torch.as_tensor(label)
    if labels.ndim == 0:
        labels = labels.expand(batch_size)
    if not num_classes:
        return labels
    wanted = f"give one for each sample, from 0 to {num_classes - 1}, or -1 for none"
    if labels.ndim == 2 and labels.shape == (batch_size, num_classes):
        return labels
    if labels.ndim != 1 or len(labels) != batch_size:
        raise UsageError(f"labels of shape {tuple(labels.shape)} do not suit {batch_size} samples: {wanted}")
    if labels.is_floating_point() and (labels != labels.round()).any():
        raise UsageError(f"the labels are {labels.dtype}, and not whole: {wanted}")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= num_classes:
        counted = ". Labels count from 0: subtract 1" if (low, high) == (1, num_classes) else ""
        raise UsageError(f"the labels go from {low} to {high}, the model has {num_classes} classes: {wanted}{counted}")
    return labels
