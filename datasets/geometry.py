"""Conversion of decoded frames to the picture that a player displays: orientation, pixel aspect, transparency."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np

FLIP_X, FLIP_Y, TRANSPOSE = 1, 2, 4  # bits of an orientation: the frame is first transposed, then mirrored
SIDEWAYS = 0.1  # pixel aspects below this, or above its inverse, are considered damage


def orientation_of(frame: Any) -> int:
    """Return the orientation of a frame's display matrix, one of eight (rounded to a quarter turn)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix)[:36])[:5]  # x' = a x + c y, y' = b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):
        return TRANSPOSE | (FLIP_X if c < 0 else 0) | (FLIP_Y if b < 0 else 0)
    return (FLIP_X if a < 0 else 0) | (FLIP_Y if d < 0 else 0)


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Transpose and mirror stored pixels (H, W, C) to the displayed ones (H', W', C)."""
    if orientation & TRANSPOSE:
        pixels = pixels.swapaxes(0, 1)
    if orientation & FLIP_X:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation & FLIP_Y else pixels


def oriented_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the size (H, W) after `orient`."""
    return (size[1], size[0]) if orientation & TRANSPOSE else size


def stretched_size(size: tuple[int, int], pixel_aspect: float) -> tuple[int, int]:
    """Return the size (H, W) with square pixels: the width is scaled, as in players."""
    if not SIDEWAYS <= pixel_aspect <= 1 / SIDEWAYS:
        return size
    return size[0], max(1, round(size[1] * pixel_aspect))


def has_alpha(frame: Any) -> bool:
    """Return whether the frame's format supports transparency."""
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def is_transparent(frame: Any) -> bool:
    """Return whether the frame has a transparent pixel."""
    return has_alpha(frame) and int(converted(frame, "rgba")[..., 3].min()) < 255


def shown_pixels(frame: Any, size: tuple[int, int], orientation: int = 0) -> np.ndarray:
    """Convert a decoded frame to uint8 (H, W, 3) of `size`, upright and composited over white."""
    H, W = oriented_size(size, orientation)  # the stored size, because transposing twice restores a size
    if has_alpha(frame):
        frame = _over_white(frame)
    return orient(converted(frame, "rgb24", (H, W)), orientation)


def converted(frame: Any, pixel_format: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Convert a frame to another pixel format and size (H, W) in one pass of FFmpeg's scaler; returns its array."""
    how = _one_thread()
    if size is not None and size != (frame.height, frame.width):
        how |= {"height": size[0], "width": size[1], "interpolation": "BILINEAR"}
    return frame.reformat(format=pixel_format, **how).to_ndarray()


def _one_thread() -> dict[str, Any]:
    """Return the arguments with which a conversion starts no threads.

    Many processes read at the same time, and a process that is forked from one with such threads hangs on cleanup.
    """
    return {"threads": 1} if _knows_threads() else {}


@lru_cache(maxsize=1)
def _knows_threads() -> bool:
    import av

    try:
        av.VideoFrame(2, 2, "gray").reformat(format="rgb24", threads=1)
    except TypeError:  # PyAV before 17
        return False
    return True


def _over_white(frame: Any) -> Any:
    import av

    pixels = converted(frame, "rgba")
    alpha = pixels[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return frame
    blended = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(blended.astype(np.uint8)), format="rgb24")
