"""Optimizers and learning rate schedules."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from rin_video.config import Config, OptimizerName
from rin_video.diffusion.process import GaussianDiffusion

OPTIMIZERS: dict[OptimizerName, dict[str, Any]] = {  # their names in timm, and additional options
    "adamw": {"opt": "adamw", "fused": True},
    "lamb": {"opt": "lamb", "max_grad_norm": None},  # the trainer clips
    "muon": {"opt": "nmuon", "momentum": 0.95},
}


def make_optimizer(diffusion: GaussianDiffusion, config: Config) -> torch.optim.Optimizer:
    """Create AdamW, LAMB or Muon (Nesterov); weight decay is not applied to biases, norms and embeddings."""
    options = config.train
    return create_optimizer_v2(
        diffusion.model,
        lr=options.train_lr,
        weight_decay=options.weight_decay,
        betas=tuple(options.betas),
        **OPTIMIZERS[options.optimizer],
    )


def make_lr_schedule(optimizer: torch.optim.Optimizer, config: Config) -> CosineLRScheduler:
    """Create a schedule with a linear warm-up, then a cosine decay or a constant rate."""
    options = config.train
    decay_steps = max(options.train_num_steps - options.warmup_steps, 1) / options.lr_cosine_portion
    return CosineLRScheduler(
        optimizer,
        t_initial=max(round(decay_steps), 2),  # with 1, the learning rate of that step would be 0
        lr_min=options.train_lr if options.lr_schedule == "constant" else 0.0,
        warmup_t=options.warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
