"""Balance of the loss: samples of every noise level, with and without known pixels, count the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

LEVELS = 16  # equal parts of the times [0, 1]
RATE = 0.05  # part of a sample in the running mean of its level


class LossBalance(nn.Module):
    """Divides the error of each sample by the running mean of the errors of its kind.

    A kind is a noise level, with or without known pixels. Without balance, samples with large errors dominate: those at
    high noise, and among samples with and without given frames those without, whose error may be a hundred times
    larger. The divisor depends on what the network sees, not on the target, so that the minimum of the loss does not
    change. It replaces the weights by noise level that Karras et al. 2024 (arXiv 2312.02696, eq. 17) learn with a small
    network, whose optimum is this mean.
    """

    means: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(2, LEVELS))  # [with known pixels, level]; 0: no sample yet

    def forward(self, error: Tensor, t: Tensor, known: Tensor | None) -> Tensor:
        """Return the errors (B,) at times `t` (B,), divided by the means of their kinds.

        In training, these are updated first, with the samples of all processes. `known` (B, 1, *grid) is the observed
        mask or None.
        """
        kind = torch.zeros_like(t, dtype=torch.long) if known is None else known.flatten(1).any(1).long()
        if self.training:
            self._update(error.detach().float(), t, kind)
        means = self.means.where(self.means > 0, self.means.amax(1, keepdim=True))  # levels without a sample yet
        place = (t.float() * LEVELS - 0.5).clamp(0, LEVELS - 1)
        lower = place.floor().long().clamp(max=LEVELS - 2)
        mean = torch.lerp(means[kind, lower], means[kind, lower + 1], place - lower)
        return error / mean.clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _update(self, error: Tensor, t: Tensor, kind: Tensor) -> None:
        level = (t * LEVELS).long().clamp(max=LEVELS - 1)
        finite = error.isfinite()
        sums = torch.zeros(2, *self.means.shape, device=error.device)  # of the errors, and of the samples
        sums[0].index_put_((kind, level), error.where(finite, 0), accumulate=True)
        sums[1].index_put_((kind, level), finite.float(), accumulate=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, count = sums
        rate = torch.where(self.means > 0, 1 - (1 - RATE) ** count, (count > 0).float())
        self.means.lerp_(total / count.clamp(min=1), rate)
