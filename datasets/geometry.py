"""From decoded frames to the picture that a player shows: orientation, pixel aspect, transparency."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np

FLIP_X, FLIP_Y, TRANSPOSE = 1, 2, 4  # bits of an orientation: the frame is first transposed, then mirrored
SIDEWAYS = 0.1  # pixel aspects below this, or above its inverse, are damage


def orientation_of(frame: Any) -> int:
    """The orientation that a frame's display matrix asks for, one of eight (to the nearest quarter turn)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix)[:36])[:5]  # x' = a x + c y, y' = b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):
        return TRANSPOSE | (FLIP_X if c < 0 else 0) | (FLIP_Y if b < 0 else 0)
    return (FLIP_X if a < 0 else 0) | (FLIP_Y if d < 0 else 0)


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored to (H', W', C) as shown."""
    if orientation & TRANSPOSE:
        pixels = pixels.swapaxes(0, 1)
    if orientation & FLIP_X:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation & FLIP_Y else pixels


def oriented_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(H, W) after `orient`."""
    return (size[1], size[0]) if orientation & TRANSPOSE else size


def stretched_size(size: tuple[int, int], pixel_aspect: float) -> tuple[int, int]:
    """(H, W) of square pixels: the width is scaled, as players do."""
    if not SIDEWAYS <= pixel_aspect <= 1 / SIDEWAYS:
        return size
    return size[0], max(1, round(size[1] * pixel_aspect))


def has_alpha(frame: Any) -> bool:
    """Whether the frame's format can be transparent."""
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def is_transparent(frame: Any) -> bool:
    """Whether a pixel of this frame is."""
    return has_alpha(frame) and int(converted(frame, "rgba")[..., 3].min()) < 255


def shown_pixels(frame: Any, size: tuple[int, int], orientation: int = 0) -> np.ndarray:
    """A decoded frame as uint8 (H, W, 3) of `size`, upright, transparency over white."""
    H, W = oriented_size(size, orientation)  # as stored: transposing is its own inverse on sizes
    if has_alpha(frame):
        frame = _over_white(frame)
    return orient(converted(frame, "rgb24", (H, W)), orientation)


def converted(frame: Any, pixel_format: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """A frame's pixels in another format and of another size (H, W), in one pass of FFmpeg's scaler."""
    how = _one_thread()
    if size is not None and size != (frame.height, frame.width):
        how |= {"height": size[0], "width": size[1], "interpolation": "BILINEAR"}
    return frame.reformat(format=pixel_format, **how).to_ndarray()


def _one_thread() -> dict[str, Any]:
    """Arguments by which a conversion starts no threads.

    The processes that read are many; and a process that is forked from one with such threads hangs when it tidies up.
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
