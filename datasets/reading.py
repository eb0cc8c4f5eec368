"""Image files to pixels, as a person sees them."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.datasets.sources import Source, not_media, open_source, shown
from rin_video.datasets.video_info import MAX_PIXELS, check_pixels
from rin_video.errors import UsageError

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
# Not those that run another program (EPS), lead elsewhere, or are no pictures of a fixed size.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "TGA", "QOI", "PCX",
    "SGI", "ICO", "DDS",
)  # fmt: skip
REDUCE_ABOVE = 4  # a file this many times too large is first halved, and halved again, while it is read


@dataclass(frozen=True)
class ImageInfo:
    """What an image file holds."""

    size: tuple[int, int]  # (H, W) as shown
    format: str
    mode: str  # Pillow's name of the pixels as stored


def read_image(
    source: str | PathLike[str] | Source,
    channels: int = 3,
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """An image file as uint8 (C, H, W), turned as its EXIF says, transparency over white unless C is 4.

    Where `at_least` (H, W) is given and the image is more than four times as large, it comes averaged over squares of
    pixels, never below twice that size: a later resize then costs little and cannot alias.
    """
    from PIL import Image, ImageOps

    source = Path(source) if isinstance(source, str | PathLike) else source
    with _opened(source, max_pixels) as image:
        try:
            _reduce_while_reading(image, at_least)
            image = ImageOps.exif_transpose(image)
            image = _to_eight_bits(image, source)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if channels != 4:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode != "L":
                image = image.convert("RGB")
            if (factor := _reduction(image.size, at_least)) > 1:
                image = image.reduce(factor)
            pixels = np.array(image.convert(PIL_MODES[channels]))
        except UsageError:
            raise
        except Exception as error:  # Pillow's plug-ins raise what they like
            raise _unreadable(source, error) from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def probe_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """What the file holds, its pixels decoded once to see that they can be. UsageError where they cannot."""
    from PIL import ExifTags

    with _opened(source, max_pixels) as image:
        try:
            W, H = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in ROTATED
            info = ImageInfo((W, H) if turned else (H, W), image.format or "", image.mode)
            image.load()
            if image.mode.startswith(("I", "F")):
                _to_eight_bits(image, source)
        except UsageError:
            raise
        except Exception as error:
            raise _unreadable(source, error) from error
    return info


class _opened:  # noqa: N801 (reads as a verb)
    """An open Pillow image of a known format and of a bearable size."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels

    def __enter__(self) -> Any:
        import warnings

        from PIL import Image

        _register_heif()
        self.file = open_source(self.source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
                Image.init()
                self.image = Image.open(self.file, formats=[name for name in FORMATS if name in Image.OPEN])
            check_pixels(self.source, self.image.height, self.image.width, self.max_pixels)
        except UsageError:
            self.file.close()
            raise
        except Exception as error:
            self.file.close()
            raise _unreadable(self.source, error) from error
        return self.image

    def __exit__(self, *error: Any) -> None:
        self.image.close()
        self.file.close()


def _reduce_while_reading(image: Any, at_least: tuple[int, int] | None) -> None:
    """JPEG can be decoded at a half, a quarter or an eighth of its size, by leaving out the fine waves."""
    factor = _reduction(image.size, at_least)
    if factor > 1 and image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // factor, image.height // factor))


def _reduction(size: tuple[int, int], at_least: tuple[int, int] | None) -> int:
    """A power of two by which an image (W, H) can shrink and still be twice `at_least` (either way round, for EXIF)."""
    if at_least is None:
        return 1
    excess = min(size) / max(at_least)
    factor = 1
    while excess / factor > REDUCE_ABOVE:
        factor *= 2
    return factor


def _knows_heif() -> bool:
    from PIL import Image

    return "HEIF" in Image.OPEN


def _register_heif() -> None:
    """Photos of phones, where the user installed `pillow-heif`."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _to_eight_bits(image: Any, source: Source) -> Any:
    """16-bit grey, which Pillow clips at 255 when asked to convert it, scaled to 8 bits."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UsageError(
                f"{shown(source)} has values from {values.min():g} to {values.max():g}: "
                "save it with 8 or 16 bits a channel"
            )
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image


def _unreadable(source: Source, error: Exception) -> UsageError:
    if source.suffix.lower() in (".heic", ".heif") and not _knows_heif():
        return UsageError(f"{shown(source)} cannot be read as an image here: pip install 'rin-video[heic]'")
    if what := not_media(source):
        return UsageError(f"{shown(source)} {what}")
    cause = "it is of no known format" if type(error).__name__ == "UnidentifiedImageError" else shown(str(error))
    return UsageError(f"{shown(source)} cannot be read as an image ({cause}): re-encode it or leave it out")
