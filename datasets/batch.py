"""A batch of samples, as the data loader makes it and training takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate


class Batch(NamedTuple):
    """Samples and their conditions; a part that the dataset does not have is None. `DataLoader` can pin its memory."""

    x: Tensor  # (B, C, *grid), uint8 or in [0, 1]
    label: Tensor | None = None  # (B,) integers with -1 for none, or (B, num_classes) weights
    embedding: Tensor | None = None  # (B, L, D)

    def to(self, device: torch.device) -> Batch:
        """The same on a device. Copies from pinned memory do not wait for the device."""
        return Batch._make(None if part is None else part.to(device, non_blocking=True) for part in self)


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples {"x", "label", "embedding"} as one batch; all but "x" may be missing."""
    parts = default_collate(list(samples))
    return Batch(parts["x"], parts.get("label"), parts.get("embedding"))
