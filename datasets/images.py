"""Folders of images, and the crop, the flip and the chance that clips share with them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rin_video.datasets.folders import IMAGE_EXTENSIONS, class_labels, find_files, probe_files
from rin_video.errors import UsageError

CROPS = ("center", "random")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class ImageFolder(Dataset[dict[str, Tensor | int]]):
    """Images of a folder; item: `{"x": uint8 (C, H, W), "label": class or -1}`.

    The short side is resized so that `image_size`, one number or (H, W), fits, then cropped. What is drawn depends on
    (seed, epoch, index) alone. Raises UsageError where the folder holds no image that can be read.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        image_size: int | tuple[int, int],
        *,
        channels: int = 3,
        augment_horizontal_flip: bool = False,
        crop: str = "center",
        seed: int = 0,
    ) -> None:
        if channels not in PIL_MODES:
            raise UsageError(f"images have 1, 3 or 4 channels, not {channels}")
        self.root = Path(root)
        self.framing = Framing(image_size, crop=crop, flip=augment_horizontal_flip)
        self.shape = (channels, *self.framing.size)
        self.chance = Chance(seed)
        sizes, self.skipped = probe_files(find_files(root, IMAGE_EXTENSIONS), image_header_size)
        self.files, self.sizes = list(sizes), list(sizes.values())
        self.classes, self.labels = class_labels(root, self.files)

    @property
    def seed(self) -> int:
        return self.chance.seed

    def set_epoch(self, epoch: int) -> None:
        self.chance.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.draw(index, self.chance.epoch)

    def draw(self, index: int, epoch: int) -> dict[str, Tensor | int]:
        """The item as a given epoch draws it."""
        index = range(len(self))[index]
        image = read_image(self.files[index], self.shape[0])
        return {"x": self.framing(image, self.chance.draw(index, epoch)), "label": self.labels[index]}

    def describe(self) -> str:
        """A few lines on what was found: files, classes, sizes, what is enlarged, what was skipped."""
        lines = [f"{len(self)} images, {size_range(self.sizes)}{class_list(self.classes)}"]
        return "\n".join(lines + self.framing.describe_enlarged(self.sizes) + describe_skipped(self.skipped))


class Framing:
    """Fits frames to one size: resize the short side, crop, perhaps mirror; the same for all frames of a clip."""

    def __init__(self, image_size: int | tuple[int, int], *, crop: str, flip: bool) -> None:
        if crop not in CROPS:
            raise UsageError(f"unknown crop {crop!r}: use one of {', '.join(CROPS)}")
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(H, W) < 1:
            raise UsageError(f"image_size is {H}x{W}: both must be at least 1")
        self.size = (H, W)
        self.random_crop = crop == "random"
        self.flip = flip

    def __call__(self, frames: Tensor, chance: np.random.Generator) -> Tensor:
        """uint8 (..., C, height, width) to (..., C, H, W)."""
        from torchvision.transforms.v2 import functional as transforms

        H, W = self.size
        height, width = frames.shape[-2:]
        scale = max(H / height, W / width)
        height, width = max(H, round(height * scale)), max(W, round(width * scale))
        frames = transforms.resize(frames, [height, width], antialias=True)
        top, left = (height - H) // 2, (width - W) // 2
        if self.random_crop:
            top, left = int(chance.integers(height - H + 1)), int(chance.integers(width - W + 1))
        frames = frames[..., top : top + H, left : left + W]
        if self.flip and chance.random() < 0.5:
            frames = frames.flip(-1)
        return frames.contiguous()

    def describe_enlarged(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        H, W = self.size
        small = sum(height < H or width < W for height, width in sizes)
        return [f"{small} of {len(sizes)} are smaller than {H}x{W} and are enlarged"] if small else []


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


def read_image(path: str | PathLike[str], channels: int = 3) -> Tensor:
    """An image file as uint8 (C, H, W), turned as its EXIF says, transparency over white unless C is 4."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image = _to_eight_bits(image, path)
    except UsageError:
        raise
    except Exception as error:  # Pillow's plug-ins raise what they like
        raise _unreadable(path, error) from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode != "L":
        image = image.convert("RGB")
    pixels = np.array(image.convert(PIL_MODES[channels]))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def image_header_size(path: Path) -> tuple[int, int]:
    """(H, W) as shown, from the header alone. UsageError where it cannot be read."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            W, H = image.size
            return (W, H) if image.getexif().get(ExifTags.Base.Orientation) in ROTATED else (H, W)
    except Exception as error:
        raise _unreadable(path, error) from error


def describe_skipped(skipped: Sequence[tuple[Path, str]]) -> list[str]:
    lines = [f"skipped: {reason}" for _, reason in skipped[:3]]
    return lines + ([f"skipped: {len(skipped) - 3} more, {len(skipped)} in all"] if len(skipped) > 3 else [])


def class_list(classes: Sequence[str]) -> str:
    return (
        f", {len(classes)} classes: {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}" if classes else ""
    )


def size_range(sizes: Sequence[tuple[int, int]]) -> str:
    """The smallest to the largest (H, W), by area."""
    (H, W), (H_max, W_max) = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    return f"{H}x{W}" if (H_max, W_max) == (H, W) else f"{H}x{W} to {H_max}x{W_max}"


def _to_eight_bits(image: Any, path: str | PathLike[str]) -> Any:
    """16-bit grey, which Pillow clips at 255 when asked to convert it, scaled to 8 bits."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UsageError(
                f"{path} has values from {values.min():g} to {values.max():g}: save it with 8 or 16 bits a channel"
            )
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image


def _unreadable(path: str | PathLike[str], error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read as an image ({error}): re-encode it or leave it out")
