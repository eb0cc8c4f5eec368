"""The libraries that decode video, each behind `read(indices, size)`: torchcodec, decord, PyAV, and Pillow for WebP.

Each checks that the frames it returns are those that the probe has seen, or refuses the file.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rin_video.config import DecoderName
from rin_video.datasets.geometry import shown_pixels
from rin_video.datasets.sources import Buffer, Source, as_location, open_source, shown
from rin_video.datasets.video_info import LostFramesError, VideoInfo
from rin_video.datasets.video_stream import VideoStream, unreadable
from rin_video.errors import UsageError

SOUGHT_CONTAINERS = ("mov", "matroska")  # those whose seeks torchcodec and decord get right
NEWER_THAN_DECORD = ("av1",)
TIME_TOLERANCE = 2e-3  # seconds; Matroska rounds to 1e-3
SAME_PIXELS = 3.0  # grey levels on average: decoders differ in how they enlarge colour


class FrameReader(Protocol):
    """What a backend has to do."""

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Frames `indices` as uint8 (F, 3, H, W): of the shown size, the stored one, or `size` where cheap here.

        Raises LostFramesError for frames that damage spoils.
        """

    def close(self) -> None: ...


class TorchCodecReader:
    """torchcodec in its exact mode. It needs a shared FFmpeg on the machine, and imports without one."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        if problem := torchcodec_problem():
            raise UsageError(f"torchcodec cannot be used here ({problem}): use data.decoder=pyav")
        if not _suits_torchcodec(info):
            raise UsageError(f"torchcodec would not find the right frames of {shown(source)}: use data.decoder=pyav")
        from torchcodec.decoders import VideoDecoder

        self.source, self._stack, self._times, self._size = source, ExitStack(), info.times, info.stored
        try:
            location: Any = self._stack.enter_context(as_location(source))
            self._decoder: Any = VideoDecoder(location, seek_mode="exact", stream_index=info.stream)
            self._begin = self._decoder.metadata.begin_stream_seconds
        except UsageError:
            raise
        except Exception as error:
            raise unreadable(source, error) from error
        if len(self._decoder) != info.num_frames:
            raise _misplaced("torchcodec", source)
        _prove(self, "torchcodec", source, info)

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        batch = self._decoder.get_frames_at(list(indices))
        if not np.allclose(batch.pts_seconds.numpy() - self._begin, self._times[list(indices)], atol=TIME_TOLERANCE):
            raise _misplaced("torchcodec", self.source)
        if tuple(batch.data.shape[2:]) != self._size:
            raise _misplaced("torchcodec", self.source)
        return batch.data

    def close(self) -> None:
        self._decoder = None
        self._stack.close()


class DecordReader:
    """decord, for those who name it, and for files where it was seen to be right: it is silently wrong about others.

    It returned a neighbour for what it did not find, and another track than was shown; its last release is of 2021.
    """

    def __init__(self, source: Source, info: VideoInfo) -> None:
        try:
            import decord
        except ImportError as error:
            raise UsageError("decord is not installed: use data.decoder=pyav, or pip install decord") from error
        decord.logging.set_level(decord.logging.QUIET)
        if not _suits_decord(info):
            raise UsageError(f"decord would not find the right frames of {shown(source)}: use data.decoder=pyav")
        self.source, self._size = source, info.stored
        try:
            with as_location(source) as location:
                self._reader = decord.VideoReader(location, num_threads=1)
            times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except UsageError:
            raise
        except Exception as error:
            raise unreadable(source, error) from error
        if len(times) != info.num_frames or not np.allclose(times - times[0], info.times, atol=TIME_TOLERANCE):
            raise _misplaced("decord", source)
        _prove(self, "decord", source, info)

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        frames = torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy()).permute(0, 3, 1, 2)
        self._reader.seek(0)  # or it decodes the rest of the film into memory
        if tuple(frames.shape[2:]) != self._size:
            raise _misplaced("decord", self.source)
        return frames

    def close(self) -> None:
        self._reader = None


class PyAVReader:
    """Frames found by their timestamps: seek to the keyframe at or before, decode on, and match."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        if info.container == "webp":
            raise UsageError(f"PyAV cannot read {shown(source)}: use data.decoder=pillow")
        self.source, self.info = source, info
        self._stamps, self._entries = info.timestamps, info.entries
        self._lost = {index for first, end in info.lost_ranges for index in range(first, end)}
        self._video = VideoStream(source, info.stream)

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        info, found = self.info, {}
        missing = self._lost.intersection(indices)
        if not missing:
            how = {"seekable": info.trusted, "skip": info.plain}
            for index, frame in self._video.find(indices, self._stamps, self._entries, **how):
                if frame is None:
                    missing.add(index)
                elif not missing:
                    found[index] = shown_pixels(frame, self._target(size), info.orientation)
        if missing:
            raise LostFramesError(self.source, missing)
        return stack_frames([found[i] for i in indices])

    def _target(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The size while decoding: FFmpeg's scaler is fast and good at reducing only."""
        shown_size = self.info.size
        return shown_size if size is None or size[0] * size[1] >= shown_size[0] * shown_size[1] else size

    def close(self) -> None:
        self._video.close()


class PillowReader:
    """Animated WebP, which FFmpeg does not decode."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        from PIL import Image

        if info.container != "webp":
            raise UsageError(f"Pillow reads WebP only, not {shown(source)}: use data.decoder=pyav")
        self.source = source
        self._file = open_source(source)
        self._image = Image.open(self._file, formats=["WEBP"])

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        from PIL import Image

        found = {}
        for index in sorted(set(indices)):
            self._image.seek(index)
            frame = self._image.convert("RGBA")
            found[index] = np.asarray(Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame))[..., :3]
        return stack_frames([found[i] for i in indices])

    def close(self) -> None:
        self._image.close()
        self._file.close()


DECODERS: dict[DecoderName, Callable[[Source, VideoInfo], FrameReader]] = {
    "torchcodec": TorchCodecReader,
    "decord": DecordReader,
    "pyav": PyAVReader,
    "pillow": PillowReader,
}


def suitable_backends(info: VideoInfo) -> list[DecoderName]:
    """Those that should find the right frames of such a file on this machine, fastest first; decord only by name."""
    if info.container == "webp":
        return ["pillow"]
    first: list[DecoderName] = ["torchcodec"] if _suits_torchcodec(info) and not torchcodec_problem() else []
    return [*first, "pyav"]


def suits(name: DecoderName, info: VideoInfo) -> bool:
    """Whether a backend should find the right frames of such a file, if it is there."""
    if name == "decord":
        return _suits_decord(info) and importlib.util.find_spec("decord") is not None
    return name in suitable_backends(info)


@lru_cache(maxsize=1)
def torchcodec_problem() -> str:
    """Why torchcodec cannot be used here, found by decoding a frame; empty where it can."""
    if not importlib.util.find_spec("torchcodec"):
        return "it is not installed"
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(_tiny_clip()).get_frame_at(0)
    except Exception as error:  # without a shared FFmpeg: RuntimeError, ImportError or OSError, by the version
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return ""


def stack_frames(frames: list[np.ndarray]) -> Tensor:
    """(H, W, 3) each, all of one size, to (F, 3, H, W)."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _suits_decord(info: VideoInfo) -> bool:
    """It takes one of several tracks, and every seek for a plain one; its times in AVI are nonsense."""
    return _suits_torchcodec(info) and info.tracks == 1 and info.codec not in NEWER_THAN_DECORD


def _suits_torchcodec(info: VideoInfo) -> bool:
    """Its seeks go wrong at open groups of pictures. FFmpeg's releases differ in how they round more than 8 bits."""
    return info.container in SOUGHT_CONTAINERS and info.plain and info.bits == 8


def _prove(reader: FrameReader, name: str, source: Source, info: VideoInfo) -> None:
    """UsageError where the reader's pixels are not PyAV's at three places between keyframes; once for each process."""
    if info.decoder == name or (source, name) in _proved:
        return
    places = sorted({info.num_frames * part // 7 for part in (1, 3, 6)})
    if info.num_frames > 2:  # next to each, so that keyframes alone do not decide
        places = sorted({min(place + 1, info.num_frames - 1) for place in places})
    right = PyAVReader(source, replace(info, size=info.stored))
    try:
        for place in places:
            around = list(range(max(0, place - 1), min(info.num_frames, place + 2)))
            pictures = right.read(around, None).int()
            errors = (reader.read([place], None).int() - pictures).abs().float().mean((1, 2, 3))
            error = errors[around.index(place)]
            if error > SAME_PIXELS or error > errors.min() + 0.01:
                raise _misplaced(name, source)
    except UsageError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error
    finally:
        right.close()
    if not isinstance(source, Buffer):  # which would be kept in memory
        _proved.add((source, name))


_proved: set[tuple[Source, str]] = set()


def _misplaced(decoder: str, source: Source) -> UsageError:
    return UsageError(f"{decoder} does not find the frames of {shown(source)} where they are: use data.decoder=pyav")


def _tiny_clip() -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=8)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
