"""Reading video files: the one door through which the package opens a video.

`open_video` gives a `Video`, whatever the decoder behind it. What a file holds is always found by walking through its
packets (`video_info.py`); the fastest backend that finds these frames reads the pixels (`backends.py`).

A decoder lives in the process that opened it: decord hangs when it is opened before a fork and read after it. So open
videos where they are read and never keep one in a dataset; a `VideoInfo` may be kept, pickled and sent about.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from rin_video.config import DecoderName, DecoderOption
from rin_video.datasets.backends import DECODERS, suitable_backends
from rin_video.datasets.framing import resize
from rin_video.datasets.sources import Source, shown
from rin_video.datasets.video_info import VideoInfo, probe_video, unreadable
from rin_video.errors import UsageError

__all__ = ["DECODERS", "Video", "VideoInfo", "backends_for", "kept_open", "open_video", "probe_video"]

OPEN_FILES = 8  # videos that a process keeps open


class Video:
    """An open video file. Use it as a context manager, in the process that opened it."""

    def __init__(self, source: Source, info: VideoInfo, backends: Sequence[DecoderName]) -> None:
        self.path, self.info = source, info
        self.num_frames, self.fps, self.size = info.num_frames, info.fps, info.size
        self._backends = iter(backends)
        self._open_next()

    def read(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """Frames `indices`, in that order, as uint8 (F, 3, H, W), resized to `size` (H, W) where it is given.

        Raises IndexError for a frame that the file does not have and UsageError for one that cannot be decoded.
        """
        wrong = [i for i in indices if not 0 <= i < self.num_frames]
        if wrong:
            raise IndexError(f"{shown(self.path)} has {self.num_frames} frames; there is no frame {wrong[0]}")
        if not len(indices):
            return torch.empty(0, 3, *(size or self.size), dtype=torch.uint8)
        frames = self._read(indices, size)
        if tuple(frames.shape[2:]) not in (self.size, size):
            raise UsageError(
                f"{shown(self.path)} changes its frame size from {self.size} to {tuple(frames.shape[2:])} (H, W): "
                "re-encode it"
            )
        return frames if size is None else resize(frames, size)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        try:
            return self._reader.read(indices, size)
        except Exception as error:  # decord raises its own classes, FFmpeg many
            self._reader.close()
            try:
                self._open_next()
            except UsageError:
                raise (error if isinstance(error, UsageError) else unreadable(self.path, error)) from error
        return self._read(indices, size)

    def _open_next(self) -> None:
        """The next backend that can open the file. UsageError where there is none, by what the last one said."""
        error = UsageError(f"no decoder can read {shown(self.path)}: re-encode it or leave it out")
        for backend in self._backends:
            try:
                self._reader, self.backend = DECODERS[backend](self.path, self.info), backend
                return
            except UsageError as refusal:  # noqa: PERF203
                error = refusal
        raise error


def open_video(
    source: str | PathLike[str] | Source, decoder: DecoderOption = "auto", info: VideoInfo | None = None
) -> Video:
    """Open a video file for reading.

    `decoder` is "auto" or one of `DECODERS`; `info`, where the file was probed before, saves probing it again.
    Raises UsageError where the file cannot be read, or not by that decoder.
    """
    source = Path(source) if isinstance(source, str | PathLike) else source
    info = info or probe_video(source)
    return Video(source, info, backends_for(info, decoder))


def backends_for(info: VideoInfo, decoder: DecoderOption = "auto") -> list[DecoderName]:
    """The names of the backends that `open_video` tries for such a file, in that order.

    Where the file was indexed, the first is the one that read it then.
    """
    if decoder == "auto":
        names = suitable_backends(info)
        return names[names.index(info.decoder) :] if info.decoder in names else names
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r}: use one of auto, {', '.join(DECODERS)}")
    return [decoder]


def kept_open(source: Source, decoder: DecoderOption, info: VideoInfo) -> Video:
    """`open_video`, but the last OPEN_FILES stay open for this process. Do not close it; drop it with `let_go`."""
    videos = _open.setdefault(os.getpid(), OrderedDict())
    key = (source, decoder)
    if key not in videos:
        while len(videos) >= OPEN_FILES:
            videos.popitem(last=False)[1].close()
        videos[key] = open_video(source, decoder, info)
    videos.move_to_end(key)
    return videos[key]


def let_go(source: Source, decoder: str) -> None:
    """Close a video that failed, so that the next one to ask for it begins anew."""
    video = _open.get(os.getpid(), OrderedDict()).pop((source, decoder), None)
    if video is not None:
        video.close()


# By process: what the parent had open is not even closed after a fork, for that alone may hang.
_open: dict[int, OrderedDict[tuple[Source, str], Video]] = {}
