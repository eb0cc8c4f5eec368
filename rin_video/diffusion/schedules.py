"""Noise schedules: plain functions of diffusion time t in [0, 1], data at t = 0 and noise at t = 1.

All but one give gamma, the share of signal power, of a variance-preserving path; `rectified_flow` gives the straight
path. Sources: Chen 2023, "On the importance of noise scheduling for diffusion models" (arXiv 2301.10972), the authors'
release, and Liu et al. 2022 (arXiv 2209.03003).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rin_video.config import ScheduleName
from rin_video.errors import UsageError

GAMMA_MIN = 1e-9


class NoiseLevel(NamedTuple):
    """How much signal and noise: x_t = alpha * x0 + sigma * eps. `gamma` is what the network is told.

    Each is a float (one level for the whole batch, as samplers use it) or a tensor that multiplies x_t. A path is the
    set of levels with alpha^power + sigma^power = 1: 2 preserves variance, 1 is rectified flow's straight line.
    """

    gamma: Any
    alpha: Any
    sigma: Any
    power: int = 2

    @classmethod
    def from_gamma(cls, gamma: Any) -> NoiseLevel:
        """On the variance-preserving path."""
        return cls(gamma, gamma**0.5, (1 - gamma) ** 0.5)

    @classmethod
    def from_edm_sigma(cls, edm_sigma: Any, power: int = 2) -> NoiseLevel:
        """The level of a path at a noise-to-signal ratio sigma / alpha."""
        alpha = (1 + edm_sigma**power) ** (-1 / power)
        return cls(1 / (1 + edm_sigma**2), alpha, alpha * edm_sigma, power)

    @property
    def edm_sigma(self) -> Any:
        """sigma / alpha: the noise level of EDM (Karras et al. 2022)."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> Any:
        """alpha^2 / sigma^2."""
        return (self.alpha / self.sigma) ** 2

    def map(self, function: Callable[[Any], Any]) -> NoiseLevel:
        """The same level with `function` on each of its three values."""
        return NoiseLevel(function(self.gamma), function(self.alpha), function(self.sigma), self.power)


def linear(t: Tensor) -> Tensor:
    """1 - t. Called simple_linear in the release."""
    return (1 - t).clamp(GAMMA_MIN, 1)


def cosine_simple(t: Tensor) -> Tensor:
    """cos((t + 0.0002) / 1.00025 * pi / 2)^2, never quite 0 or 1: the release's plain "cosine"."""
    return ((t + 0.0002) / 1.00025 * math.pi / 2).cos() ** 2


def cosine(t: Tensor, start: float = 0.0, end: float = 1.0, tau: float = 1.0) -> Tensor:
    """A stretch of cos(u pi / 2)^(2 tau), from u = start to end, rescaled to run from 1 to 0."""

    def f(u: Tensor) -> Tensor:
        return (u * math.pi / 2).cos().clamp(min=0) ** (2 * tau)  # cos(pi / 2) may round below 0

    first, last = f(t.new_tensor(start)), f(t.new_tensor(end))
    return ((f(start + t * (end - start)) - last) / (first - last)).clamp(GAMMA_MIN, 1)


def sigmoid(t: Tensor, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """A stretch of the falling sigmoid 1 / (1 + exp(u / tau)), from u = start to end, rescaled to run from 1 to 0."""

    def f(u: Tensor) -> Tensor:
        return (u / tau).sigmoid()

    first, last = f(t.new_tensor(start)), f(t.new_tensor(end))
    return ((last - f(start + t * (end - start))) / (last - first)).clamp(GAMMA_MIN, 1)


def rectified_flow(t: Tensor) -> NoiseLevel:
    """The straight path: alpha = 1 - t, sigma = t. gamma is alpha^2 / (alpha^2 + sigma^2)."""
    alpha = (1 - t).clamp(min=GAMMA_MIN**0.5)
    return NoiseLevel(alpha**2 / (alpha**2 + t**2), alpha, t, power=1)


SCHEDULES: dict[ScheduleName, Callable[..., Tensor | NoiseLevel]] = {
    "linear": linear,
    "cosine": cosine,
    "cosine_simple": cosine_simple,
    "sigmoid": sigmoid,
    "rectified_flow": rectified_flow,
}

Schedule = Callable[[Tensor], NoiseLevel]


def make_schedule(name: ScheduleName, parameters: Mapping[str, float] | None = None) -> Schedule:
    """The function t -> `NoiseLevel` of the schedule called `name` (one of `SCHEDULES`), with its parameters.

    Raises `UsageError` for an unknown name or parameter, and for parameters that span nothing.
    """
    if name not in SCHEDULES:
        raise UsageError(f"unknown noise_schedule {name!r}: known are {', '.join(SCHEDULES)}")
    function, kwargs = SCHEDULES[name], dict(parameters or {})
    known = list(inspect.signature(function).parameters)[1:]
    if unknown := set(kwargs) - set(known):
        raise UsageError(
            f"noise_schedule {name} has no parameter {', '.join(sorted(unknown))}: it has {', '.join(known) or 'none'}"
        )

    def schedule(t: Tensor) -> NoiseLevel:
        value = function(t, **kwargs)
        return value if isinstance(value, NoiseLevel) else NoiseLevel.from_gamma(value)

    try:
        gamma = schedule(torch.linspace(0, 1, 65, dtype=torch.float64, device="cpu")).gamma
    except ArithmeticError:
        gamma = torch.tensor([torch.nan])
    if not (gamma.isfinite().all() and (gamma.diff() <= 0).all() and (gamma[1:] < 1).all()):
        raise UsageError(
            f"noise_schedule {name} with {kwargs} does not fall from signal to noise: it gives {gamma[0]:.3g} to "
            f"{gamma[-1]:.3g}"
        )
    return schedule
