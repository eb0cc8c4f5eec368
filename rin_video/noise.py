"""Noise that does not depend on the batch, and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

# Which part of a batch this process draws for, and of how many: set where several processes share one.
PART: ContextVar[tuple[int, int]] = ContextVar("PART", default=(0, 1))


class NoiseSource:
    """Standard normal noise (B, *shape) that does not depend on the batch: each sample has a CPU generator of its own.

    Sample `i` of seed `s` draws the same numbers in whatever batch it stands.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(spread_seed(seed, index)) for index in indices]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def spread_seed(*numbers: int) -> int:
    """One seed from several numbers, so that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
