"""Class labels: lookup by name or number, and checks against the classes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rin_video.errors import UsageError

Labels: TypeAlias = "Tensor | np.ndarray | Sequence[int | str] | int | str"


def class_index(label: Any, classes: Sequence[str], num_classes: int) -> int:
    """Return the number of a class given by name or number; -1, no class, stays -1.

    Raises `UsageError` if the model has no such class.
    """
    if not num_classes:
        raise UsageError(f"class {label} was requested, but the model has no classes")
    names = [str(name) for name in classes]
    if str(label) == "-1" and "-1" not in names:
        return -1
    if str(label) in names:  # 2 and "2" both select the class named "2", which need not be class number 2
        return names.index(str(label))
    numbered = bool(names) and all(name.isdecimal() for name in names)
    if str(label).isdecimal() and numbered and int(label) in map(int, names):
        return [int(name) for name in names].index(int(label))
    if str(label).isdecimal() and not numbered and int(label) < num_classes:
        return int(label)
    known = f"0 to {num_classes - 1}" + (f" ({', '.join(names)})" if names else "")
    raise UsageError(f"the model has no class {label}: it has {', '.join(names) if numbered else known}")


def check_labels(label: Labels | None, batch_size: int, num_classes: int, classes: Sequence[str] = ()) -> Tensor | None:
    """Return labels of a batch: (B,) integers, -1 for no label, or (B, num_classes) weights.

    `label` is one class for all samples, or a list, array or tensor with one per sample; names are looked up in
    `classes`. Raises `UsageError` if a class is unknown, or the shape does not fit the batch.
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
    wanted = f"pass one per sample, from 0 to {num_classes - 1}, or -1 for no label"
    if labels.ndim == 2 and labels.shape == (batch_size, num_classes):
        return labels
    if labels.ndim != 1 or len(labels) != batch_size:
        raise UsageError(f"labels of shape {tuple(labels.shape)} do not fit {batch_size} samples: {wanted}")
    if labels.is_floating_point() and (labels != labels.round()).any():
        raise UsageError(f"the labels are {labels.dtype} and not integers: {wanted}")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= num_classes:
        counted = ". Labels count from 0: subtract 1" if (low, high) == (1, num_classes) else ""
        raise UsageError(
            f"the labels range from {low} to {high}, but the model has {num_classes} classes: {wanted}{counted}"
        )
    return labels
