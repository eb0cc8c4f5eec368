"""Resizing and cropping of frames to one size, augmentations, and the random numbers that determine them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from rin_video.config import CropName, DataConfig
from rin_video.datasets.sources import shown
from rin_video.errors import UsageError

HUE = 0.1  # turns of the colour wheel at augment_color 1, where brightness, contrast and saturation change by 50 %


@dataclass(frozen=True)
class CropParams:
    """The parameters of a crop: the picture is resized to `size`, cropped at (top, left), and perhaps mirrored."""

    size: tuple[int, int]
    top: int
    left: int
    mirrored: bool
    color_seed: int | None


class ResizeCrop:
    """Transforms frames to one size: resize, crop, optional flip and colour jitter, the same for all frames of a clip.

    `crop_scale` is the range of the crop's side length, relative to the largest possible crop. Raises `UsageError` if
    `crop` is unknown or the size is below 1.
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

    def draw_params(self, size: tuple[int, int], rng: np.random.Generator) -> CropParams:
        """Draw the crop parameters for a picture of `size` (H, W)."""
        H, W = self.size
        height, width = size
        scale = max(H / height, W / width)
        if self.scales != (1.0, 1.0):
            scale /= rng.uniform(self.scales[0], self.scales[1])
        height, width = max(H, round(height * scale)), max(W, round(width * scale))
        top, left = (height - H) // 2, (width - W) // 2
        if self.random_crop:
            top, left = int(rng.integers(height - H + 1)), int(rng.integers(width - W + 1))
        mirrored = self.flip and rng.random() < 0.5
        return CropParams((height, width), top, left, mirrored, int(rng.integers(2**31)) if self.color else None)

    def apply(self, frames: Tensor, params: CropParams) -> Tensor:
        """Crop uint8 frames (..., C, height, width), at their original or resized size, to (..., C, H, W)."""
        from torchvision.transforms import v2

        frames = resize_part(frames, params.size, (params.top, params.left), self.size)
        if params.mirrored:
            frames = frames.flip(-1)
        if params.color_seed is not None:
            c = self.color / 2
            with torch.random.fork_rng(devices=[]):  # v2 uses torch's global generator
                torch.manual_seed(params.color_seed)
                colours = v2.ColorJitter(c, c, c, HUE * self.color)(frames[..., :3, :, :])
            frames = torch.cat([colours, frames[..., 3:, :, :]], dim=-3)  # keep alpha
        return frames.contiguous()

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Transform uint8 frames (..., C, height, width) to (..., C, H, W)."""
        height, width = frames.shape[-2:]
        return self.apply(frames, self.draw_params((height, width), rng))

    def read_clip(
        self, video: Any, indices: Sequence[int], size: tuple[int, int], rng: np.random.Generator, channels: int
    ) -> Tensor:
        """Read frames of an open video of `size` (H, W) and crop them: uint8 (channels, F, H, W)."""
        from torchvision.transforms.v2 import functional as transforms

        params = self.draw_params(size, rng)
        frames = self.apply(video.read(indices, decoder_size(params.size, size)), params)
        if channels == 1:
            frames = transforms.rgb_to_grayscale(frames)
        return frames.transpose(0, 1).contiguous()

    def describe_enlarged(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """Return a line with the number of pictures that are enlarged, or no line if there are none."""
        H, W = self.size
        small = sum(height < H or width < W for height, width in sizes)
        return [f"{small} of {len(sizes)} are smaller than {H}x{W} and are enlarged"] if small else []


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 frames (..., C, height, width) to (..., C, H, W) with antialiasing."""
    from torchvision.transforms.v2 import functional as transforms

    if tuple(frames.shape[-2:]) == size:
        return frames
    if size == (1, 1):  # torch 2.14 fails an assertion when it reduces uint8 to a single pixel
        return transforms.resize(frames.float(), list(size), antialias=True).round().to(frames.dtype)
    return transforms.resize(frames, list(size), antialias=True)


def decoder_size(size: tuple[int, int], source_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the size to request from a decoder: `size` if it reduces, which is cheap there; None if it enlarges."""
    return size if size[0] * size[1] < source_size[0] * source_size[1] else None


def resize_part(frames: Tensor, size: tuple[int, int], corner: tuple[int, int], part: tuple[int, int]) -> Tensor:
    """Return the `part` (H, W) of `resize(frames, size)` with the upper left corner `corner` (top, left).

    If the frames are enlarged, only the part is computed; a picture of 20000x1 would otherwise grow to gigabytes.
    """
    (top, left), (H, W) = corner, part
    if size[0] * size[1] <= frames.shape[-2] * frames.shape[-1] or part == size:
        return resize(frames, size)[..., top : top + H, left : left + W]
    rows, columns = _lines(frames.shape[-2], size[0], top, H), _lines(frames.shape[-1], size[1], left, W)
    # Crop the input region of the part, then interpolate the rows, then the columns.
    (above, below, down), (before, after, right) = rows, columns
    y, x = int(above[0]), int(before[0])
    cut = frames[..., y : int(below[-1]) + 1, x : int(after[-1]) + 1].float()
    cut = cut[..., above - y, :].lerp(cut[..., below - y, :], down[:, None])
    cut = cut[..., before - x].lerp(cut[..., after - x], right)
    return cut.round().clamp(0, 255).to(frames.dtype)


def _lines(length: int, new_length: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """For `count` new lines from `first`, return the old lines before and after each and the weight of the latter."""
    centers = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * length / new_length - 0.5
    centers = centers.clamp(0, length - 1)
    before = centers.floor().long()
    return before, (before + 1).clamp(max=length - 1), (centers - before).float()


class SampleRNG:
    """Random number generators that depend on (seed, epoch, index) alone, whichever worker draws.

    Raises `UsageError` if the seed is negative.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise UsageError(f"seed is {seed}: use 0 or more")
        self.seed = seed
        # In shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in all workers."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that was set last, at first 0."""
        return int(self._epoch)

    def draw(self, index: int, epoch: int, attempt: int = 0) -> np.random.Generator:
        """Return the generator of a sample; an `attempt` above 0 gives another one, to replace a damaged draw."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch, index, *[attempt] * bool(attempt)]))


def unaugmented(options: DataConfig) -> DataConfig:
    """Return the options of the data without augmentation: centre crops, unchanged colours, speed and direction."""
    return replace(
        options,
        crop="center",
        crop_scale=[1.0, 1.0],
        augment_horizontal_flip=False,
        augment_color=0.0,
        augment_reverse=False,
        augment_speed=[1.0, 1.0],
    )


def class_list(classes: Sequence[str]) -> str:
    """Return ", N classes: ..." with up to ten names, or an empty string without classes."""
    return (
        f", {len(classes)} classes: {', '.join(map(shown, classes[:10]))}{', ...' if len(classes) > 10 else ''}"
        if classes
        else ""
    )


def size_range(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the smallest and the largest size, by area, as "HxW to HxW"."""
    (H, W), (H_max, W_max) = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    return f"{H}x{W}" if (H_max, W_max) == (H, W) else f"{H}x{W} to {H_max}x{W_max}"
