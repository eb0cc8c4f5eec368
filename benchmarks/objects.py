"""Counts the objects in every frame of clips, for `video_learning.py`: do things stay, vanish, split or appear?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rin_video.evaluation.prediction import MOVING

LARGEST = 0.5  # part of the picture: what is larger is no object
BRIGHT = 0.5  # in the demo set, shapes have a channel above this, backgrounds have none


def moving(clips: Tensor) -> Tensor:
    """Return where clips (B, C, F, H, W), uint8 or in [0, 1], deviate from their median picture: (B, F, H, W)."""
    x = unit(clips)
    return ((x - x.median(2, keepdim=True).values).abs() > MOVING).any(1)


def bright(clips: Tensor) -> Tensor:
    """Return where clips (B, C, F, H, W) of the demo set, uint8 or in [0, 1], show a shape: (B, F, H, W)."""
    return (unit(clips) > BRIGHT).any(1)


def unit(clips: Tensor) -> Tensor:
    """Return uint8 or float clips as floats in [0, 1]."""
    return clips / 255 if clips.dtype == torch.uint8 else clips


def count_objects(foreground: Tensor, smallest: int = 1) -> Tensor:
    """Count the connected parts of masks (..., H, W), also over corners, each of at least `smallest` pixels: (...).

    A part of more than half of the picture does not count.
    """
    *batch, H, W = foreground.shape
    mask = foreground.reshape(-1, H * W)
    label = torch.arange(1, H * W + 1) * mask  # each pixel its own; 0 is the background
    while True:  # every pixel takes the largest label around it, and then the label of the pixel that this one names
        around = F.max_pool2d(label.double().view(-1, 1, H, W), 3, 1, 1).long().view_as(label) * mask
        around = around.gather(1, (around - 1).clamp(min=0)) * mask
        if torch.equal(around, label):
            break
        label = around
    sizes = torch.zeros(len(mask), H * W + 1, dtype=torch.long).scatter_add_(1, label, mask.long())
    sizes = sizes[:, 1:]
    return ((sizes >= smallest) & (sizes <= LARGEST * H * W)).sum(1).view(batch)


def persistence(counts: Tensor) -> dict[str, float | None]:
    """Return how steady the number of objects is, from counts (B, F) of every frame.

    - `objects`: mean number in a frame
    - `change`: mean of |n - m| / max(n, m) over consecutive frames with n and m objects, pairs without any left out;
      0 if all objects stay, 1 if all vanish. None without objects.
    - `drift`: the same between the mean numbers of the first and the last quarter of a clip, mean over clips
    - `steady`: share of the clips in which every frame has the same number, one at least
    """
    n = counts.double()
    quarter = max(n.shape[1] // 4, 1)
    ends = torch.stack([n[:, :quarter].mean(1), n[:, -quarter:].mean(1)])
    return {
        "objects": n.mean().item(),
        "change": _relative_change(n[:, :-1], n[:, 1:]),
        "drift": _relative_change(*ends),
        "steady": ((n == n[:, :1]).all(1) & (n[:, 0] > 0)).double().mean().item(),
    }


def _relative_change(one: Tensor, other: Tensor) -> float | None:
    most = torch.maximum(one, other)
    change = ((one - other).abs() / most)[most > 0]
    return change.mean().item() if change.numel() else None
