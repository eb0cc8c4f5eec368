"""Samplers: plain generator functions over a denoiser, for tensors of any rank.

`denoise(x, level, hidden) -> (x0, eps, hidden)` is the model seen by a sampler: its estimates of the data and of the
noise, and whatever it wants handed to the next call (RIN's latents), which a sampler passes on unopened. `levels` are
pairs (now, next) of `NoiseLevel`. A sampler yields a `Step` after every transition; **the result is the x0 of the last
step**, not the last x. Values are in diffusion's range, about [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rin_video.errors import UsageError
from rin_video.schedules import NoiseLevel

Denoise = Callable[[Tensor, NoiseLevel, Any], tuple[Tensor, Tensor, Any]]
Levels = Iterable[tuple[NoiseLevel, NoiseLevel]]
Noise = Callable[[], Tensor]


class Step(NamedTuple):
    """State after a transition: the next `x`, the estimate `x0` it came from, and what the denoiser carries."""

    x: Tensor
    x0: Tensor
    hidden: Any


def ddim(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None) -> Iterator[Step]:
    """Deterministic. Song et al. 2021 (arXiv 2010.02502), eq. 12 with eta = 0."""
    for now, later in levels:
        x0, eps, hidden = denoise(x, now, hidden)
        x = later.alpha * x0 + later.sigma * eps
        yield Step(x, x0, hidden)


def ddpm(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None) -> Iterator[Step]:
    """Ancestral, with the large variance. Ho et al. 2020 (arXiv 2006.11239), sec. 3.2, sigma^2 = beta."""
    return _ancestral(denoise, x, levels, noise, hidden, small=False)


def ddpm_small(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None) -> Iterator[Step]:
    """Ancestral, with the variance of the posterior. Ho et al. 2020, eq. 7."""
    return _ancestral(denoise, x, levels, noise, hidden, small=True)


def _ancestral(
    denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any, *, small: bool
) -> Iterator[Step]:
    for now, later in levels:
        x0, eps, hidden = denoise(x, now, hidden)
        alpha = now.alpha / later.alpha  # of the forward step from later to now
        variance = now.sigma**2 - alpha**2 * later.sigma**2
        mean = (x - variance / now.sigma * eps) / alpha
        if small:
            variance = variance * (later.sigma / now.sigma) ** 2
        x = mean + variance**0.5 * noise()
        yield Step(x, x0, hidden)


Sampler = Callable[[Denoise, Tensor, Levels, Noise, Any], Iterator[Step]]
SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm, "ddpm_small": ddpm_small}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`; a `UsageError` that lists them when there is none."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}: known are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def uniform_times(steps: int) -> list[tuple[float, float]]:
    """`steps` pairs (t, t next) from (1, .) down to (., 0), uniform in t."""
    if steps < 1:
        raise UsageError(f"steps is {steps}: sampling takes at least 1")
    return [(1 - i / steps, max(1 - (i + 1) / steps, 0.0)) for i in range(steps)]


def noise_levels(
    schedule: Callable[[Tensor], NoiseLevel],
    times: Iterable[tuple[float, float]],
    dtype: torch.dtype = torch.float64,
) -> list[tuple[NoiseLevel, NoiseLevel]]:
    """The pairs of levels at pairs of times, computed in `dtype`, as plain floats: no step waits for a device."""

    def at(t: float) -> NoiseLevel:
        return NoiseLevel(*(float(v) for v in schedule(torch.tensor(t, dtype=dtype))))

    return [(at(now), at(later)) for now, later in times]
