"""Reading of video files; the whole package opens videos through this module.

`open_video` returns a `Video`, whichever decoder it uses. `probe.py` first determines the frames of a file; then the
fastest backend that finds these frames reads the pixels (`backends.py`).

A decoder must be used in the process that opened it: decord hangs if it is opened before a fork and read after it.
Open videos where they are read, and never store one in a dataset. A `VideoInfo` can be stored, pickled and sent to
other processes.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rin_video.config import DecoderName, DecoderOption
from rin_video.datasets.backends import DECODERS, FrameReader, suitable_backends, suits
from rin_video.datasets.probe import probe_video
from rin_video.datasets.resize_crop import resize
from rin_video.datasets.sources import Buffer, Source, shown
from rin_video.datasets.video_info import LostFramesError, VideoInfo
from rin_video.datasets.video_stream import unreadable
from rin_video.errors import UsageError

__all__ = [
    "DECODERS",
    "LostFramesError",
    "Video",
    "VideoInfo",
    "backends_for",
    "open_cached",
    "open_video",
    "probe_video",
]

OPEN_FILES = 8  # videos that a process keeps open
KEPT_FILE, KEPT_FILES = 4 << 20, 256 << 20  # bytes of the frames of a file, and of all, that a process keeps decoded


class Video:
    """An open video file. Use it as a context manager, in the process that opened it.

    `backends` are tried in order. With `keep`, the frames of small files stay in memory (see `FrameCache`). Raises
    `UsageError` if none can open the file.
    """

    def __init__(
        self, source: Source, info: VideoInfo, backends: Sequence[DecoderName], *, keep: FrameCache | None = None
    ) -> None:
        self.path, self.info, self._keep = source, info, keep
        self.num_frames, self.fps, self.size = info.num_frames, info.fps, info.size
        self.backends = list(backends)
        self._reader: FrameReader | None = None
        self._next = 0  # the backend to try after this one
        self._open_next()

    def read(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """Return the frames `indices`, in that order, as uint8 (F, 3, H, W), resized to `size` (H, W) if it is set.

        Raises `IndexError` if a frame does not exist, `LostFramesError` if frames are damaged, and `UsageError` if the
        file can no longer be read. After a `LostFramesError` the other frames can still be read.
        """
        wrong = [i for i in indices if not 0 <= i < self.num_frames]
        if wrong:
            raise IndexError(f"{shown(self.path)} has {self.num_frames} frames: frame {wrong[0]} does not exist")
        size = size or self.size
        if not len(indices):
            return torch.empty(0, 3, *size, dtype=torch.uint8)
        if self._keep is not None and self._keep.fits(self.num_frames, size):
            return self._keep.read(self, indices, size)
        return self.decode(indices, size)

    def decode(self, indices: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Return frames as `read` does, from the file in any case."""
        return resize(self._read(indices, size), size)

    def close(self) -> None:
        """Close the file."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, indices: Sequence[int], size: tuple[int, int]) -> Tensor:
        if self._reader is None:
            self._open_next()
        assert self._reader is not None
        try:
            return self._reader.read(indices, size)
        except Exception as error:  # decord raises its own classes, FFmpeg many
            if isinstance(error, LostFramesError) and self._next == len(self.backends):
                raise  # the reader remains usable
            self.close()
            try:
                self._open_next()
            except UsageError:
                raise (error if isinstance(error, UsageError) else unreadable(self.path, error)) from error
        return self._read(indices, size)

    def _open_next(self) -> None:
        """Open the file with the next backend that can; raise the last backend's `UsageError` if none can."""
        error = UsageError(f"no decoder can read {shown(self.path)}: re-encode it or leave it out")
        while self._next < len(self.backends):
            backend = self.backends[self._next]
            self._next += 1
            try:
                self._reader, self.backend = DECODERS[backend](self.path, self.info), backend
                return
            except UsageError as refusal:
                error = refusal
        self._next = max(0, len(self.backends) - 1)  # a later call may try the last one again
        raise error


class FrameCache:
    """Decoded frames of small files, at the size at which they were read: uint8 (F, 3, H, W) each.

    A small set of short clips is then decoded once, instead of in every epoch. The files that were used last are kept,
    up to `KEPT_FILES` bytes. Damaged files are not kept, and a file that changed is decoded again.
    """

    def __init__(self) -> None:
        self.frames: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self.damaged: set[tuple[Any, ...]] = set()
        self.bytes = 0

    def fits(self, num_frames: int, size: tuple[int, int]) -> bool:
        """Return whether all frames of a file at a size (H, W) are few enough to be kept."""
        return num_frames * 3 * math.prod(size) <= KEPT_FILE

    def read(self, video: Video, indices: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Return the frames `indices` of a video at a size (H, W); decode and keep all frames if they are not kept."""
        try:
            stat = video.path.stat() if isinstance(video.path, Path) else None
        except OSError:  # an open file may be readable although it was removed; if not, the decoder says so
            return video.decode(indices, size)
        key = (video.path, stat and (stat.st_mtime_ns, stat.st_size), tuple(video.backends), size)
        if key in self.damaged:
            return video.decode(indices, size)
        if key not in self.frames:
            try:
                frames = video.decode(range(video.num_frames), size)
            except UsageError:  # the frames that are asked for may be readable
                self.damaged.add(key)
                return video.decode(indices, size)
            self.frames[key] = frames
            self.bytes += frames.numel()
            while self.bytes > KEPT_FILES:
                self.bytes -= self.frames.popitem(last=False)[1].numel()
        self.frames.move_to_end(key)
        return self.frames[key][list(indices)]


def open_video(
    source: str | PathLike[str] | Source, decoder: DecoderOption = "auto", info: VideoInfo | None = None
) -> Video:
    """Open a video file for reading.

    `decoder` is "auto" or one of `DECODERS`. Pass `info` if the file was probed before, to avoid a second probe. Raises
    `UsageError` if the file, or this decoder, cannot be used.
    """
    source = Path(source) if isinstance(source, str | PathLike) else source
    info = info or probe_video(source)
    names = backends_for(info, decoder)
    if (
        isinstance(source, Buffer) and decoder == "auto"
    ):  # it is read once: verifying torchcodec costs more than it saves
        names = [name for name in names if name != "torchcodec"]
    return Video(source, info, names)


def backends_for(info: VideoInfo, decoder: DecoderOption = "auto", *, strict: bool = True) -> list[DecoderName]:
    """Return the names of the backends that `open_video` tries for such a file, in order.

    For an indexed file, the first is the one that read it then. A named `decoder` is the only one if `strict`;
    otherwise it comes first, unless it would read the file incorrectly. Raises `UsageError` if the name is unknown.
    """
    names = suitable_backends(info)
    if decoder == "auto":
        return names[names.index(info.decoder) :] if info.decoder in names else names
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r}: use one of auto, {', '.join(DECODERS)}")
    if strict:
        return [decoder]
    unverified = decoder == "decord" and info.decoder not in ("", decoder)  # the index tried decord, and it failed
    first = [decoder] if suits(decoder, info) and not unverified else []
    return first + [name for name in names if name != decoder]


def open_cached(source: Source, decoder: DecoderOption, info: VideoInfo) -> Video:
    """Open a video through a cache of the last OPEN_FILES of this process.

    Do not close the video; remove it from the cache with `close_cached`.
    """
    videos = _open.setdefault(os.getpid(), OrderedDict())
    key = (source, decoder)
    if key not in videos:
        while len(videos) >= OPEN_FILES:
            videos.popitem(last=False)[1].close()
        keep = _kept.setdefault(os.getpid(), FrameCache())
        videos[key] = Video(source, info, backends_for(info, decoder, strict=False), keep=keep)
    videos.move_to_end(key)
    return videos[key]


def close_cached(source: Source, decoder: str) -> None:
    """Close a video that failed and remove it from the cache, so that the next request opens it again."""
    video = _open.get(os.getpid(), OrderedDict()).pop((source, decoder), None)
    if video is not None:
        video.close()


# By process id: after a fork, the parent's videos must not even be closed, because that may hang.
_open: dict[int, OrderedDict[tuple[Source, str], Video]] = {}
_kept: dict[int, FrameCache] = {}
