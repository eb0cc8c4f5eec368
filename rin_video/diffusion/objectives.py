"""What the network predicts, how a prediction becomes data and noise, and how errors are weighed over noise levels."""

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
    """What the model should have said.

    v: Salimans & Ho 2022 (arXiv 2202.00512), sec. 4. velocity: dx/dt of rectified flow (arXiv 2209.03003), on any path.
    """
    if objective == "eps":
        return eps
    if objective == "x0":
        return x0
    if objective == "velocity":
        return eps - x0
    return level.alpha * eps - level.sigma * x0


def to_x0_eps(objective: ObjectiveName, prediction: Tensor, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The one place where a prediction becomes estimates of the data and the noise; neither is clipped."""
    _, alpha, sigma, _ = level
    if objective == "eps":
        return (x_t - sigma * prediction) / alpha, prediction
    if objective == "x0":
        return prediction, eps_from_x0(prediction, x_t, level)
    if objective == "velocity":
        return (x_t - sigma * prediction) / (alpha + sigma), (x_t + alpha * prediction) / (alpha + sigma)
    power = alpha**2 + sigma**2  # 1 where variance is preserved
    return (alpha * x_t - sigma * prediction) / power, (sigma * x_t + alpha * prediction) / power


def eps_from_x0(x0: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """The noise that makes `x_t` of `x0`."""
    return (x_t - level.alpha * x0) / level.sigma


# ---- loss weights: each is written for the squared error of eps, or of x0, as in its paper; the objective follows


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight on the error of x0: min(snr, gamma). Hang et al. 2023 (arXiv 2303.09556), eq. 8."""
    return snr.clamp(max=gamma)


def p2(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """Weight on the error of eps: (k + snr)^-gamma. Choi et al. 2022 (arXiv 2204.00227), eq. 8."""
    return snr * (k + snr) ** -gamma


def sigmoid_weight(snr: Tensor, bias: float = 0.0) -> Tensor:
    """Weight on the error of eps: sigmoid(bias - log snr). Kingma & Gao 2023 (arXiv 2303.00848), sec. 4.

    Their integral is over log snr; here t is drawn, and the weight multiplies its error as it is.
    """
    return snr * torch.sigmoid(bias - snr.log())


def power_weight(snr: Tensor, power: float = 0.5, limit: float = 20.0) -> Tensor:
    """Weight on the error of x0: min(snr + 1, limit)^power.

    Where variance is preserved, power 0 is the loss of x0, and 1 without limit (infinity) that of v. Layouts are learnt
    at high noise, of which the loss of v has a small share; textures at low noise, of which that of x0 has. Between the
    two a small model learns both: benchmarks/README.md has the figures.
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
    """The weight of the squared error of `objective` at a level: "none" (1), or one of `LOSS_WEIGHTS`.

    A weight on the error of x0 is divided by how much larger the error of the objective is at the same level: where
    variance is preserved, by snr for eps and snr + 1 for v; min-SNR for v is min(snr, gamma) / (snr + 1).
    Raises `UsageError` for unknown names and parameters.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective {objective!r}: known are {', '.join(OBJECTIVES)}")
    kwargs = dict(parameters or {})
    known = list(inspect.signature(LOSS_WEIGHTS[name]).parameters)[1:] if name in LOSS_WEIGHTS else []
    if name not in ("none", *LOSS_WEIGHTS):
        raise UsageError(f"unknown loss_weight {name!r}: known are none, {', '.join(LOSS_WEIGHTS)}")
    if unknown := set(kwargs) - set(known):
        raise UsageError(
            f"loss_weight {name} has no parameter {', '.join(sorted(unknown))}: it has {', '.join(known) or 'none'}"
        )
    for parameter, value in kwargs.items():
        low = {"bias": -math.inf, "k": 0.0, "power": 0.0}.get(parameter, math.ulp(0.0))
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
            wanted = {-math.inf: "a number", 0.0: "a number, at least 0"}.get(low, "a number above 0")
            raise UsageError(f"diffusion.loss_weight.{parameter} is {value!r}: it must be {wanted}")
    if name == "none":
        return lambda level: 1.0
    on_x0 = partial(LOSS_WEIGHTS[name], **kwargs)

    def weight(level: NoiseLevel) -> Tensor:
        _, alpha, sigma, _ = level
        share = {  # how far an error of the objective moves x0: see to_x0_eps
            "x0": 1,
            "eps": sigma / alpha,
            "v": sigma / (alpha**2 + sigma**2),
            "velocity": sigma / (alpha + sigma),
        }
        return on_x0(level.snr.clamp(max=1 / GAMMA_MIN)) * share[objective] ** 2  # no noise at all: snr is infinite

    return weight


# ---- which times training draws


def uniform_time(rng: RNG) -> Tensor:
    """t uniform in [0, 1]."""
    return rng.uniform()


def low_discrepancy_time(rng: RNG) -> Tensor:
    """t uniform in [0, 1], those of a batch equally far apart from a random start, so that its loss varies less.

    Of several processes, those of all together. Kingma et al. 2021 (arXiv 2107.00630), app. I.1.
    """
    return (rng.common_uniform() + rng.places()) % 1


def logit_normal_time(rng: RNG, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std * n), n standard normal. Esser et al. 2024 (arXiv 2403.03206), sec. 3.1."""
    return torch.sigmoid(mean + std * rng.normal())


TIME_SAMPLINGS: dict[TimeSamplingName, Callable[..., Tensor]] = {
    "uniform": uniform_time,
    "low_discrepancy": low_discrepancy_time,
    "logit_normal": logit_normal_time,
}


# ---- keeping x0 estimates in the data's range


def clip_static(x0: Tensor, limit: float) -> Tensor:
    """x0 clipped to [-limit, limit]."""
    return x0.clamp(-limit, limit)


def clip_dynamic(x0: Tensor, limit: float, quantile: float = 0.995) -> Tensor:
    """Each sample clipped at its own quantile of |x0|, if that exceeds the limit, and scaled back to it.

    Saharia et al. 2022 (arXiv 2205.11487), "dynamic thresholding".
    """
    magnitude = x0.abs().flatten(1).float()
    place = max(min(round(quantile * magnitude.shape[1]), magnitude.shape[1]), 1)
    reach = magnitude.kthvalue(place, dim=1).values.clamp(min=limit).to(x0.dtype)
    reach = reach.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-reach, reach) * (limit / reach)


CLIPS: dict[ClippingName, Callable[[Tensor, float], Tensor]] = {
    "static": clip_static,
    "dynamic": clip_dynamic,
    "none": lambda x0, limit: x0,
}
