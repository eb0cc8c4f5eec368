"""Noise schedules: functions of the diffusion time t in [0, 1], with data at t = 0 and noise at t = 1.

`rectified_flow` returns noise levels on the straight path. All other schedules return gamma, the fraction of signal
power on a variance-preserving path. Sources: Chen 2023, "On the importance of noise scheduling for diffusion models"
(arXiv 2301.10972), the authors' release, and Liu et al. 2022 (arXiv 2209.03003).
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
    """A noise level: x_t = alpha * x0 + sigma * eps. The network receives `gamma`, the fraction of signal power.

    Each value is a float (one level for the entire batch, as in samplers) or a tensor that broadcasts with x_t. A path
    is the set of levels with alpha^power + sigma^power = 1. `power` is 2 for a variance-preserving path and 1 for the
    straight path of rectified flow.
    """

    gamma: Any
    alpha: Any
    sigma: Any
    power: int = 2

    @classmethod
    def from_gamma(cls, gamma: Any) -> NoiseLevel:
        """Return the level of the variance-preserving path at `gamma`."""
        return cls(gamma, gamma**0.5, (1 - gamma) ** 0.5)

    @classmethod
    def from_edm_sigma(cls, edm_sigma: Any, power: int = 2) -> NoiseLevel:
        """Return the level of a path at a noise-to-signal ratio `edm_sigma` = sigma / alpha."""
        alpha = (1 + edm_sigma**power) ** (-1 / power)
        return cls(1 / (1 + edm_sigma**2), alpha, alpha * edm_sigma, power)

    @property
    def edm_sigma(self) -> Any:
        """The noise-to-signal ratio sigma / alpha, which is the noise level of EDM (Karras et al. 2022)."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> Any:
        """The signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha / self.sigma) ** 2

    def map(self, function: Callable[[Any], Any]) -> NoiseLevel:
        """Return the level with `function` applied to gamma, alpha and sigma."""
        return NoiseLevel(function(self.gamma), function(self.alpha), function(self.sigma), self.power)


def linear(t: Tensor) -> Tensor:
    """Return gamma = 1 - t. The authors' release calls this simple_linear."""
    return (1 - t).clamp(GAMMA_MIN, 1)


def cosine_simple(t: Tensor) -> Tensor:
    """Return gamma = cos((t + 0.0002) / 1.00025 * pi / 2)^2, never exactly 0 or 1: "cosine" in the authors' release."""
    return ((t + 0.0002) / 1.00025 * math.pi / 2).cos() ** 2


def cosine(t: Tensor, start: float = 0.0, end: float = 1.0, tau: float = 1.0) -> Tensor:
    """Return gamma as the part of cos(u pi / 2)^(2 tau) from u = start to end, rescaled to fall from 1 to 0."""

    def f(u: Tensor) -> Tensor:
        return (u * math.pi / 2).cos().clamp(min=0) ** (2 * tau)  # cos(pi / 2) may round below 0

    first, last = f(t.new_tensor(start)), f(t.new_tensor(end))
    return ((f(start + t * (end - start)) - last) / (first - last)).clamp(GAMMA_MIN, 1)


def sigmoid(t: Tensor, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """Return gamma as the part of 1 / (1 + exp(u / tau)) from u = start to end, rescaled to fall from 1 to 0."""

    def f(u: Tensor) -> Tensor:
        return (u / tau).sigmoid()

    first, last = f(t.new_tensor(start)), f(t.new_tensor(end))
    return ((last - f(start + t * (end - start))) / (last - first)).clamp(GAMMA_MIN, 1)


def rectified_flow(t: Tensor) -> NoiseLevel:
    """Return the level of the straight path: alpha = 1 - t, sigma = t, gamma = alpha^2 / (alpha^2 + sigma^2)."""
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
    """Return the schedule `name`, a key of `SCHEDULES`, as a function from times t to `NoiseLevel`.

    Raises `UsageError` for an unknown name or parameter, and for parameters with which gamma does not fall from t = 0
    to t = 1.
    """
    if name not in SCHEDULES:
        raise UsageError(f"unknown noise_schedule {name!r}: choose {', '.join(SCHEDULES)}")
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
            f"noise_schedule {name} with {kwargs} does not decrease from signal to noise: gamma goes from "
            f"{gamma[0]:.3g} to {gamma[-1]:.3g}"
        )
    return schedule
