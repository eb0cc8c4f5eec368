"""Optimizers and the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from rin_video.config import Config, OptimizerName
from rin_video.diffusion.process import GaussianDiffusion

OPTIMIZERS: dict[OptimizerName, dict[str, Any]] = {  # as timm calls them, and what they take beside the common options
    "adamw": {"opt": "adamw", "fused": True},
    "lamb": {"opt": "lamb", "max_grad_norm": None},  # clipping is ours
    "muon": {"opt": "nmuon", "momentum": 0.95},
}


def make_optimizer(diffusion: GaussianDiffusion, config: Config) -> torch.optim.Optimizer:
    """AdamW, LAMB or (Nesterov) Muon; weight decay on matrices only, not on biases, norms and embeddings."""
    options = config.train
    return create_optimizer_v2(
        diffusion.model,
        lr=options.train_lr,
        weight_decay=options.weight_decay,
        betas=tuple(options.betas),
        **OPTIMIZERS[options.optimizer],
    )


def make_lr_schedule(optimizer: torch.optim.Optimizer, config: Config) -> CosineLRScheduler:
    """Linear warm-up, then a cosine (or a constant, which is a cosine that falls nowhere)."""
    options = config.train
    decay_steps = max(options.train_num_steps - options.warmup_steps, 1) / options.lr_cosine_portion
    return CosineLRScheduler(
        optimizer,
        t_initial=max(round(decay_steps), 2),  # over one step, that step would have no learning rate
        lr_min=options.train_lr if options.lr_schedule == "constant" else 0.0,
        warmup_t=options.warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
