"""Random alterations of pictures, which the extractor "self" learns to recognise so that it sees appearance."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ALTERATIONS = ("none", "filtered", "softened", "warped", "exchanged", "noisy", "recoloured", "blended")
WEAKEST = 0.15


def altered(kind: str, strength: float, x: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a clip (3, F, H, W) from 0 to 255 with an alteration of `ALTERATIONS`, whose strength is in (0, 1].

    The families are broad, so that the network does not learn the marks of single damages.
    """
    if kind == "none":
        return x
    frames = x.float().transpose(0, 1)
    y = FAMILIES[kind](frames, strength, rng)
    return y.clamp(0, 255).transpose(0, 1)


def filtered(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Convolve with a random kernel that keeps the mean."""
    size = int(rng.choice([3, 5]))
    kernel = draw(rng, size, size) * strength * 2 / size
    kernel -= kernel.mean()
    kernel[size // 2, size // 2] += 1
    return F.conv2d(pad(x, size // 2), kernel.expand(3, 1, size, size), groups=3)


def softened(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Mix with a smooth version, everywhere or in random places."""
    H, W = x.shape[-2:]
    scale = 1 - rng.uniform(0.4, 0.8) * strength
    small = F.interpolate(x, (max(int(H * scale), 1), max(int(W * scale), 1)), mode="bilinear", antialias=True)
    smooth = F.interpolate(small, (H, W), mode="bilinear")
    mask = smooth_field(rng, 1, H, W).mul(3).sigmoid() if rng.random() < 0.5 else 1.0
    return x + mask * (smooth - x)


def warped(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Move the pixels along a smooth random field, the same for all frames."""
    H, W = x.shape[-2:]
    across, down = torch.meshgrid(torch.linspace(-1, 1, W), torch.linspace(-1, 1, H), indexing="xy")
    field = smooth_field(rng, 2, H, W) * strength * 0.25
    grid = torch.stack([across + field[0, 0], down + field[0, 1]], dim=-1)
    return F.grid_sample(x, grid.expand(len(x), H, W, 2), padding_mode="reflection", align_corners=True)


def exchanged(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Exchange pairs of rectangles."""
    H, W = x.shape[-2:]
    x = x.clone()
    for _ in range(int(rng.integers(1, 2 + int(6 * strength)))):
        h, w = (max(int(side * rng.uniform(0.06, 0.1 + 0.3 * strength)), 1) for side in (H, W))
        (top, left), (other, right) = ((int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))) for _ in range(2))
        one, two = x[..., top : top + h, left : left + w].clone(), x[..., other : other + h, right : right + w].clone()
        x[..., top : top + h, left : left + w] = two
        x[..., other : other + h, right : right + w] = one
    return x


def noisy(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Add noise of a random grain and colour, which changes from frame to frame or stays."""
    F_, _, H, W = x.shape
    grain, num = int(rng.choice([1, 2, 4])), F_ if rng.random() < 0.7 else 1
    noise = draw(rng, num, 3 if rng.random() < 0.5 else 1, -(-H // grain), -(-W // grain))
    noise = F.interpolate(noise, scale_factor=grain, mode="nearest")[..., :H, :W]
    return x + noise * 40 * strength


def recoloured(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Mix the channels, and change the contrast and the brightness of each."""
    matrix = torch.eye(3) + draw(rng, 3, 3) * 0.35 * strength
    return torch.einsum("dc,fchw->fdhw", matrix, x - 128) + 128 + draw(rng, 3, 1, 1) * 40 * strength


def blended(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Mix each frame with the mean over all frames or over its neighbours, everywhere or in random places."""
    H, W = x.shape[-2:]
    if rng.random() < 0.5 or len(x) < 3:
        mean = x.mean(0, keepdim=True)
    else:
        mean = (torch.cat([x[:1], x[:-1]]) + x + torch.cat([x[1:], x[-1:]])) / 3
    mask = smooth_field(rng, 1, H, W).mul(3).sigmoid() if rng.random() < 0.5 else 1.0
    return x + strength * mask * (mean - x)


FAMILIES = {
    "filtered": filtered,
    "softened": softened,
    "warped": warped,
    "exchanged": exchanged,
    "noisy": noisy,
    "recoloured": recoloured,
    "blended": blended,
}


def draw(rng: np.random.Generator, *shape: int) -> Tensor:
    """Return normal random numbers."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def smooth_field(rng: np.random.Generator, channels: int, H: int, W: int) -> Tensor:
    """Return smooth random fields (1, channels, H, W) of a random scale."""
    cells = int(rng.integers(2, 7))
    return F.interpolate(draw(rng, 1, channels, cells, cells), (H, W), mode="bicubic", align_corners=True)


def pad(x: Tensor, width: int) -> Tensor:
    """Repeat the border of pictures."""
    return F.pad(x, (width, width, width, width), mode="replicate")
