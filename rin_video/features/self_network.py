"""The network of the extractor "self": convolutions over frames and their changes, then over time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS, KERNELS = (24, 48, 96, 192), (5, 3, 3, 3)  # of the convolutions over space
TIME_WIDTH = 128  # of the convolutions over time
HIDDEN = 128  # width of the last hidden layer
FEATURES = 16  # of a clip; few: directions of little variance are noise, and the width biases distances
MATCH = 64  # width of the embedding that windows of one clip share
OCTAVES = 3  # of which the network is told the strength
SCALE = 0.75  # of the input, for the convolutions
LAGS = (1, 2)  # frames between those whose distance the network is told


class SelfNetwork(nn.Module):
    """Maps clips (B, 3, F, H, W) in [-1, 1] to a hidden layer (B, 128), and this to the answers of the tasks.

    The input has the differences of consecutive frames as further channels, divided by their root mean square. Frames
    exchange channels as in the temporal shift module (Lin et al. 2019), so that 2D convolutions see three frames each.
    After the mean over space come two convolutions over time, which also get the mean absolute distance of frames that
    are one and two apart. The hidden layer gets their mean and maximum over time and, for the texture, the means and
    standard deviations of the first three layers over time and space, and `octaves` of the input. An image is a clip of
    one frame.

    `features` returns what distances compare: the 16 principal directions of the hidden layer, each of variance 1 on
    the training data. Without this, the classes alone would decide, whose variance is much larger than the others.
    """

    centre: Tensor
    directions: Tensor

    def __init__(self, num_tasks: int, num_alterations: int, num_classes: int) -> None:
        super().__init__()
        sizes = (6, *WIDTHS)
        self.space = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], kernel, stride=2, padding=kernel // 2) for i, kernel in enumerate(KERNELS)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.norm = nn.LayerNorm(2 * WIDTHS[-1])
        self.time = nn.ModuleList(
            nn.Conv1d(width, TIME_WIDTH, 3, padding=1) for width in (2 * WIDTHS[-1] + 3 * len(LAGS), TIME_WIDTH)
        )
        self.texture = nn.LayerNorm(2 * sum(WIDTHS[:-1]))
        self.hidden = nn.Linear(2 * TIME_WIDTH + 2 * sum(WIDTHS[:-1]) + 6 * (OCTAVES + 1), HIDDEN)
        self.task = nn.Linear(HIDDEN, num_tasks)
        self.alteration = nn.Linear(HIDDEN, num_alterations)
        self.strength = nn.Linear(HIDDEN, 1)
        self.match = nn.Linear(HIDDEN, MATCH)
        self.label = nn.Linear(HIDDEN, num_classes) if num_classes else None
        self.register_buffer("centre", torch.zeros(HIDDEN))
        self.register_buffer("directions", torch.eye(HIDDEN)[:, :FEATURES].clone())
        for layer in (*self.space, *self.time):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden layer of clips."""
        bands = octaves(x)
        x = reduce(x)
        change = steps(x, 1)
        gain = 1 / (change.square().mean((1, 2, 3, 4), keepdim=True).sqrt() + 0.01)  # small things that move count
        y, textures = torch.cat([x, gain * change], dim=1), []
        for number, (convolution, norm) in enumerate(zip(self.space, self.norms, strict=True)):
            y = shift(y) if number else y
            y = convolution(y.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
            y = F.relu(norm(y))  # over all frames, so that a still frame differs from a moving one
            textures += [y.mean((2, 3, 4)), y.std((2, 3, 4), correction=0)] if number < len(WIDTHS) - 1 else []
        change = steps(y, 1).abs().mean((3, 4))
        z = self.norm(torch.cat([y.mean((3, 4)), 2 * change], dim=1).transpose(1, 2)).transpose(1, 2)
        distances = [(steps(x, lag).abs().mean((3, 4)) * 127.5 + 0.02).log() for lag in LAGS]
        z = torch.cat([z, *distances], dim=1)
        for layer in self.time:
            z = F.relu(layer(z))
        texture = torch.cat([self.texture(torch.cat(textures, dim=1)), bands], dim=1)
        return F.relu(self.hidden(torch.cat([z.mean(2), z.amax(2), texture], dim=1)))

    def features(self, x: Tensor) -> Tensor:
        """Return the features of clips, (B, 16)."""
        return (self(x) - self.centre) @ self.directions

    @torch.no_grad()
    def set_directions(self, hidden: Tensor) -> None:
        """Set the principal directions from the hidden layer of the training data, (N, 128)."""
        hidden = hidden.double().cpu()
        variances, directions = torch.linalg.eigh(hidden.T.cov(correction=0))  # in ascending order
        scale = (variances + 1e-3 * variances.mean() + 1e-12).rsqrt()  # few samples have directions without variance
        self.centre.copy_(hidden.mean(0))
        self.directions.copy_((directions * scale).flip(1)[:, :FEATURES])


def steps(x: Tensor, lag: int) -> Tensor:
    """Return x[t + lag] - x[t] of (B, C, F, ...) for every frame: the last ones are repeated; 0 if there is none."""
    if x.shape[2] <= lag:
        return torch.zeros_like(x)
    y = x[:, :, lag:] - x[:, :, :-lag]
    return torch.cat([y, y[:, :, -1:].expand(-1, -1, lag, *x.shape[3:])], dim=2)


def shift(x: Tensor) -> Tensor:
    """Move a quarter of the channels of (B, C, F, H, W) one frame on, and a quarter one frame back."""
    part = x.shape[1] // 4
    y = torch.zeros_like(x)
    y[:, :part, 1:] = x[:, :part, :-1]
    y[:, part : 2 * part, :-1] = x[:, part : 2 * part, 1:]
    y[:, 2 * part :] = x[:, 2 * part :]
    return y


def octaves(x: Tensor) -> Tensor:
    """Return how strong the octaves of the spatial frequencies of (B, 3, F, H, W) are, (B, 24), on a log scale.

    There are the mean absolute value and the root mean square of each octave and channel, and of what is left the mean
    and the standard deviation.
    """
    y, found = x.transpose(1, 2).flatten(0, 1), []
    for _ in range(OCTAVES):
        size = y.shape[-2:]
        small = F.avg_pool2d(y, 2, ceil_mode=True, count_include_pad=False)
        band = (y - F.interpolate(small, size, mode="bilinear")).unflatten(0, (len(x), -1)) * 127.5
        strengths = [band.abs().mean((1, 3, 4)), band.square().mean((1, 3, 4)).sqrt()]
        found += [(strength + 0.1).log() for strength in strengths]
        y = small
    y = y.unflatten(0, (len(x), -1))
    return torch.cat([*found, y.mean((1, 3, 4)), y.std((1, 3, 4), correction=0)], dim=1)


def reduce(x: Tensor) -> Tensor:
    """Reduce (B, C, F, H, W) to three quarters of its height and width."""
    H, W = (max(round(side * SCALE), 1) for side in x.shape[-2:])
    frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), (H, W), mode="bilinear", antialias=True)
    return frames.unflatten(0, (len(x), -1)).transpose(1, 2)
