"""Objectives: prediction targets, estimates of x0 and eps, loss weights, sampling of times, and clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from rin_video.config import ClippingName, LossWeightName, ObjectiveName, TimeSamplingName
from rin_video.diffusion.noise import RNG
from rin_video.diffusion.schedules import GAMMA_MIN, NoiseLevel
from rin_video.errors import UsageError

OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)


def target(objective: ObjectiveName, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """Return the value that the model should predict, (B, C, *grid).

    v: Salimans & Ho 2022 (arXiv 2202.00512), sec. 4. velocity: dx/dt of rectified flow (arXiv 2209.03003), on any path.
    """
    if objective == "eps":
        return eps
    if objective == "x0":
        return x0
    if objective == "velocity":
        return eps - x0
    v: Tensor = level.alpha * eps - level.sigma * x0
    return v


def to_x0_eps(objective: ObjectiveName, prediction: Tensor, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Convert a prediction to estimates of x0 and eps, both (B, C, *grid) and not clipped."""
    _, alpha, sigma, _ = level
    if objective == "eps":
        return (x_t - sigma * prediction) / alpha, prediction
    if objective == "x0":
        return prediction, eps_from_x0(prediction, x_t, level)
    if objective == "velocity":
        return (x_t - sigma * prediction) / (alpha + sigma), (x_t + alpha * prediction) / (alpha + sigma)
    power = alpha**2 + sigma**2  # 1 on a variance-preserving path
    return (alpha * x_t - sigma * prediction) / power, (sigma * x_t + alpha * prediction) / power


def eps_from_x0(x0: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """Return the noise eps that solves x_t = alpha * x0 + sigma * eps."""
    eps: Tensor = (x_t - level.alpha * x0) / level.sigma
    return eps


# ---- loss weights: each docstring has the form of the paper; each function returns the weight on the error of x0


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight min(snr, gamma) on the squared error of x0. Hang et al. 2023 (arXiv 2303.09556), eq. 8."""
    return snr.clamp(max=gamma)


def p2(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """Weight (k + snr)^-gamma on the squared error of eps. Choi et al. 2022 (arXiv 2204.00227), eq. 8."""
    return snr * (k + snr) ** -gamma


def sigmoid_weight(snr: Tensor, bias: float = 0.0) -> Tensor:
    """Weight sigmoid(bias - log snr) on the squared error of eps. Kingma & Gao 2023 (arXiv 2303.00848), sec. 4.

    The paper integrates over log snr. Here t is sampled, and the error at t is multiplied by the weight without a
    correction for this.
    """
    return snr * torch.sigmoid(bias - snr.log())


def power_weight(snr: Tensor, power: float = 0.5, limit: float = 20.0) -> Tensor:
    """Weight min(snr + 1, limit)^power on the squared error of x0.

    On a variance-preserving path, power 0 is the x0 loss, and power 1 with an infinite limit is the v loss. Layouts are
    learned at high noise, to which the v loss gives little weight. Textures are learned at low noise, to which the x0
    loss gives little weight. With a power between 0 and 1, a small model learns both: see benchmarks/README.md.
    """
    return (snr + 1).clamp(max=limit) ** power


LOSS_WEIGHTS: dict[LossWeightName, Callable[..., Tensor]] = {
    "min_snr": min_snr,
    "p2": p2,
    "sigmoid": sigmoid_weight,
    "power": power_weight,
}


def make_loss_weight(
    name: LossWeightName, objective: ObjectiveName, parameters: Mapping[str, float] | None = None
) -> Callable[[NoiseLevel], Any]:
    """Return the weight of the squared error of `objective` as a function of the noise level.

    `name` is "none" or "balanced" (weight 1; see `LossBalance`) or a key of `LOSS_WEIGHTS`, and `parameters` are its
    arguments. The weight on the squared error of x0 is divided by the ratio of the squared error of the objective to
    that of x0. On a variance-preserving path, this ratio is snr for eps and snr + 1 for v, so that min-SNR for v is
    min(snr, gamma) / (snr + 1). Raises `UsageError` for unknown names, unknown parameters and values out of range.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective {objective!r}: choose {', '.join(OBJECTIVES)}")
    kwargs = dict(parameters or {})
    known = list(inspect.signature(LOSS_WEIGHTS[name]).parameters)[1:] if name in LOSS_WEIGHTS else []
    if name not in ("none", "balanced", *LOSS_WEIGHTS):
        raise UsageError(f"unknown loss_weight {name!r}: choose none, {', '.join(LOSS_WEIGHTS)}, balanced")
    if unknown := set(kwargs) - set(known):
        raise UsageError(
            f"loss_weight {name} has no parameter {', '.join(sorted(unknown))}: it has {', '.join(known) or 'none'}"
        )
    for parameter, value in kwargs.items():
        low = {"bias": -math.inf, "k": 0.0, "power": 0.0}.get(parameter, math.ulp(0.0))
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
            expected = {-math.inf: "a number", 0.0: "a number, at least 0"}.get(low, "a number above 0")
            raise UsageError(f"diffusion.loss_weight.{parameter} is {value!r}: it must be {expected}")
    if name in ("none", "balanced"):
        return lambda level: 1.0
    on_x0 = partial(LOSS_WEIGHTS[name], **kwargs)

    def weight(level: NoiseLevel) -> Tensor:
        _, alpha, sigma, _ = level
        slopes = {  # |d x0 / d prediction|, from `to_x0_eps`
            "x0": 1,
            "eps": sigma / alpha,
            "v": sigma / (alpha**2 + sigma**2),
            "velocity": sigma / (alpha + sigma),
        }
        snr = level.snr.clamp(max=1 / GAMMA_MIN)  # infinite without noise
        result: Tensor = on_x0(snr) * slopes[objective] ** 2
        return result

    return weight


# ---- sampling of training times


def uniform_time(rng: RNG) -> Tensor:
    """Sample times (B,) uniformly in [0, 1)."""
    return rng.uniform()


def low_discrepancy_time(rng: RNG) -> Tensor:
    """Sample times (B,) uniformly in [0, 1), equally spaced over the global batch from a random start.

    The loss of a batch then varies less. Kingma et al. 2021 (arXiv 2107.00630), app. I.1.
    """
    return (rng.common_uniform() + rng.places()) % 1


def logit_normal_time(rng: RNG, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Sample times (B,) as sigmoid(mean + std * n), with n standard normal.

    Esser et al. 2024 (arXiv 2403.03206), sec. 3.1.
    """
    return torch.sigmoid(mean + std * rng.normal())


TIME_SAMPLINGS: dict[TimeSamplingName, Callable[..., Tensor]] = {
    "uniform": uniform_time,
    "low_discrepancy": low_discrepancy_time,
    "logit_normal": logit_normal_time,
}


# ---- clipping of x0 estimates to the range of the data


def clip_static(x0: Tensor, limit: float) -> Tensor:
    """Clip `x0` (B, C, *grid) to [-limit, limit]."""
    return x0.clamp(-limit, limit)


def clip_dynamic(x0: Tensor, limit: float, quantile: float = 0.995) -> Tensor:
    """Clip each sample of `x0` (B, C, *grid) at a quantile of its |x0|, and scale it to [-limit, limit].

    A quantile below the limit is replaced by the limit. Saharia et al. 2022 (arXiv 2205.11487), "dynamic thresholding".
    """
    magnitude = x0.abs().flatten(1).float()
    rank = max(min(round(quantile * magnitude.shape[1]), magnitude.shape[1]), 1)
    bound = magnitude.kthvalue(rank, dim=1).values.clamp(min=limit).to(x0.dtype)
    bound = bound.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-bound, bound) * (limit / bound)


CLIPS: dict[ClippingName, Callable[[Tensor, float], Tensor]] = {
    "static": clip_static,
    "dynamic": clip_dynamic,
    "none": lambda x0, limit: x0,
}
