"""Video decoding backends with a common interface: torchcodec, decord, PyAV, and Pillow for WebP.

Each backend verifies that it returns the frames that the probe found, and otherwise raises `UsageError`.
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

SOUGHT_CONTAINERS = ("mov", "matroska")  # torchcodec and decord seek correctly in these
NEWER_THAN_DECORD = ("av1",)
TIME_TOLERANCE = 2e-3  # seconds; Matroska rounds timestamps to 1e-3
SAME_PIXELS = 3.0  # mean difference in grey levels: decoders upsample chroma differently


class FrameReader(Protocol):
    """The interface of a backend."""

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Return the frames `indices` as uint8 (F, 3, H, W).

        Their size is the display size, the stored size, or `size` if the backend can scale at low cost. Raises
        `LostFramesError` if frames are damaged.
        """

    def close(self) -> None:
        """Close the file."""


class TorchCodecReader:
    """Reads with torchcodec in exact mode, which requires a shared FFmpeg library on the machine.

    The package can be imported without it. Raises `UsageError` if torchcodec cannot be used or finds other frames.
    """

    def __init__(self, source: Source, info: VideoInfo) -> None:
        if problem := torchcodec_problem():
            raise UsageError(f"torchcodec cannot be used here ({problem}): use data.decoder=pyav")
        if not _suits_torchcodec(info):
            raise UsageError(f"torchcodec cannot seek exactly in {shown(source)}: use data.decoder=pyav")
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
            raise _wrong_frames("torchcodec", source)
        _verify_pixels(self, "torchcodec", source, info)

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Return the frames `indices` as uint8 (F, 3, H, W) of the stored size."""
        batch = self._decoder.get_frames_at(list(indices))
        if not np.allclose(batch.pts_seconds.numpy() - self._begin, self._times[list(indices)], atol=TIME_TOLERANCE):
            raise _wrong_frames("torchcodec", self.source)
        if tuple(batch.data.shape[2:]) != self._size:
            raise _wrong_frames("torchcodec", self.source)
        return batch.data

    def close(self) -> None:
        """Close the file."""
        self._decoder = None
        self._stack.close()


class DecordReader:
    """Reads with decord; used only if it is named, and only for files that it reads correctly.

    For other files decord silently returned neighbouring frames, or another track than the one displayed. Its last
    release was in 2021. Raises `UsageError` if decord is not installed or finds other frames.
    """

    def __init__(self, source: Source, info: VideoInfo) -> None:
        try:
            import decord
        except ImportError as error:
            raise UsageError("decord is not installed: use data.decoder=pyav, or pip install decord") from error
        decord.logging.set_level(decord.logging.QUIET)
        if not _suits_decord(info):
            raise UsageError(f"decord cannot seek exactly in {shown(source)}: use data.decoder=pyav")
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
            raise _wrong_frames("decord", source)
        _verify_pixels(self, "decord", source, info)

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Return the frames `indices` as uint8 (F, 3, H, W) of the stored size."""
        frames = torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy()).permute(0, 3, 1, 2)
        self._reader.seek(0)  # otherwise it decodes the rest of the video into memory
        if tuple(frames.shape[2:]) != self._size:
            raise _wrong_frames("decord", self.source)
        return frames

    def close(self) -> None:
        """Close the file."""
        self._reader = None


class PyAVReader:
    """Reads with PyAV: seeks to the last keyframe before a frame and decodes until the timestamp matches.

    Raises `UsageError` if the file is WebP or cannot be opened.
    """

    def __init__(self, source: Source, info: VideoInfo) -> None:
        if info.container == "webp":
            raise UsageError(f"PyAV cannot read {shown(source)}: use data.decoder=pillow")
        self.source, self.info = source, info
        self._stamps, self._entries = info.timestamps, info.entries
        self._lost = {index for first, end in info.lost_ranges for index in range(first, end)}
        self._video = VideoStream(source, info.stream)

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Return the frames `indices` as uint8 (F, 3, H, W) of the display size, or of `size` if it is smaller.

        Raises `LostFramesError` if frames are damaged.
        """
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
        """Return the size to decode at: FFmpeg's scaler is only used to reduce, where it is fast and accurate."""
        shown_size = self.info.size
        return shown_size if size is None or size[0] * size[1] >= shown_size[0] * shown_size[1] else size

    def close(self) -> None:
        """Close the file."""
        self._video.close()


class PillowReader:
    """Reads animated WebP, which FFmpeg cannot decode. Raises `UsageError` for other containers."""

    def __init__(self, source: Source, info: VideoInfo) -> None:
        from PIL import Image

        if info.container != "webp":
            raise UsageError(f"Pillow reads WebP only, not {shown(source)}: use data.decoder=pyav")
        self.source = source
        self._file = open_source(source)
        self._image = Image.open(self._file, formats=["WEBP"])

    def read(self, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Return the frames `indices` as uint8 (F, 3, H, W) of the stored size, composited over white."""
        from PIL import Image

        found = {}
        for index in sorted(set(indices)):
            self._image.seek(index)
            frame = self._image.convert("RGBA")
            found[index] = np.asarray(Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame))[..., :3]
        return stack_frames([found[i] for i in indices])

    def close(self) -> None:
        """Close the file."""
        self._image.close()
        self._file.close()


DECODERS: dict[DecoderName, Callable[[Source, VideoInfo], FrameReader]] = {
    "torchcodec": TorchCodecReader,
    "decord": DecordReader,
    "pyav": PyAVReader,
    "pillow": PillowReader,
}


def suitable_backends(info: VideoInfo) -> list[DecoderName]:
    """Return the backends that read such a file correctly on this machine, fastest first; decord is never included."""
    if info.container == "webp":
        return ["pillow"]
    first: list[DecoderName] = ["torchcodec"] if _suits_torchcodec(info) and not torchcodec_problem() else []
    return [*first, "pyav"]


def suits(name: DecoderName, info: VideoInfo) -> bool:
    """Return whether a backend is available and reads such a file correctly."""
    if name == "decord":
        return _suits_decord(info) and importlib.util.find_spec("decord") is not None
    return name in suitable_backends(info)


@lru_cache(maxsize=1)
def torchcodec_problem() -> str:
    """Decode a test frame and return why torchcodec cannot be used; an empty string if it works."""
    if not importlib.util.find_spec("torchcodec"):
        return "it is not installed"
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(_tiny_clip()).get_frame_at(0)
    except (
        Exception
    ) as error:  # without a shared FFmpeg: RuntimeError, ImportError or OSError, depending on the version
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return ""


def stack_frames(frames: list[np.ndarray]) -> Tensor:
    """Stack uint8 frames (H, W, 3) of one size to (F, 3, H, W)."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _suits_decord(info: VideoInfo) -> bool:
    """Return whether decord reads such a file correctly.

    It picks any of several tracks and assumes simple seeks; its timestamps are wrong in AVI.
    """
    return _suits_torchcodec(info) and info.tracks == 1 and info.codec not in NEWER_THAN_DECORD


def _suits_torchcodec(info: VideoInfo) -> bool:
    """Return whether torchcodec reads such a file correctly.

    Its seeks fail at open groups of pictures, and FFmpeg releases differ in how they round more than 8 bits.
    """
    return info.container in SOUGHT_CONTAINERS and info.plain and info.bits == 8


def _verify_pixels(reader: FrameReader, name: str, source: Source, info: VideoInfo) -> None:
    """Compare the reader's pixels with PyAV's for three frames between keyframes, once per file and process.

    Raises `UsageError` if they differ.
    """
    if info.decoder == name or (source, name) in _verified:
        return
    places = sorted({info.num_frames * part // 7 for part in (1, 3, 6)})
    if info.num_frames > 2:  # use the following frames, because comparing keyframes would not suffice
        places = sorted({min(place + 1, info.num_frames - 1) for place in places})
    right = PyAVReader(source, replace(info, size=info.stored))
    try:
        for place in places:
            around = list(range(max(0, place - 1), min(info.num_frames, place + 2)))
            pictures = right.read(around, None).int()
            errors = (reader.read([place], None).int() - pictures).abs().float().mean((1, 2, 3))
            error = errors[around.index(place)]
            if error > SAME_PIXELS or error > errors.min() + 0.01:
                raise _wrong_frames(name, source)
    except UsageError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error
    finally:
        right.close()
    if not isinstance(source, Buffer):  # it would stay in memory
        _verified.add((source, name))


_verified: set[tuple[Source, str]] = set()


def _wrong_frames(decoder: str, source: Source) -> UsageError:
    return UsageError(f"{decoder} returns other frames of {shown(source)} than PyAV: use data.decoder=pyav")


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
