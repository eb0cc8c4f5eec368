"""The batch of samples that the data loader returns and training consumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate


class Batch(NamedTuple):
    """Samples and their conditions, which are None if the dataset has none; `DataLoader` can pin its memory."""

    x: Tensor  # (B, C, *grid), uint8 or in [0, 1]
    label: Tensor | None = None  # (B,) integers with -1 for none, or (B, num_classes) weights
    embedding: Tensor | None = None  # (B, L, D)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; copies from pinned memory are asynchronous."""
        return Batch._make(None if part is None else part.to(device, non_blocking=True) for part in self)


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Collate samples {"x", "label", "embedding"} to a batch; all keys but "x" are optional."""
    parts = default_collate(list(samples))
    return Batch(parts["x"], parts.get("label"), parts.get("embedding"))
