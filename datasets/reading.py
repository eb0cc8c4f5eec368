"""Reading of image files as pixels: upright, with 8 bits per channel, transparency composited."""

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
from rin_video.errors import DatasetError, TransientError, UsageError

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ORIENTATION = 274  # the number of the EXIF tag
TRANSPOSITIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's transpositions that undo EXIF orientations
TWELVE_BITS = 4095
STILL = 100  # milliseconds for a frame without a duration, as in browsers
# Excluded are formats that run another program (EPS), refer to other files, or have no fixed size.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "TGA", "QOI", "PCX",
    "SGI", "ICO", "DDS",
)  # fmt: skip
REDUCE_ABOVE = 4  # a file more than this many times too large is halved repeatedly while it is read


@dataclass(frozen=True)
class ImageInfo:
    """The properties of an image file."""

    size: tuple[int, int]  # (H, W) as displayed
    format: str
    mode: str  # Pillow's mode of the stored pixels
    notes: tuple[str, ...] = ()  # remarks for the user


def read_image(
    source: str | PathLike[str] | Source,
    channels: int = 3,
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read an image file as uint8 (C, H, W), oriented by its EXIF data, composited over white unless C is 4.

    If `at_least` (H, W) is set and the image is more than four times as large, the image is reduced by averaging
    squares of pixels, but not below twice that size. A subsequent resize is then cheap and does not alias. Raises
    `UsageError` if the file cannot be read or has more than `max_pixels` pixels.
    """
    source = Path(source) if isinstance(source, str | PathLike) else source
    with _OpenedImage(source, max_pixels) as image:
        try:
            _reduce_while_reading(image, at_least)
            return to_pixels(_upright(image), channels, source, at_least=at_least)
        except UsageError:
            raise
        except Exception as error:  # Pillow's plug-ins raise any error
            raise _unreadable(source, error) from error


def read_animation(
    source: str | PathLike[str] | Source, channels: int = 3, *, max_pixels: int = MAX_PIXELS
) -> tuple[Tensor, np.ndarray, float] | None:
    """Read an animated image: uint8 (C, F, H, W), times (F,) and duration in seconds; None if it has a single frame.

    Raises `UsageError` if the file cannot be read or has more than `max_pixels` pixels.
    """
    source = Path(source) if isinstance(source, str | PathLike) else source
    with _OpenedImage(source, max_pixels) as image:
        try:
            if getattr(image, "n_frames", 1) < 2:
                return None
            frames, ends = [], [0.0]
            for index in range(image.n_frames):
                image.seek(index)
                frames.append(to_pixels(image, channels, source))
                ends.append(ends[-1] + (image.info.get("duration") or STILL) / 1000)
        except UsageError:
            raise
        except Exception as error:  # Pillow's plug-ins raise any error
            raise _unreadable(source, error) from error
    return torch.stack(frames, dim=1), np.array(ends[:-1]), ends[-1]


def to_pixels(image: Any, channels: int, source: Source | str, *, at_least: tuple[int, int] | None = None) -> Tensor:
    """Convert a Pillow image to uint8 (C, H, W), composited over white unless C is 4.

    `at_least` is as in `read_image`. Raises `DatasetError` if C is not 1, 3 or 4.
    """
    from PIL import Image

    if channels not in PIL_MODES:
        raise DatasetError(f"{shown(source)} is a picture (1, 3 or 4 channels), but the model has {channels} channels")
    alpha = _alpha_of_sixteen_bits(image)
    image = _to_eight_bits(image, source)
    if alpha is not None or image.has_transparency_data:
        image = image.convert("RGBA")
        if alpha is not None:
            image.putalpha(alpha)
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode != "L":
        image = image.convert("RGB")
    if (factor := _reduction(image.size, at_least)) > 1:
        image = image.reduce(factor)
    pixels = np.array(image.convert(PIL_MODES[channels]))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def probe_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Return the properties of an image file and decode its pixels once; raise `UsageError` if that fails."""
    with _OpenedImage(source, max_pixels) as image:
        try:
            kind, mode = image.format or "", image.mode
            W, H = _upright(image).size
            notes: tuple[str, ...] = ()
            if mode.startswith(("I", "F")):
                _to_eight_bits(image, source)
                if 255 < (highest := image.getextrema()[1]) <= TWELVE_BITS:
                    notes = (f"16-bit values only up to {highest}, like 12 bits, look dark: scale them to 0 to 65535",)
            info = ImageInfo((H, W), kind, mode, notes)
        except UsageError:
            raise
        except Exception as error:
            raise _unreadable(source, error) from error
    return info


class _OpenedImage:
    """A context manager for a Pillow image of a supported format with at most `max_pixels` pixels."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels

    def __enter__(self) -> Any:
        import warnings

        from PIL import Image

        _register_heif()
        self.file = open_source(self.source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit
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
    """Decode JPEG at 1/2, 1/4 or 1/8 of its size, which skips high frequencies."""
    factor = _reduction(image.size, at_least)
    if factor > 1 and image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // factor, image.height // factor))


def _reduction(size: tuple[int, int], at_least: tuple[int, int] | None) -> int:
    """Return the power of two by which an image (W, H) can shrink and still be twice `at_least`, even if rotated."""
    if at_least is None:
        return 1
    excess = min(size) / max(at_least)
    factor = 1
    while excess / factor > REDUCE_ABOVE:
        factor *= 2
    return factor


def _knows(kind: str) -> bool:
    from PIL import Image

    return kind in Image.OPEN


def _register_heif() -> None:
    """Register the HEIF format of phone photos, if `pillow-heif` is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _upright(image: Any) -> Any:
    """Orient an image by its EXIF data; if these cannot be read, return it unchanged, because its pixels are intact.

    Only the orientation is read: Pillow's own function also rewrites the EXIF data, and fails if any part is damaged.
    """
    image.load()  # this already orients a TIFF and removes its orientation
    try:
        transposition = TRANSPOSITIONS.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow's parser raises any error
        return image
    return image if transposition is None else image.transpose(transposition)


def _alpha_of_sixteen_bits(image: Any) -> Any:
    """Return the alpha mask of a 16-bit grey image that defines one value as transparent, which Pillow ignores."""
    from PIL import Image

    value = image.info.get("transparency")
    if not image.mode.startswith("I") or not isinstance(value, int):
        return None
    return Image.fromarray(np.where(np.asarray(image) == value, 0, 255).astype(np.uint8))


def _to_eight_bits(image: Any, source: Source | str) -> Any:
    """Scale 16-bit grey to 8 bits, because Pillow's conversion clips it at 255."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UsageError(
                f"{shown(source)} has values from {values.min():g} to {values.max():g}: "
                "save it with 8 or 16 bits per channel"
            )
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image


def _unreadable(source: Source, error: Exception) -> UsageError:
    if source.suffix.lower() in (".heic", ".heif") and not _knows("HEIF"):
        return TransientError(f"{shown(source)} cannot be read as an image here: pip install 'rin-video[heic]'")
    if what := not_media(source):
        return UsageError(f"{shown(source)} {what}")
    if source.suffix.lower() == ".avif" and not _knows("AVIF"):
        return TransientError(f"{shown(source)} cannot be read as an image here: AVIF needs Pillow 11.3 or newer")
    cause = "unknown format" if type(error).__name__ == "UnidentifiedImageError" else shown(str(error))
    return UsageError(f"{shown(source)} cannot be read as an image ({cause}): re-encode it or leave it out")
