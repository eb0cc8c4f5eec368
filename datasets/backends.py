"""The libraries that decode video, each behind `read(indices, size)`: torchcodec, decord, PyAV, and Pillow for WebP.

Fastest first. Each checks that the frames it returns are those of the packet table, or refuses the file.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rin_video.config import DecoderName
from rin_video.datasets.sources import Source, as_location, open_source, shown
from rin_video.datasets.video_info import VideoInfo, open_container, unreadable
from rin_video.errors import UsageError

SOUGHT_CONTAINERS = ("mov", "matroska")  # those whose seeks torchcodec and decord get right
NEWER_THAN_DECORD = ("av1",)
TIME_TOLERANCE = 2e-3  # seconds; Matroska rounds to 1e-3


class FrameReader(Protocol):
    """What a backend has to do."""

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Frames `indices` as uint8 (F, 3, H, W), scaled to `size` where that is cheaper here than afterwards."""

    def close(self) -> None: ...


class TorchCodecReader:
    """torchcodec in its exact mode. It needs a shared FFmpeg on the machine, and imports without one."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        if problem := torchcodec_problem():
            raise UsageError(f"torchcodec cannot be used here ({problem}): use --decoder pyav")
        if not _suits_torchcodec(info):
            raise UsageError(f"torchcodec would not find the right frames of {shown(source)}: use --decoder pyav")
        from torchcodec.decoders import VideoDecoder

        self.source, self._stack, self._times = source, ExitStack(), info.times
        try:
            location: Any = self._stack.enter_context(as_location(source))
            self._decoder: Any = VideoDecoder(location, seek_mode="exact")
            self._begin = self._decoder.metadata.begin_stream_seconds
        except UsageError:
            raise
        except Exception as error:
            raise unreadable(source, error) from error
        if len(self._decoder) != info.num_frames:
            raise _misplaced("torchcodec", source)

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        batch = self._decoder.get_frames_at(list(indices))
        if not np.allclose(batch.pts_seconds.numpy() - self._begin, self._times[list(indices)], atol=TIME_TOLERANCE):
            raise _misplaced("torchcodec", self.source)
        return batch.data

    def close(self) -> None:
        self._decoder = None
        self._stack.close()


class DecordReader:
    """decord: faster than PyAV at picking frames; refused where its table of times is not that of the packets."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        try:
            import decord
        except ImportError as error:
            raise UsageError("decord is not installed: use --decoder pyav, or pip install decord") from error
        decord.logging.set_level(decord.logging.QUIET)
        if not _suits_decord(info):
            raise UsageError(f"decord would not find the right frames of {shown(source)}: use --decoder pyav")
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

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        return torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy()).permute(0, 3, 1, 2)

    def close(self) -> None:
        self._reader = None


class PyAVReader:
    """Frames found by their timestamps: seek to the keyframe at or before, decode on, and match."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        if info.container == "webp":
            raise UsageError(f"PyAV cannot read {shown(source)}: use --decoder pillow")
        self.source, self.info = source, info
        self.stamps, self.keyframes = info.timestamps, info.keyframes
        self._open()

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        found: dict[int, np.ndarray] = {}
        wanted = sorted(set(indices))
        needed = set(self.stamps[wanted].tolist())
        while wanted:
            # One run of decoding serves every wanted frame up to a gap that holds a keyframe to jump to.
            start = self._keyframe_before(wanted[0])
            for index, frame in self._decode_from(start, needed):
                if index == wanted[0]:
                    found[wanted.pop(0)] = self._pixels(frame, size)
                    if not wanted or self._keyframe_before(wanted[0]) > index + 1:
                        break
            else:
                raise UsageError(
                    f"frame {wanted[0]} of {shown(self.source)} cannot be decoded (damaged file): "
                    "re-encode it or leave it out"
                )
        return stack_frames(self.source, [found[i] for i in indices])

    def close(self) -> None:
        self._stack.close()

    def _open(self) -> None:
        self._stack = ExitStack()
        self._container = self._stack.enter_context(open_container(self.source))

    def _keyframe_before(self, index: int) -> int:
        return int(self.keyframes[max(0, np.searchsorted(self.keyframes, index, side="right") - 1)])

    def _decode_from(self, start: int, needed: set[int]) -> Iterator[tuple[int, Any]]:
        """Frames with their indices, from keyframe `start`, or one before it, to the end; all of those `needed`."""
        if not self.info.trusted:
            self._rewind()
            yield from enumerate(self._container.decode(video=0))
            return
        stamps = self.stamps
        for key in reversed([key for key in self.keyframes if key <= start]):
            self._seek(int(stamps[key]))
            frames = self._frames(needed)
            first = next(frames, None)
            # A seek that ended at a later keyframe is tried again from an earlier one.
            if first is not None and (first.pts <= stamps[start] or key == self.keyframes[0]):
                for frame in chain([first], frames):
                    index = int(np.searchsorted(stamps, frame.pts))
                    if index < len(stamps) and stamps[index] == frame.pts:
                        yield index, frame
                return

    def _frames(self, needed: set[int]) -> Iterator[Any]:
        """Frames from here on. One that is not needed, and that no other builds on, is not even decoded."""
        stream = self._container.streams.video[0]
        for packet in self._container.demux(stream):
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in needed else "NONREF"
            yield from packet.decode()

    def _seek(self, timestamp: int) -> None:
        import av

        try:
            self._container.seek(timestamp, stream=self._container.streams.video[0])
        except av.FFmpegError:  # a file cut short may have lost its index
            self._rewind()

    def _rewind(self) -> None:
        self.close()
        self._open()

    def _pixels(self, frame: Any, size: tuple[int, int] | None) -> np.ndarray:
        turns = self.info.quarter_turns
        if size is None or size[0] * size[1] >= frame.height * frame.width:
            pixels = frame.to_ndarray(format="rgb24")
        else:  # to RGB and to size in one pass of FFmpeg's scaler
            H, W = size[::-1] if turns % 2 else size
            pixels = frame.to_ndarray(format="rgb24", width=W, height=H, interpolation="BILINEAR")
        return np.rot90(pixels, turns)


class PillowReader:
    """Animated WebP, which FFmpeg does not decode."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        from PIL import Image

        if info.container != "webp":
            raise UsageError(f"Pillow reads WebP only, not {shown(source)}: use --decoder pyav")
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
        return stack_frames(self.source, [found[i] for i in indices])

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
    """Those that should find the right frames of such a file on this machine, fastest first."""
    if info.container == "webp":
        return ["pillow"]
    names: list[DecoderName] = ["torchcodec"] if _suits_torchcodec(info) and not torchcodec_problem() else []
    names += ["decord"] if _suits_decord(info) and importlib.util.find_spec("decord") else []
    return [*names, "pyav"]


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


def stack_frames(source: Source, frames: list[np.ndarray]) -> Tensor:
    """(H, W, 3) each to (F, 3, H, W). UsageError where the size changes on the way."""
    if len({frame.shape for frame in frames}) > 1:
        sizes = ", ".join(sorted({"x".join(map(str, frame.shape[:2])) for frame in frames}))
        raise UsageError(f"{shown(source)} changes its frame size ({sizes}): re-encode it")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _suits_decord(info: VideoInfo) -> bool:
    """It takes every seek for a plain one, and otherwise returns the wrong frame; its times in AVI are nonsense."""
    return _suits_torchcodec(info) and info.codec not in NEWER_THAN_DECORD


def _suits_torchcodec(info: VideoInfo) -> bool:
    """Its seeks go wrong at open groups of pictures. FFmpeg's releases differ in how they round more than 8 bits."""
    return info.container in SOUGHT_CONTAINERS and info.plain_seek and info.bits == 8


def _misplaced(decoder: str, source: Source) -> UsageError:
    return UsageError(f"{decoder} does not find the frames of {shown(source)} where they are: use --decoder pyav")


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
