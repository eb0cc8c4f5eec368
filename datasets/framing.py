"""From frames of any size to frames of one size, the augmentations on the way, and the chance that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from rin_video.config import CropName
from rin_video.datasets.sources import shown
from rin_video.errors import UsageError

HUE = 0.1  # turns of the colour wheel at augment_color 1; the other changes are halved or increased by half


@dataclass(frozen=True)
class Frame:
    """How one sample is cut: the whole picture is resized to `size`, then a part taken from it, perhaps mirrored."""

    size: tuple[int, int]
    top: int
    left: int
    mirrored: bool
    color_seed: int | None


class Framing:
    """Fits frames to one size: resize, crop, perhaps mirror, change colours; the same for all frames of a clip.

    `crop_scale` is the range, in parts of the largest possible crop's sides, from which a crop's size is drawn.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        crop: CropName = "center",
        flip: bool = False,
        crop_scale: Sequence[float] = (1.0, 1.0),
        color: float = 0.0,
    ) -> None:
        if crop not in get_args(CropName):
            raise UsageError(f"unknown crop {crop!r}: use one of {', '.join(get_args(CropName))}")
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(H, W) < 1:
            raise UsageError(f"image_size is {H}x{W}: both must be at least 1")
        self.size = (H, W)
        self.random_crop = crop == "random"
        self.flip, self.color = flip, color
        self.scales = tuple(crop_scale)

    def plan(self, size: tuple[int, int], chance: np.random.Generator) -> Frame:
        """How to cut a picture of `size` (H, W)."""
        H, W = self.size
        height, width = size
        scale = max(H / height, W / width)
        if self.scales != (1.0, 1.0):
            scale /= chance.uniform(self.scales[0], self.scales[1])
        height, width = max(H, round(height * scale)), max(W, round(width * scale))
        top, left = (height - H) // 2, (width - W) // 2
        if self.random_crop:
            top, left = int(chance.integers(height - H + 1)), int(chance.integers(width - W + 1))
        mirrored = self.flip and chance.random() < 0.5
        return Frame((height, width), top, left, mirrored, int(chance.integers(2**31)) if self.color else None)

    def cut(self, frames: Tensor, frame: Frame) -> Tensor:
        """uint8 (..., C, height, width) to (..., C, H, W) as planned."""
        from torchvision.transforms import v2

        frames = resize(frames, frame.size)
        H, W = self.size
        frames = frames[..., frame.top : frame.top + H, frame.left : frame.left + W]
        if frame.mirrored:
            frames = frames.flip(-1)
        if frame.color_seed is not None:
            c = self.color / 2
            with torch.random.fork_rng(devices=[]):  # v2 draws from torch's generator
                torch.manual_seed(frame.color_seed)
                frames = v2.ColorJitter(c, c, c, HUE * self.color)(frames)
        return frames.contiguous()

    def __call__(self, frames: Tensor, chance: np.random.Generator) -> Tensor:
        """uint8 (..., C, height, width) to (..., C, H, W)."""
        height, width = frames.shape[-2:]
        return self.cut(frames, self.plan((height, width), chance))

    def describe_enlarged(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        H, W = self.size
        small = sum(height < H or width < W for height, width in sizes)
        return [f"{small} of {len(sizes)} are smaller than {H}x{W} and are enlarged"] if small else []


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (..., C, height, width) to (..., C, H, W), antialiased."""
    from torchvision.transforms.v2 import functional as transforms

    if tuple(frames.shape[-2:]) == size:
        return frames
    if size == (1, 1):  # torch 2.14 fails an assertion when it reduces uint8 to a single pixel
        return transforms.resize(frames.float(), list(size), antialias=True).round().to(frames.dtype)
    return transforms.resize(frames, list(size), antialias=True)


class Chance:
    """Random numbers that depend on (seed, epoch, index) alone, whichever worker draws them."""

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise UsageError(f"seed is {seed}: use 0 or more")
        self.seed = seed
        # In shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def draw(self, index: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch, index]))


def class_list(classes: Sequence[str]) -> str:
    return (
        f", {len(classes)} classes: {', '.join(map(shown, classes[:10]))}{', ...' if len(classes) > 10 else ''}"
        if classes
        else ""
    )


def size_range(sizes: Sequence[tuple[int, int]]) -> str:
    """The smallest to the largest (H, W), by area."""
    (H, W), (H_max, W_max) = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    return f"{H}x{W}" if (H_max, W_max) == (H, W) else f"{H}x{W} to {H_max}x{W_max}"
