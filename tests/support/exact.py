"""An exact denoiser of Gaussian data."""

import torch
from torch import Tensor, nn

STD = 0.5


class Gaussian(nn.Module):
    """The exact predictor of v for data N(0, STD^2), times `factor`; half of its latents are dead."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x_t: Tensor, gamma: Tensor, *, latents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        gamma = gamma.reshape(-1, 1, 1)
        alpha, sigma = gamma.sqrt(), (1 - gamma).sqrt()
        variance = gamma * STD**2 + 1 - gamma
        v = alpha * sigma * (1 - STD**2) / variance * x_t
        live = x_t.mean((1, 2)).reshape(-1, 1, 1).expand(-1, 2, 4)
        return self.factor * v, torch.cat([live, torch.ones_like(live)], dim=1)
