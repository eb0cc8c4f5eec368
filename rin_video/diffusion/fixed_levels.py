"""The loss at fixed noise levels with fixed noise and fixed conditions: the same measurement every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rin_video.datasets.batch import Batch
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.masks import draw_known
from rin_video.diffusion.noise import derive_seed, seeded_generators
from rin_video.diffusion.objectives import target
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.diffusion.schedules import NoiseLevel
from rin_video.tensors import to_diffusion_range


class FixedBatch(NamedTuple):
    """Samples whose noise and observed masks depend on their `numbers` alone, not on the batch that they are in."""

    x: Tensor  # (B, C, *grid), uint8 or in [0, 1]
    conditions: Conditions
    numbers: list[int]


class Noisy(NamedTuple):
    """A batch at a noise level, and what the model should predict for it."""

    x_t: Tensor  # (B, C, *grid)
    wanted: Tensor  # (B, C, *grid)
    level: NoiseLevel
    conditions: Conditions

    def error(self, prediction: Tensor) -> Tensor:
        """Return the mean squared error of each sample over its unknown pixels, (B,), without a weight."""
        return self.conditions.masked_mean((prediction - self.wanted) ** 2)


def fixed_times(levels: int) -> list[float]:
    """Return the centres of `levels` equal parts of the times [0, 1]."""
    return [(i + 0.5) / levels for i in range(levels)]


def fix_batch(batch: Batch, numbers: Sequence[int], diffusion: GaussianDiffusion) -> FixedBatch:
    """Return a batch with its conditions as in training, without dropout; `numbers` determine the observed masks."""
    x, label, embedding = batch
    options, known = diffusion.config, None
    if options.known:
        generators = seeded_generators(0, numbers)
        known = draw_known(options.known, options.known_frames, len(x), x.shape[2:], generators)
    label = label if getattr(diffusion.model, "num_classes", 0) else None
    device = next(diffusion.parameters()).device
    conditions = Conditions(label, embedding, known).at(torch.arange(len(x)), device)
    return FixedBatch(x.to(device), conditions, list(numbers))


def add_noise(diffusion: GaussianDiffusion, batch: FixedBatch, index: int, t: float) -> Noisy:
    """Return a batch at time `t`, the noise level with number `index`, which determines the noise with the samples."""
    x0 = diffusion.config.scale * to_diffusion_range(batch.x)
    generators = (torch.Generator().manual_seed(derive_seed(index, number)) for number in batch.numbers)
    eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0)
    level = diffusion.level(torch.full((len(x0),), t, device=x0.device), x0)
    wanted = target(diffusion.config.objective, x0, eps, level)
    return Noisy(level.alpha * x0 + level.sigma * eps, wanted, level, batch.conditions._replace(values=x0))


def two_passes(diffusion: GaussianDiffusion, noisy: Noisy) -> tuple[Tensor, Tensor, Any]:
    """Return the predictions without and with self-conditioning, as in sampling, and the latents of the second pass."""
    x_t, _, level, conditions = noisy
    first, latents = diffusion.predict(x_t, level, conditions, None)
    x0 = diffusion.predict_x0(first, x_t, level, conditions)
    second, latents = diffusion.predict(x_t, level, conditions, diffusion.self_cond_state(latents, x0))
    return first, second, latents


@torch.no_grad()
def losses_at_levels(diffusion: GaussianDiffusion, batch: FixedBatch, levels: int) -> Tensor:
    """Return the unweighted loss of each sample at each level, self-conditioned: (B, levels) float64 on the CPU."""
    columns = []
    for index, t in enumerate(fixed_times(levels)):
        noisy = add_noise(diffusion, batch, index, t)
        columns.append(noisy.error(two_passes(diffusion, noisy)[1]))
    return torch.stack(columns, dim=1).cpu().double()
