"""The network of the extractor "self": 2D convolutions that exchange channels between neighbouring frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (24, 48, 96, 192)
HIDDEN = 256  # features of a clip
SHIFTED = 4  # a quarter of the channels goes to the next frame, and a quarter to the previous one


class SelfNetwork(nn.Module):
    """Maps clips (B, 3, F, H, W) in [-1, 1] to features (B, 256), and these to the logits of each task.

    Frames exchange channels as in the temporal shift module (Lin et al. 2019), so that 2D convolutions see three
    frames each. The last layer sees the mean over time and the mean absolute change. An image is a clip of one frame.
    """

    def __init__(self, num_tasks: int, num_classes: int) -> None:
        super().__init__()
        sizes = (3, *WIDTHS)
        kernels = (5, 3, 3, 3)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(one, two, kernel, stride=2, padding=kernel // 2)
            for one, two, kernel in zip(sizes, sizes[1:], kernels, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.hidden = nn.Linear(2 * WIDTHS[-1], HIDDEN)
        self.task = nn.Linear(HIDDEN, num_tasks)
        self.match = nn.Linear(HIDDEN, 64)  # the embedding that windows of one clip share
        self.label = nn.Linear(HIDDEN, num_classes) if num_classes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of clips."""
        num_frames = x.shape[2]
        y = x.transpose(1, 2).flatten(0, 1)
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = F.relu(norm(convolution(shift(y, num_frames) if number else y)))
        y = y.mean((2, 3)).unflatten(0, (-1, num_frames))
        change = y.diff(dim=1).abs().mean(1) if num_frames > 1 else torch.zeros_like(y[:, 0])
        return F.relu(self.hidden(torch.cat([y.mean(1), change], dim=1)))


def shift(x: Tensor, num_frames: int) -> Tensor:
    """Move a quarter of the channels of frames (B * F, C, H, W) one frame on, and a quarter one frame back."""
    x = x.unflatten(0, (-1, num_frames))
    part = x.shape[2] // SHIFTED
    y = torch.zeros_like(x)
    y[:, 1:, :part] = x[:, :-1, :part]
    y[:, :-1, part : 2 * part] = x[:, 1:, part : 2 * part]
    y[:, :, 2 * part :] = x[:, :, 2 * part :]
    return y.flatten(0, 1)
