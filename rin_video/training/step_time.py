"""Measures how long a training step takes, before a model is chosen."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rin_video.config import Config
from rin_video.diffusion.precision import running_in
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.model.rin import RIN
from rin_video.training.distributed import per_process_batch
from rin_video.training.ema import make_ema, make_power_emas
from rin_video.training.memory import checkpoint_blocks
from rin_video.training.optimizers import make_optimizer

MOST = 4  # forward and backward passes to measure


def measure_step(config: Config, device: torch.device, *, num_processes: int = 1, enough: float = 2.0) -> float:
    """Return the seconds of a training step: forward and backward passes, optimizer and EMAs, on random data.

    About `enough` seconds are measured, after as long a warm-up. If a batch takes longer, a part of it is measured and
    the time is scaled, which is about right where long steps occur. Reading data and communication between processes
    are not included.
    """
    options, each = config.train, per_process_batch(config.train.train_batch_size, num_processes)
    model = RIN(config.model).to(device).train()
    checkpoint_blocks(model, options.gradient_checkpointing)
    diffusion = GaussianDiffusion(model, config.diffusion)
    optimizer = make_optimizer(diffusion, config)
    emas = [make_ema(model, options, device), *make_power_emas(model, options, device)]

    def forward_backward(batch_size: int) -> None:
        x = torch.rand(batch_size, *model.shape, device=device)
        label = torch.zeros(batch_size, dtype=torch.long, device=device) if config.model.num_classes else None
        embedding = None
        if config.model.embedding_dim:
            size = config.model.embedding_tokens, config.model.embedding_dim
            embedding = torch.zeros(batch_size, *size, device=device)
        with running_in(options.mixed_precision, device):
            loss = diffusion(x, label, embedding=embedding)
        loss.backward()

    def update() -> None:
        optimizer.step()
        for ema in emas:
            ema.update()

    def seconds(work: Callable[[], None]) -> float:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start

    forward_backward(1)
    one = seconds(lambda: forward_backward(1))
    part = min(each, max(int(enough / one), 1))
    if part > 1:
        forward_backward(part)
    taken = [seconds(lambda: forward_backward(part))]
    while len(taken) < MOST and sum(taken) < enough:
        taken.append(seconds(lambda: forward_backward(part)))
    update()  # creates the moments
    return sum(taken) / len(taken) * each / part * options.gradient_accumulate_every + seconds(update)


def _wait(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
