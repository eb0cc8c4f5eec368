"""Random numbers that do not depend on the batch, and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class RNG:
    """Random numbers for one training batch, from torch's global generators."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.rows, self.total, self.device = range(batch_size), batch_size, device

    def uniform(self) -> Tensor:
        """Draw (B,) numbers, uniform in [0, 1)."""
        return torch.rand(len(self.rows), device=self.device)

    def normal(self) -> Tensor:
        """Draw (B,) standard normal numbers."""
        return torch.randn(len(self.rows), device=self.device)

    def common_uniform(self) -> Tensor:
        """Draw one number, uniform in [0, 1), that is the same for the global batch."""
        return torch.rand((), device=self.device)

    def places(self) -> Tensor:
        """Return the position of each sample in the global batch as a fraction in [0, 1): (B,)."""
        return torch.arange(self.rows.start, self.rows.stop, device=self.device) / self.total

    def noise(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw standard normal noise (B, *shape)."""
        return torch.randn(len(self.rows), *shape, dtype=dtype, device=self.device)

    def generators(self) -> Sequence[torch.Generator | None]:
        """Return a CPU generator for each sample; None stands for torch's global one."""
        return [None] * len(self.rows)


class BatchRNG(RNG):
    """Random numbers that are drawn per sample, so that row i gets the same ones in any process.

    A training step therefore does not depend on the number of processes, and no process draws for the others. `seeds`
    identify the batch (seed, step, forward pass). `rows` are the rows of this process in a global batch of `total`.
    Scalars come from one CPU generator per row; `noise` comes from a generator on the device.
    """

    def __init__(self, seeds: Sequence[int], rows: range, total: int, device: torch.device) -> None:
        self.rows, self.total, self.device = rows, total, device
        sequence = np.random.SeedSequence(seeds, spawn_key=(1,))  # never a sequence of `derive_seed`
        numbers = sequence.generate_state(1 + 2 * total, np.uint64) >> 1
        common, *each = numbers.tolist()
        self._common = torch.Generator().manual_seed(common)
        self._rows = [torch.Generator().manual_seed(each[2 * row]) for row in rows]
        # A single generator on the device, reseeded for each row: creating one takes longer than drawing from it.
        self._noise, self._seeds = torch.Generator(device), [each[2 * row + 1] for row in rows]
        self._calls = 0

    def uniform(self) -> Tensor:
        """Draw (B,) numbers, uniform in [0, 1), one per row."""
        return self._stacked(torch.rand)

    def normal(self) -> Tensor:
        """Draw (B,) standard normal numbers, one per row."""
        return self._stacked(torch.randn)

    def common_uniform(self) -> Tensor:
        """Draw one number, uniform in [0, 1), that is the same in all processes."""
        return self._on_device(torch.rand((), generator=self._common))

    def noise(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw standard normal noise (B, *shape), each row from a seed of its own."""
        result = torch.empty(len(self.rows), *shape, dtype=dtype, device=self.device)
        for row, seed in zip(result, self._seeds, strict=True):
            torch.randn(tuple(shape), generator=self._noise.manual_seed(seed ^ self._calls), out=row)
        self._calls += 1
        return result

    def generators(self) -> Sequence[torch.Generator | None]:
        """Return the CPU generator of each row."""
        return self._rows

    def _stacked(self, draw: Callable[..., Tensor]) -> Tensor:
        return self._on_device(torch.stack([draw((), generator=generator) for generator in self._rows]))

    def _on_device(self, value: Tensor) -> Tensor:
        """Copy a value to the device. A GPU copies from pinned memory, so that the host does not wait."""
        if self.device.type == "cuda":
            return value.pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device)


class NoiseSource:
    """Standard normal noise (B, *shape) that does not depend on the batch: each sample has its own CPU generator.

    Sample i of a seed gets the same numbers in every batch. `indices` are the numbers of the samples in the batch.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generators = seeded_generators(seed, indices)

    def __call__(self) -> Tensor:
        """Draw the next noise of all samples, (B, *shape)."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def seeded_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """Return a CPU generator for each index, seeded by `seed` and the index."""
    return [torch.Generator().manual_seed(derive_seed(seed, index)) for index in indices]


def derive_seed(*numbers: int) -> int:
    """Derive one seed from several numbers; similar numbers lead to independent seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
