"""The properties of a video file, as stored in an index."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rin_video.datasets.sources import Source, open_source, shown
from rin_video.errors import UsageError

MAX_PIXELS = 100_000_000  # of one frame or image; more is considered a decompression bomb


@dataclass(frozen=True)
class VideoInfo:
    """The properties of a video file. Tables are stored compressed, because an index contains many of them."""

    container: str  # one of CONTAINERS, or webp
    codec: str
    num_frames: int  # displayed pictures, damaged ones included
    fps: float  # average over the file
    size: tuple[int, int]  # (H, W) as displayed: upright, with square pixels
    orientation: int  # of the stored frame, see `geometry`; 0: upright
    duration: float  # seconds from the start of the first frame to the end of the last
    time_base: float  # seconds per unit of the stamps
    stamps: str  # compressed: presentation times of the frames, ascending
    keys: str  # compressed: stamps of the packets at which decoding can start, ascending
    trusted: bool  # frames are found by their stamps; otherwise they are counted from the beginning
    plain: bool  # every packet is one upright picture, and simple seeks to keyframes are exact
    bits: int = 8  # per channel
    decoder: str = ""  # the first backend that could read the file when it was indexed
    cuts: tuple[int, ...] | None = None  # first frames of the scenes after the first; None: not determined
    stream: int = 0  # the number of the stream in the file
    tracks: int = 1  # the number of video streams in the file
    stored: tuple[int, int] = (0, 0)  # (H, W) as stored; (0, 0): as displayed
    lost: tuple[int, ...] = ()  # damaged frames as first, end, first, end, ...; if equal, pictures before it are lost
    notes: tuple[str, ...] = ()  # remarks for the user

    @property
    def timestamps(self) -> np.ndarray:
        """Presentation times (F,) in units of `time_base`."""
        return unpack_table(self.stamps)

    @property
    def times(self) -> np.ndarray:
        """Times (F,) in seconds from the first frame, ascending."""
        stamps = self.timestamps
        return (stamps - stamps[0]) * self.time_base

    @property
    def entries(self) -> np.ndarray:
        """Stamps (K,) of the packets at which decoding can start, ascending."""
        return unpack_table(self.keys)

    @property
    def lost_ranges(self) -> list[tuple[int, int]]:
        """Ranges (first, end) of the frames that cannot be decoded, ascending."""
        return list(zip(self.lost[::2], self.lost[1::2], strict=True))


class LostFramesError(UsageError):
    """Frames of a clip are damaged; the other frames can be read."""

    def __init__(self, source: Source, frames: Iterable[int]) -> None:
        self.frames = sorted(frames)
        super().__init__(
            f"{frames_text(ranges_of(self.frames))} of {shown(source)} cannot be decoded (damaged file): "
            "use others, or re-encode it"
        )

    def __reduce__(self) -> Any:
        return _restore_lost, (str(self), self.frames)


def pack_table(values: Any) -> str:
    """Compress ascending integers to text; an evenly spaced sequence takes about 20 characters."""
    steps = np.diff(np.asarray(values, dtype="<i8"), prepend=0)
    return b85encode(zlib.compress(steps.tobytes(), 6)).decode()


def unpack_table(text: str) -> np.ndarray:
    """Decompress the text of `pack_table` to int64 (N,)."""
    return np.cumsum(np.frombuffer(zlib.decompress(b85decode(text)), dtype="<i8"))


def is_webp(source: Source, *, moving: bool = False) -> bool:
    """Return whether the file has the header of a WebP; `moving`: of an animated WebP."""
    if source.suffix.lower() != ".webp":
        return False
    with open_source(source) as file:
        head = file.read(21)
    found = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return found and (not moving or (head[12:16] == b"VP8X" and len(head) > 20 and bool(head[20] & 2)))


def check_pixels(source: Source, height: int, width: int, limit: int) -> None:
    """Raise `UsageError` if a picture has more than `limit` pixels."""
    if height * width > limit:
        raise UsageError(
            f"{shown(source)} is {height}x{width} = {height * width:,} pixels, more than {limit:,}: "
            "make it smaller, or raise data.max_pixels"
        )


def ranges_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers in an ascending sequence, as (first, end) of each."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def frames_text(ranges: list[tuple[int, int]]) -> str:
    """Describe ranges of frames, such as "frames 7 to 9, 12"."""
    some = ", ".join(f"{a} to {b - 1}" if b - a > 1 else str(a) for a, b in ranges[:4])
    more = ", ..." if len(ranges) > 4 else ""
    return f"frame {some}" if sum(b - a for a, b in ranges) == 1 else f"frames {some}{more}"


def _restore_lost(message: str, frames: list[int]) -> LostFramesError:
    error = LostFramesError.__new__(LostFramesError)
    UsageError.__init__(error, message)
    error.frames = frames
    return error
