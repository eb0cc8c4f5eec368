"""Samplers: plain generator functions over a denoiser, for tensors of any rank and any path.

`denoise(x, level, hidden) -> (x0, eps, hidden)` is the model as a sampler sees it: its estimates of the data and of the
noise, and whatever it wants handed to the next call (RIN's latents), which a sampler passes on unopened. `levels` are
pairs (now, next) of `NoiseLevel`; `noise()` draws standard normal noise of x's shape. A sampler yields a `Step` after
every transition; **the result is the x0 of the last step**, not the last x. Values are in diffusion's range, [-1, 1].
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
    """State after a transition: the next `x`, the estimate `x0` it came from, and what the denoiser carries."""

    x: Tensor
    x0: Tensor
    hidden: Any


def ddim(
    denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None, *, eta: float = 0.0
) -> Iterator[Step]:
    """First order; `eta` from 0 (no noise) to 1 (as much as DDPM). Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.

    On the straight path this is Euler's method.
    """
    for now, later in levels:
        x0, eps, hidden = denoise(x, now, hidden)
        spread = eta * (later.sigma / now.sigma) * _forward_variance(now, later) ** 0.5
        x = later.alpha * x0 + (later.sigma**2 - spread**2) ** 0.5 * eps
        if eta:
            x = x + spread * noise()
        yield Step(x, x0, hidden)


def ddpm(
    denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None, *, small: bool = False
) -> Iterator[Step]:
    """Ancestral, with the large variance or, `small`, the posterior's. Ho et al. 2020 (arXiv 2006.11239), eq. 7."""
    for now, later in levels:
        x0, eps, hidden = denoise(x, now, hidden)
        variance = _forward_variance(now, later)
        mean = (x - variance / now.sigma * eps) * (later.alpha / now.alpha)
        if small:
            variance = variance * (later.sigma / now.sigma) ** 2
        x = mean + variance**0.5 * noise()
        yield Step(x, x0, hidden)


def _forward_variance(now: NoiseLevel, later: NoiseLevel) -> Any:
    """Variance of q(x_now | x_later): what the forward process adds from the cleaner level to the noisier one."""
    return now.sigma**2 - (now.alpha / later.alpha) ** 2 * later.sigma**2


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None) -> Iterator[Step]:
    """DPM-Solver++(2M), second order, one call a step. Lu et al. 2022 (arXiv 2211.01095), algorithm 2."""
    previous: tuple[float, Tensor] | None = None  # log(alpha / sigma) and x0 of the last step
    for now, later in levels:
        x0, _, hidden = denoise(x, now, hidden)
        x = (later.sigma / now.sigma) * x + later.alpha * _shrink(now, later) * _extrapolate(x0, previous, now, later)
        previous = (-math.log(now.ratio), x0)
        yield Step(x, x0, hidden)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), second order, stochastic. Lu et al. 2022 (arXiv 2211.01095), sec. 4.3."""
    previous: tuple[float, Tensor] | None = None
    for now, later in levels:
        x0, _, hidden = denoise(x, now, hidden)
        decay = later.ratio / now.ratio  # exp(-h)
        x = (later.sigma / now.sigma) * decay * x
        x = x + later.alpha * (1 - decay**2) * _extrapolate(x0, previous, now, later)
        x = x + later.sigma * (1 - decay**2) ** 0.5 * noise()
        previous = (-math.log(now.ratio), x0)
        yield Step(x, x0, hidden)


def _shrink(now: NoiseLevel, later: NoiseLevel) -> float:
    """1 - exp(-h), h being the step in log(alpha / sigma)."""
    return 1 - later.ratio / now.ratio


def _extrapolate(x0: Tensor, previous: tuple[float, Tensor] | None, now: NoiseLevel, later: NoiseLevel) -> Tensor:
    """x0 carried half a step on by the line through the last two; the step to zero noise is first order."""
    if previous is None or later.sigma == 0:
        return x0
    log_now, log_later = -math.log(now.ratio), -math.log(later.ratio)
    weight = (log_later - log_now) / (2 * (log_now - previous[0]))
    return x0 + weight * (x0 - previous[1])


def dpmpp_3m(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None) -> Iterator[Step]:
    """DPM-Solver++(3M), third order, one call a step: the parabola through the last three x0, integrated exactly.

    Lu et al. 2022 (arXiv 2211.01095), eq. 11 with k = 3: x' = sigma'/sigma x + sigma' * integral of exp(l) x0(l) dl.
    """
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and x0, the latest first
    for now, later in levels:
        x0, _, hidden = denoise(x, now, hidden)
        past = [(-math.log(now.ratio), x0), *past[:2]]
        update = _shrink(now, later) * x0
        if len(past) > 1 and later.sigma > 0:
            (l0, _), (l1, d1), *rest = past
            h = -math.log(later.ratio) - l0
            first = h - _shrink(now, later)  # integral of exp(l - l') (l - l0)
            slope = (x0 - d1) / (l0 - l1)
            update = update + first * slope
            if rest:
                l2, d2 = rest[0]
                curve = (slope - (d1 - d2) / (l1 - l2)) / (l0 - l2)
                update = update + (h**2 - 2 * first + (l0 - l1) * first) * curve
        x = (later.sigma / now.sigma) * x + later.alpha * update
        yield Step(x, x0, hidden)


def heun(
    denoise: Denoise, x: Tensor, levels: Levels, noise: Noise, hidden: Any = None, *, churn: float = 0.0
) -> Iterator[Step]:
    """Second order, two calls a step (one in the last). Karras et al. 2022 (arXiv 2206.00364), algorithm 2.

    `churn` is S_churn: how much noise is added back, spread over the steps. The trapezoid is taken on the straight path
    that every path is a rescaling of, x / (alpha + sigma) at the time sigma / (alpha + sigma), where dx/dt = eps - x0:
    unlike sigma / alpha it is bounded, so that sampling may start at pure noise.
    """
    gain = min(churn / len(levels), 2**0.5 - 1)
    for now, later in levels:
        if churn:
            raised = NoiseLevel.from_ratio(now.ratio * (1 + gain), now.power)
            x = (raised.alpha / now.alpha) * x
            x = x + (raised.sigma**2 - (raised.alpha / now.alpha * now.sigma) ** 2) ** 0.5 * noise()
            now = raised
        x0, eps, hidden = denoise(x, now, hidden)
        slope = eps - x0
        x_euler = later.alpha * x0 + later.sigma * eps
        if later.sigma > 0:
            x0, eps, hidden = denoise(x_euler, later, hidden)
            before, after = now.alpha + now.sigma, later.alpha + later.sigma
            h = later.sigma / after - now.sigma / before
            x = after * (x / before + h * (slope + eps - x0) / 2)
        else:
            x = x_euler
        yield Step(x, x0, hidden)


Sampler = Callable[..., Iterator[Step]]
SAMPLERS: dict[SamplerName, Sampler] = {
    "ddim": ddim,
    "euler": ddim,  # what DDIM is, in sigma / alpha or on the straight path
    "ddpm": ddpm,
    "ddpm_small": partial(ddpm, small=True),
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "heun": heun,
}


def get_sampler(name: SamplerName, sampler_kwargs: Mapping[str, float] | None = None) -> Sampler:
    """The sampler called `name`, with its options (eta, churn) set. A `UsageError` lists the known ones."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}: known are {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    known = [p.name for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = [option for option in known if option != "small"]
    if unknown := set(sampler_kwargs or {}) - set(known):
        raise UsageError(
            f"sampler {name} has no option {', '.join(sorted(unknown))}: it has {', '.join(known) or 'none'}"
        )
    for option, value in (sampler_kwargs or {}).items():
        most = {"eta": 1.0, "churn": math.inf}[option]
        if not (0 <= value <= most and math.isfinite(value)):
            raise UsageError(f"sampler_kwargs.{option} is {value}: it lies in [0, {most:g}]")
    return partial(sampler, **(sampler_kwargs or {}))


# ---- which levels a run visits


def initial_state(levels: Levels, noise: Noise) -> Tensor:
    """Noise scaled to the first level, whose sigma may be below 1."""
    return levels[0][0].sigma * noise()


SPACINGS: tuple[SpacingName, ...] = get_args(SpacingName)
KARRAS: tuple[SamplerName, ...] = (
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "heun",
)  # far better on that spacing below 50 steps
RATIO_MIN, RATIO_MAX = 0.002, 80.0  # of sigma / alpha, where the spacing is not by time: EDM's, table 1


def make_levels(
    schedule: Schedule,
    steps: int,
    *,
    spacing: SpacingName = "uniform",
    time_difference: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[NoiseLevel, NoiseLevel]]:
    """`steps` pairs (now, next) from noise to data, as plain floats computed in `dtype`: no step waits for a device.

    `spacing` uniform and quadratic (denser near the data) are in t; karras (rho = 7; Karras et al. 2022, eq. 5) and
    logsnr are in sigma / alpha, within [0.002, 80] times the data's `scale` and the schedule's ends (the clean one, at
    t = 0.001, times the scale too), and then go to the clean end. `time_difference` td lets every step reach td steps
    further than the clock moves (the authors' asymmetric intervals; Chen et al. 2022, arXiv 2208.04202, sec. 3.2); it
    needs a spacing in t.
    Raises `UsageError` for other values.
    """
    if steps < 1:
        raise UsageError(f"steps is {steps}: sampling takes at least 1")
    if spacing not in SPACINGS:
        raise UsageError(f"unknown spacing {spacing!r}: known are {', '.join(SPACINGS)}")
    if time_difference < 0 or (time_difference and spacing in ("karras", "logsnr")):
        raise UsageError(f"time_difference is {time_difference}: it must be >= 0, and 0 with the spacing {spacing}")

    def at(t: float) -> NoiseLevel:
        return schedule(torch.tensor(t, dtype=dtype)).map(float)

    if spacing in ("uniform", "quadratic"):
        power = 2 if spacing == "quadratic" else 1
        return [
            (at((1 - i / steps) ** power), at(max(1 - (i + 1 + time_difference) / steps, 0.0) ** power))
            for i in range(steps)
        ]
    first, last = at(1.0), at(0.0)
    high = min(first.ratio, RATIO_MAX * scale)
    low = max(last.ratio, scale * max(at(1e-3).ratio, RATIO_MIN))
    places = [i / max(steps - 1, 1) for i in range(steps)]
    if spacing == "karras":
        ratios = [(high ** (1 / 7) + place * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for place in places]
    else:
        ratios = [math.exp(math.log(high) + place * math.log(low / high)) for place in places]
    nodes = [NoiseLevel.from_ratio(ratio, first.power) for ratio in ratios]
    return list(pairwise([*nodes, last]))
