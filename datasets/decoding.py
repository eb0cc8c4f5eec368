"""Reading video files: the one place in the package that opens a video.

`open_video` gives a `Video`, whatever the decoder behind it. What a file holds is always found by walking through its
packets with PyAV, because the counts in container headers are often wrong; `decord` then only reads the pixels, and
only of files where it is known to find the right ones.

A decoder lives in the process that opened it: decord hangs when it is opened before a fork and read after it. So open
videos where they are read and never keep one in a dataset; a `VideoInfo` may be kept, pickled and sent about.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rin_video.errors import UsageError

# The first of FFmpeg's names for a container. Anything else (it guesses raw codecs from random bytes) is no clip.
CONTAINERS = ("mov", "matroska", "avi", "gif")
DECORD_CONTAINERS = ("mov", "matroska")
TIME_TOLERANCE = 2e-3  # seconds; Matroska rounds to 1e-3


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, as its packets tell it."""

    container: str  # one of CONTAINERS
    fps: float  # average over the file
    size: tuple[int, int]  # (H, W) as shown, after rotation
    quarter_turns: int  # counter-clockwise turns of 90 degrees from the stored to the shown frame
    times: np.ndarray  # (F,) seconds from the first frame, ascending
    timestamps: np.ndarray | None  # (F,) presentation times in units of the stream; None: not to be trusted
    keyframes: np.ndarray  # (K,) indices of the frames that decoding can start from, ascending
    plain_seek: bool  # seeking to the time of a keyframe ends at that keyframe

    @property
    def num_frames(self) -> int:
        return len(self.times)


class FrameReader(Protocol):
    """What a backend has to do."""

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames `indices` as uint8 (F, H, W, 3)."""

    def close(self) -> None: ...


class Video:
    """An open video file. Use it as a context manager, in the process that opened it."""

    def __init__(self, path: Path, info: VideoInfo, backends: Sequence[str]) -> None:
        self.path, self.info = path, info
        self.num_frames, self.fps, self.size = info.num_frames, info.fps, info.size
        self._backends = iter(backends)
        self._open_next()

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames `indices`, in that order, as uint8 (F, 3, H, W).

        Raises IndexError for a frame that the file does not have and UsageError for one that cannot be decoded.
        """
        wrong = [i for i in indices if not 0 <= i < self.num_frames]
        if wrong:
            raise IndexError(f"{self.path} has {self.num_frames} frames; there is no frame {wrong[0]}")
        if not len(indices):
            return torch.empty(0, 3, *self.size, dtype=torch.uint8)
        frames = self._read(indices)
        if frames.shape[1:3] != self.size:
            raise UsageError(
                f"{self.path} changes its frame size from {self.size} to {frames.shape[1:3]} (H, W): re-encode it"
            )
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, indices: Sequence[int]) -> np.ndarray:
        try:
            return self._reader.read(indices)
        except Exception as error:  # decord raises its own classes, FFmpeg many
            self._reader.close()
            try:
                self._open_next()
            except UsageError:
                raise (error if isinstance(error, UsageError) else _unreadable(self.path, error)) from error
        return self._read(indices)

    def _open_next(self) -> None:
        """The next backend that can open the file. UsageError where there is none, by what the last one said."""
        error = UsageError(f"no decoder can read {self.path}: re-encode it or leave it out")
        for backend in self._backends:
            try:
                self._reader, self.backend = DECODERS[backend](self.path, self.info), backend
                return
            except UsageError as refusal:  # noqa: PERF203
                error = refusal
        raise error


def open_video(path: str | PathLike[str], decoder: str = "auto", info: VideoInfo | None = None) -> Video:
    """Open a video file for reading.

    `decoder` is "auto" or one of `DECODERS`; `info`, where the file was probed before, saves probing it again.
    Raises UsageError where the file cannot be read, or not by that decoder.
    """
    path = Path(path)
    info = info or probe_video(path)
    return Video(path, info, backends_for(info, decoder))


def backends_for(info: VideoInfo, decoder: str = "auto") -> list[str]:
    """The names of the backends that `open_video` tries for such a file, in that order."""
    if decoder == "auto":
        return ["decord", "pyav"] if _suits_decord(info) and importlib.util.find_spec("decord") else ["pyav"]
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r}: use one of auto, {', '.join(DECODERS)}")
    return [decoder]


def probe_video(path: str | PathLike[str]) -> VideoInfo:
    """What the file holds: one pass over its packets, one decoded frame. Always with PyAV, safe before a fork."""
    path = Path(path)
    with _open_container(path) as container:
        stream = container.streams.video[0]
        try:
            # Notes on the packets, not the packets: together those are the whole file.
            packets = [
                (packet.pts, packet.dts, packet.is_keyframe)
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard
            ]
            with _open_container(path) as again:
                frame = next(again.decode(video=0))
        except StopIteration:
            raise UsageError(f"{path} cannot be read: not one frame can be decoded; leave it out") from None
        except Exception as error:
            raise _unreadable(path, error) from error
        name, fps = _container_name(container), float(stream.average_rate or 0)
        time_base = float(stream.time_base)

    turns = round(frame.rotation / 90) % 4
    size = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    stamps = [pts for pts, _, _ in packets]
    keys = [index for index, (_, _, is_keyframe) in enumerate(packets) if is_keyframe]
    # The times in AVI are those of decoding, not of showing; and a missing or repeated time finds no frame.
    if name == "avi" or not keys or None in stamps or len(set(stamps)) < len(stamps):
        fps = fps or 1.0
        return VideoInfo(name, fps, size, turns, np.arange(len(stamps)) / fps, None, np.zeros(1, np.int64), False)
    timestamps = np.array(sorted(stamps), dtype=np.int64)
    times = (timestamps - timestamps[0]) * time_base
    if name == "gif" or not fps:  # for a GIF the container's rate is a guess from its first frames
        fps = _mean_rate(times)
    keyframes = np.searchsorted(timestamps, sorted(stamps[key] for key in keys))
    # Containers are sought by decoding times: the next keyframe may be decoded before this one is shown.
    decoded = [dts for _, dts, _ in packets]
    overtaken = any(decoded[later] is None or decoded[later] <= stamps[key] for key, later in pairwise(keys))
    plain_seek = keyframes.tolist() == keys and not overtaken
    return VideoInfo(name, fps, size, turns, times, timestamps, keyframes, plain_seek)


class PyAVReader:
    """Frames found by their timestamps: seek to the keyframe at or before, decode on, and match."""

    def __init__(self, path: Path, info: VideoInfo) -> None:
        self.path, self.info = path, info
        self._container = _open_container(path)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        found: dict[int, np.ndarray] = {}
        wanted = sorted(set(indices))
        while wanted:
            # One run of decoding serves every wanted frame up to a gap that holds a keyframe to jump to.
            start = self._keyframe_before(wanted[0])
            for index, frame in self._decode_from(start):
                if index == wanted[0]:
                    found[wanted.pop(0)] = self._pixels(frame)
                    if not wanted or self._keyframe_before(wanted[0]) > index + 1:
                        break
            else:
                raise UsageError(
                    f"frame {wanted[0]} of {self.path} cannot be decoded (damaged file): re-encode it or leave it out"
                )
        return np.stack([found[i] for i in indices])

    def close(self) -> None:
        self._container.close()

    def _keyframe_before(self, index: int) -> int:
        keys = self.info.keyframes
        return int(keys[max(0, np.searchsorted(keys, index, side="right") - 1)])

    def _decode_from(self, start: int) -> Iterator[tuple[int, Any]]:
        """Frames with their indices, from keyframe `start`, or one before it, to the end of the file."""
        stamps = self.info.timestamps
        if stamps is None:
            self._rewind()
            yield from enumerate(self._container.decode(video=0))
            return
        for key in reversed([key for key in self.info.keyframes if key <= start]):
            self._seek(int(stamps[key]))
            frames = self._container.decode(video=0)
            first = next(frames, None)
            # A seek that ended at a later keyframe is tried again from an earlier one.
            if first is not None and (first.pts <= stamps[start] or key == self.info.keyframes[0]):
                for frame in chain([first], frames):
                    index = int(np.searchsorted(stamps, frame.pts))
                    if index < len(stamps) and stamps[index] == frame.pts:
                        yield index, frame
                return

    def _seek(self, timestamp: int) -> None:
        import av

        try:
            self._container.seek(timestamp, stream=self._container.streams.video[0])
        except av.FFmpegError:  # a file cut short may have lost its index
            self._rewind()

    def _rewind(self) -> None:
        self._container.close()
        self._container = _open_container(self.path)

    def _pixels(self, frame: Any) -> np.ndarray:
        return np.rot90(frame.to_ndarray(format="rgb24"), self.info.quarter_turns)


class DecordReader:
    """decord: faster than PyAV at picking frames; refused where its table of times is not that of the packets."""

    def __init__(self, path: Path, info: VideoInfo) -> None:
        try:
            import decord
        except ImportError as error:
            raise UsageError("decord is not installed: use --decoder pyav, or pip install decord") from error
        decord.logging.set_level(decord.logging.QUIET)
        if not _suits_decord(info):
            raise UsageError(f"decord would not find the right frames of {path}: use --decoder pyav")
        try:
            self._reader = decord.VideoReader(str(path), num_threads=1)
            times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except Exception as error:
            raise _unreadable(path, error) from error
        if len(times) != info.num_frames or not np.allclose(times - times[0], info.times, atol=TIME_TOLERANCE):
            raise UsageError(f"decord does not find the frames of {path} where they are: use --decoder pyav")

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self._reader.get_batch(list(indices)).asnumpy()

    def close(self) -> None:
        self._reader = None


DECODERS: dict[str, Callable[[Path, VideoInfo], FrameReader]] = {"decord": DecordReader, "pyav": PyAVReader}


def _suits_decord(info: VideoInfo) -> bool:
    """It takes every seek for a plain one, and otherwise returns the wrong frame; its times in AVI are nonsense."""
    return info.container in DECORD_CONTAINERS and info.plain_seek


def _mean_rate(times: np.ndarray) -> float:
    return float((len(times) - 1) / times[-1]) if len(times) > 1 else 1.0


def _open_container(path: Path) -> Any:
    import av

    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        container = av.open(str(path))
    except Exception as error:
        raise _unreadable(path, error) from error
    name = _container_name(container)
    if name in CONTAINERS and container.streams.video:
        return container
    container.close()
    cause = "it holds no video" if name in CONTAINERS else f"it looks like {name!r}, not one of {', '.join(CONTAINERS)}"
    raise UsageError(f"{path} cannot be read as a clip: {cause}")


def _container_name(container: Any) -> str:
    return container.format.name.split(",")[0]


def _unreadable(path: Path, error: Exception) -> UsageError:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UsageError(f"{path} cannot be read: {cause}; re-encode it or leave it out")
