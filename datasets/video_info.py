"""What a video file shows, as an index keeps it."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rin_video.datasets.sources import Source, open_source, shown
from rin_video.errors import UsageError

MAX_PIXELS = 100_000_000  # of one frame or image: more is taken for a bomb


@dataclass(frozen=True)
class VideoInfo:
    """What a video file shows. The tables are packed, since an index keeps many of these."""

    container: str  # one of CONTAINERS, or webp
    codec: str
    num_frames: int  # pictures shown, and those that damage spoils
    fps: float  # average over the file
    size: tuple[int, int]  # (H, W) as shown: upright, of square pixels
    orientation: int  # of the stored frame, see `geometry`; 0: upright
    duration: float  # seconds from the first frame to the end of the last
    time_base: float  # seconds of one unit of the stamps
    stamps: str  # packed: presentation times of the frames, ascending
    keys: str  # packed: stamps of the packets that decoding can start from, ascending
    trusted: bool  # frames are found by their stamps; else they are counted from the beginning
    plain: bool  # every packet is one picture, upright, and keyframes are where a simple seek ends
    bits: int = 8  # of a sample of one channel
    decoder: str = ""  # the first of the backends that read it when it was indexed
    cuts: tuple[int, ...] | None = None  # frames that begin another scene; None: not looked for
    stream: int = 0  # the number of the stream in its file
    tracks: int = 1  # video streams of the file
    stored: tuple[int, int] = (0, 0)  # (H, W) as stored; (0, 0): as shown
    lost: tuple[int, ...] = ()  # first, end, first, end, ...: frames that damage spoils; equal: some before first
    notes: tuple[str, ...] = ()  # what a user should know

    @property
    def timestamps(self) -> np.ndarray:
        """(F,) presentation times, in units of `time_base`."""
        return unpack_table(self.stamps)

    @property
    def times(self) -> np.ndarray:
        """(F,) seconds from the first frame, ascending."""
        stamps = self.timestamps
        return (stamps - stamps[0]) * self.time_base

    @property
    def entries(self) -> np.ndarray:
        """(K,) stamps of the packets that decoding can start from, ascending."""
        return unpack_table(self.keys)

    @property
    def lost_ranges(self) -> list[tuple[int, int]]:
        """(first, end) of the frames that cannot be decoded, ascending."""
        return list(zip(self.lost[::2], self.lost[1::2], strict=True))


class LostFramesError(UsageError):
    """Frames of a clip that damage spoils; the others can be read."""

    def __init__(self, source: Source, frames: Iterable[int]) -> None:
        self.frames = sorted(frames)
        super().__init__(
            f"{frames_text(ranges_of(self.frames))} of {shown(source)} cannot be decoded (damaged file): "
            "use others, or re-encode it"
        )

    def __reduce__(self) -> Any:
        return _restore_lost, (str(self), self.frames)


def pack_table(values: Any) -> str:
    """Ascending whole numbers as a short text: regular ones take some 20 characters."""
    steps = np.diff(np.asarray(values, dtype="<i8"), prepend=0)
    return b85encode(zlib.compress(steps.tobytes(), 6)).decode()


def unpack_table(text: str) -> np.ndarray:
    """(N,) int64, as they were packed."""
    return np.cumsum(np.frombuffer(zlib.decompress(b85decode(text)), dtype="<i8"))


def is_webp(source: Source, *, moving: bool = False) -> bool:
    """Whether the file begins as WebP does; `moving`: as one with more than one frame does."""
    if source.suffix.lower() != ".webp":
        return False
    with open_source(source) as file:
        head = file.read(21)
    found = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return found and (not moving or (head[12:16] == b"VP8X" and len(head) > 20 and bool(head[20] & 2)))


def check_pixels(source: Source, height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise UsageError(
            f"{shown(source)} is {height}x{width} = {height * width:,} pixels, more than {limit:,}: "
            "make it smaller, or raise data.max_pixels"
        )


def ranges_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, end) of each run."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def frames_text(ranges: list[tuple[int, int]]) -> str:
    some = ", ".join(f"{a} to {b - 1}" if b - a > 1 else str(a) for a, b in ranges[:4])
    more = ", ..." if len(ranges) > 4 else ""
    return f"frame {some}" if sum(b - a for a, b in ranges) == 1 else f"frames {some}{more}"


def _restore_lost(message: str, frames: list[int]) -> LostFramesError:
    error = LostFramesError.__new__(LostFramesError)
    UsageError.__init__(error, message)
    error.frames = frames
    return error
