"""Samplers: generator functions over a denoiser, for tensors of any rank and any path.

`denoise(x, level, self_cond) -> (x0, eps, self_cond)` is the model as a sampler sees it. It returns estimates of the
data and of the noise, and the self-conditioning state (RIN's latents), which the sampler passes to the next call
unchanged. `levels` are pairs (level, next level) of `NoiseLevel`. `noise()` draws standard normal noise with the shape
of x. A sampler yields a `Step` after every transition. **The result is the x0 of the last step**, not the last x.
Values are in the range of diffusion, [-1, 1].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from rin_video.config import SamplerName, SpacingName
from rin_video.diffusion.schedules import NoiseLevel, Schedule
from rin_video.errors import UsageError

Denoise = Callable[[Tensor, NoiseLevel, Any], tuple[Tensor, Tensor, Any]]
Levels = Sequence[tuple[NoiseLevel, NoiseLevel]]
Noise = Callable[[], Tensor]


class Step(NamedTuple):
    """The state after a transition: the next `x`, the estimate `x0` behind it, and the self-conditioning state."""

    x: Tensor
    x0: Tensor
    self_cond: Any


def ddim(
    denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, self_cond: Any = None, *, eta: float = 0.0
) -> Iterator[Step]:
    """DDIM, first order. Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.

    `eta` sets the amount of added noise, from 0 (none) to 1 (as in DDPM). On the straight path, eta 0 is Euler's
    method.
    """
    for level, next_level in levels:
        x0, eps, self_cond = denoise(x, level, self_cond)
        std = eta * (next_level.sigma / level.sigma) * _forward_variance(level, next_level) ** 0.5
        x = next_level.alpha * x0 + (next_level.sigma**2 - std**2) ** 0.5 * eps
        if eta:
            x = x + std * noise()
        yield Step(x, x0, self_cond)


def ddpm(
    denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, self_cond: Any = None, *, small: bool = False
) -> Iterator[Step]:
    """DDPM, ancestral sampling. Ho et al. 2020 (arXiv 2006.11239), eq. 7.

    The variance is the large one of the paper or, if `small`, that of the posterior.
    """
    for level, next_level in levels:
        x0, eps, self_cond = denoise(x, level, self_cond)
        variance = _forward_variance(level, next_level)
        mean = (x - variance / level.sigma * eps) * (next_level.alpha / level.alpha)
        if small:
            variance = variance * (next_level.sigma / level.sigma) ** 2
        x = mean + variance**0.5 * noise()
        yield Step(x, x0, self_cond)


def _forward_variance(level: NoiseLevel, next_level: NoiseLevel) -> Any:
    """Return the variance that the forward process adds from `next_level`, which is cleaner, to `level`."""
    return level.sigma**2 - (level.alpha / next_level.alpha) ** 2 * next_level.sigma**2


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, self_cond: Any = None) -> Iterator[Step]:
    """DPM-Solver++(2M), second order, one network call per step. Lu et al. 2022 (arXiv 2211.01095), algorithm 2."""
    previous: tuple[float, Tensor] | None = None  # log(alpha / sigma) and x0 of the last step
    for level, next_level in levels:
        x0, _, self_cond = denoise(x, level, self_cond)
        x = (next_level.sigma / level.sigma) * x + next_level.alpha * _shrink(level, next_level) * _extrapolate(
            x0, previous, level, next_level
        )
        previous = (-math.log(level.edm_sigma), x0)
        yield Step(x, x0, self_cond)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, self_cond: Any = None) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), second order, stochastic. Lu et al. 2022 (arXiv 2211.01095), sec. 4.3."""
    previous: tuple[float, Tensor] | None = None
    for level, next_level in levels:
        x0, _, self_cond = denoise(x, level, self_cond)
        decay = next_level.edm_sigma / level.edm_sigma  # exp(-h)
        x = (next_level.sigma / level.sigma) * decay * x
        x = x + next_level.alpha * (1 - decay**2) * _extrapolate(x0, previous, level, next_level)
        x = x + next_level.sigma * (1 - decay**2) ** 0.5 * noise()
        previous = (-math.log(level.edm_sigma), x0)
        yield Step(x, x0, self_cond)


def _shrink(level: NoiseLevel, next_level: NoiseLevel) -> float:
    """Return 1 - exp(-h), where h is the step in log(alpha / sigma)."""
    decay: float = next_level.edm_sigma / level.edm_sigma
    return 1 - decay


def _extrapolate(
    x0: Tensor, previous: tuple[float, Tensor] | None, level: NoiseLevel, next_level: NoiseLevel
) -> Tensor:
    """Extrapolate x0 by half a step, linearly from the last two estimates.

    The first step and the step to zero noise are first order: they return `x0`.
    """
    if previous is None or next_level.sigma == 0:
        return x0
    log_snr, next_log_snr = -math.log(level.edm_sigma), -math.log(next_level.edm_sigma)
    weight = (next_log_snr - log_snr) / (2 * (log_snr - previous[0]))
    return x0 + weight * (x0 - previous[1])


def dpmpp_3m(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, self_cond: Any = None) -> Iterator[Step]:
    """DPM-Solver++(3M), third order, one network call per step.

    The parabola through the last three x0 is integrated exactly. Lu et al. 2022 (arXiv 2211.01095), eq. 11 with k = 3:
    x' = sigma'/sigma x + sigma' * integral of exp(l) x0(l) dl, with l = log(alpha / sigma).
    """
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and x0, the latest first
    for level, next_level in levels:
        x0, _, self_cond = denoise(x, level, self_cond)
        past = [(-math.log(level.edm_sigma), x0), *past[:2]]
        update = _shrink(level, next_level) * x0
        if len(past) > 1 and next_level.sigma > 0:
            (l0, _), (l1, d1), *rest = past
            h = -math.log(next_level.edm_sigma) - l0
            first = h - _shrink(level, next_level)  # integral of exp(l - l') (l - l0)
            slope = (x0 - d1) / (l0 - l1)
            update = update + first * slope
            if rest:
                l2, d2 = rest[0]
                curve = (slope - (d1 - d2) / (l1 - l2)) / (l0 - l2)
                update = update + (h**2 - 2 * first + (l0 - l1) * first) * curve
        x = (next_level.sigma / level.sigma) * x + next_level.alpha * update
        yield Step(x, x0, self_cond)


def heun(
    denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, self_cond: Any = None, *, churn: float = 0.0
) -> Iterator[Step]:
    """Heun, second order, two network calls per step (one in the last). Karras et al. 2022 (2206.00364), algorithm 2.

    `churn` is S_churn, the amount of noise that is added back, spread over the steps. Every path is a rescaling of the
    straight path x / (alpha + sigma) at time sigma / (alpha + sigma), on which dx/dt = eps - x0. The trapezoidal rule
    is applied there. Unlike sigma / alpha, this time is bounded, so that sampling can start at pure noise.
    """
    gain = min(churn / len(levels), 2**0.5 - 1)
    for level, next_level in levels:
        if churn:
            raised = NoiseLevel.from_edm_sigma(level.edm_sigma * (1 + gain), level.power)
            x = (raised.alpha / level.alpha) * x
            x = x + (raised.sigma**2 - (raised.alpha / level.alpha * level.sigma) ** 2) ** 0.5 * noise()
            level = raised
        x0, eps, self_cond = denoise(x, level, self_cond)
        slope = eps - x0
        x_euler = next_level.alpha * x0 + next_level.sigma * eps
        if next_level.sigma > 0:
            x0, eps, self_cond = denoise(x_euler, next_level, self_cond)
            before, after = level.alpha + level.sigma, next_level.alpha + next_level.sigma
            h = next_level.sigma / after - level.sigma / before
            x = after * (x / before + h * (slope + eps - x0) / 2)
        else:
            x = x_euler
        yield Step(x, x0, self_cond)


Sampler = Callable[..., Iterator[Step]]
SAMPLERS: dict[SamplerName, Sampler] = {
    "ddim": ddim,
    "euler": ddim,  # DDIM is Euler's method in sigma / alpha, and on the straight path
    "ddpm": ddpm,
    "ddpm_small": partial(ddpm, small=True),
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "heun": heun,
}


def get_sampler(name: SamplerName, parameters: Mapping[str, float] | None = None) -> Sampler:
    """Return the sampler `name`, a key of `SAMPLERS`, with its options (eta, churn) set.

    Raises `UsageError` for an unknown name or option, and for values out of range.
    """
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}: choose {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    known = [p.name for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = [option for option in known if option != "small"]
    if unknown := set(parameters or {}) - set(known):
        raise UsageError(
            f"sampler {name} has no option {', '.join(sorted(unknown))}: it has {', '.join(known) or 'none'} "
            "(eta belongs to ddim, churn to heun)"
        )
    for option, value in (parameters or {}).items():
        most = {"eta": 1.0}.get(option, math.inf)
        if not (0 <= value <= most and math.isfinite(value)):
            raise UsageError(f"sampler.{option} is {value}: it must be in [0, {most:g}]")
    return partial(sampler, **(parameters or {}))


# ---- noise levels of the steps


def initial_state(levels: Levels, noise: Noise) -> Tensor:
    """Draw the initial x: noise scaled to the first level, whose sigma may be below 1."""
    x: Tensor = levels[0][0].sigma * noise()
    return x


SPACINGS: tuple[SpacingName, ...] = get_args(SpacingName)
# Samplers whose default spacing is karras, with which they are far better below 50 steps.
KARRAS: tuple[SamplerName, ...] = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "heun")
RATIO_MIN, RATIO_MAX = 0.002, 80.0  # limits of sigma / alpha for karras and logsnr, from table 1 of EDM


def make_levels(
    schedule: Schedule,
    steps: int,
    *,
    spacing: SpacingName = "uniform",
    time_difference: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[NoiseLevel, NoiseLevel]]:
    """Return `steps` pairs (level, next level) from noise to data.

    The values are floats, computed in `dtype`, so that no step waits for a device. The spacings uniform and quadratic
    (denser near the data) are in t. The spacings karras (rho = 7; Karras et al. 2022, eq. 5) and logsnr are in the
    ratio sigma / alpha, and their last step goes to the clean end of the schedule. The ratio is limited to [0.002, 80]
    times `scale`, the factor of the data. It is also limited by the ends of the schedule, where the clean end is the
    ratio at t = 0.001 times `scale`.

    With `time_difference` td, each step goes to the level of td steps later (the authors' asymmetric time intervals;
    Chen et al. 2022, arXiv 2208.04202, sec. 3.2). This requires a spacing in t. Raises `UsageError` for unknown names
    and values out of range.
    """
    if steps < 1:
        raise UsageError(f"steps is {steps}: it must be at least 1")
    if spacing not in SPACINGS:
        raise UsageError(f"unknown spacing {spacing!r}: choose {', '.join(SPACINGS)}")
    if time_difference < 0 or (time_difference and spacing in ("karras", "logsnr")):
        raise UsageError(f"time_difference is {time_difference}: it must be at least 0, and 0 with spacing {spacing}")

    def at(t: float) -> NoiseLevel:
        return schedule(torch.tensor(t, dtype=dtype)).map(float)

    if spacing in ("uniform", "quadratic"):
        power = 2 if spacing == "quadratic" else 1
        return [
            (at((1 - i / steps) ** power), at(max(1 - (i + 1 + time_difference) / steps, 0.0) ** power))
            for i in range(steps)
        ]
    first, last = at(1.0), at(0.0)
    high = min(first.edm_sigma, RATIO_MAX * scale)
    low = max(last.edm_sigma, scale * max(at(1e-3).edm_sigma, RATIO_MIN))
    fractions = [i / max(steps - 1, 1) for i in range(steps)]
    if spacing == "karras":
        ratios = [(high ** (1 / 7) + fraction * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for fraction in fractions]
    else:
        ratios = [math.exp(math.log(high) + fraction * math.log(low / high)) for fraction in fractions]
    nodes = [NoiseLevel.from_edm_sigma(edm_sigma, first.power) for edm_sigma in ratios]
    return list(pairwise([*nodes, last]))
