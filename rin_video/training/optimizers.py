"""Optimizers and learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler

from rin_video.config import Config, OptimizerName, TrainConfig
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.training.muon import Muon

OPTIMIZERS: dict[OptimizerName, dict[str, Any]] = {  # their names in timm or their classes, and additional options
    "adamw": {"opt": "adamw", "fused": True},
    "lamb": {"opt": "lamb", "max_grad_norm": None},  # the trainer clips
    "muon": {"opt": Muon, "momentum": 0.95, "nesterov": True},
}

LONGEST_WARMUP = 0.1  # fraction of the time of a run with `train.time`


def make_optimizer(diffusion: GaussianDiffusion, config: Config) -> torch.optim.Optimizer:
    """Create AdamW, LAMB or Muon (Nesterov); weight decay is not applied to biases, norms and embeddings."""
    options, model = config.train, diffusion.model
    chosen: dict[str, Any] = {"lr": options.train_lr, "betas": tuple(options.betas), **OPTIMIZERS[options.optimizer]}
    optimizer = chosen.pop("opt")
    if isinstance(optimizer, str):
        return create_optimizer_v2(model, optimizer, weight_decay=options.weight_decay, **chosen)
    parameters: Any = model.parameters()
    if options.weight_decay:
        kept = getattr(model, "no_weight_decay", set[str])()
        parameters = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=kept)
    result: torch.optim.Optimizer = optimizer(parameters, **chosen)
    return result


class TimedLRSchedule(Scheduler):
    """A learning rate that follows the fraction of the time that is spent, which `fraction` returns."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: TrainConfig, fraction: Callable[[], float]) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.options, self.fraction = options, fraction

    def _get_lr(self, t: int) -> list[float]:
        factor = timed_lr_factor(self.options, t, self.fraction())
        return [value * factor for value in self.base_values]


def timed_lr_factor(options: TrainConfig, step: int, fraction: float) -> float:
    """Return the learning rate of a step relative to its maximum, after a `fraction` of the time in [0, 1].

    The linear warm-up ends after `warmup_steps`, or after a tenth of the time if that is earlier. The cosine starts at
    once, because the fraction at the end of the warm-up is not known; during the warm-up it is above 0.97. Both depend
    on the step and the fraction alone, so that a resumed run continues them.
    """
    warm = min(max(step / options.warmup_steps, fraction / LONGEST_WARMUP), 1.0) if options.warmup_steps else 1.0
    if options.lr_schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(fraction * options.lr_cosine_portion, 1.0)))


def make_lr_schedule(
    optimizer: torch.optim.Optimizer, config: Config, fraction: Callable[[], float] | None = None
) -> Scheduler:
    """Create a schedule with a linear warm-up, then a cosine decay or a constant rate.

    It follows the steps, or the fraction of the time that is spent if there is a function `fraction` that returns it.
    """
    options = config.train
    if fraction is not None:
        return TimedLRSchedule(optimizer, options, fraction)
    decay_steps = max(options.train_num_steps - options.warmup_steps, 1) / options.lr_cosine_portion
    return CosineLRScheduler(
        optimizer,
        t_initial=max(round(decay_steps), 2),  # with 1, the learning rate of that step would be 0
        lr_min=options.train_lr if options.lr_schedule == "constant" else 0.0,
        warmup_t=options.warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
