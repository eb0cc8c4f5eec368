"""What a video file holds, found by walking through its packets: the counts in container headers are often wrong."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rin_video.datasets.sources import Source, as_location, open_source, shown
from rin_video.errors import UsageError, first_line

# FFmpeg's full names of the containers that are clips; it guesses raw codecs from random bytes, reads play lists that
# name other files, and more. Nothing outside this list is even tried. WebP is Pillow's.
CONTAINERS = {
    "mov": "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska": "matroska,webm",
    "avi": "avi",
    "gif": "gif",
}
CODECS = (
    "h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg1video", "mpeg2video", "h263", "msmpeg4v2", "msmpeg4v3",
    "mjpeg", "gif", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "theora", "png", "rawvideo", "qtrle", "cinepak",
)  # fmt: skip
MAX_PIXELS = 100_000_000  # of one frame or image: more is taken for a bomb
SCENE_CHANGE = 0.3  # of FFmpeg's scene score, 0 to 1


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, as its packets tell it. The tables are packed, since an index keeps many of these."""

    container: str  # one of CONTAINERS, or webp
    codec: str
    num_frames: int
    fps: float  # average over the file
    size: tuple[int, int]  # (H, W) as shown, after rotation
    quarter_turns: int  # counter-clockwise turns of 90 degrees from the stored to the shown frame
    duration: float  # seconds from the first frame to the end of the last
    time_base: float  # seconds of one unit of the stamps
    stamps: str  # packed: presentation times of the frames, ascending
    keys: str  # packed: indices of the frames that decoding can start from, ascending
    trusted: bool  # the stamps are what the decoder will say; else frames are counted from the beginning
    plain_seek: bool  # seeking to the time of a keyframe ends at that keyframe
    bits: int = 8  # of a sample of one channel
    decoder: str = ""  # the first of the backends that read it when it was indexed
    cuts: tuple[int, ...] | None = None  # frames that begin another scene; None: not looked for

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
    def keyframes(self) -> np.ndarray:
        """(K,) indices of the frames that decoding can start from, ascending."""
        return unpack_table(self.keys)


def pack_table(values: Any) -> str:
    """Ascending whole numbers as a short text: regular ones take some 20 characters."""
    steps = np.diff(np.asarray(values, dtype="<i8"), prepend=0)
    return b85encode(zlib.compress(steps.tobytes(), 6)).decode()


def unpack_table(text: str) -> np.ndarray:
    """(N,) int64, as they were packed."""
    return np.cumsum(np.frombuffer(zlib.decompress(b85decode(text)), dtype="<i8"))


def probe_video(source: Source | str, *, cuts: bool = False, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What a clip holds: one pass over its packets, one decoded frame, all of them to look for `cuts`.

    Always with PyAV (Pillow for WebP), safe before a fork. Raises UsageError where it cannot be read.
    """
    source = Path(source) if isinstance(source, str) else source
    if is_webp(source):
        return _probe_webp(source, max_pixels)
    with open_container(source) as container:
        stream = container.streams.video[0]
        check_pixels(source, stream.height, stream.width, max_pixels)
        try:
            # Notes on the packets, not the packets: together those are the whole file.
            packets = [
                (packet.pts, packet.dts, packet.is_keyframe)
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard
            ]
            with open_container(source) as again:
                frame = next(again.decode(video=0))
        except StopIteration:
            raise UsageError(f"{shown(source)} cannot be read: not one frame can be decoded; leave it out") from None
        except UsageError:
            raise
        except Exception as error:
            raise unreadable(source, error) from error
        name, rate = _short_name(container), float(stream.average_rate or 0)
        bits = max((part.bits for part in frame.format.components), default=8)
        codec, time_base = stream.codec_context.codec.canonical_name, float(stream.time_base)

    check_pixels(source, frame.height, frame.width, max_pixels)
    turns = round(frame.rotation / 90) % 4
    size = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    found = scene_cuts(source) if cuts else None
    stamps = [pts for pts, _, _ in packets]
    keys = [index for index, (_, _, is_keyframe) in enumerate(packets) if is_keyframe]
    # The times in AVI are those of decoding, not of showing; and a missing or repeated time finds no frame.
    if name == "avi" or not keys or None in stamps or len(set(stamps)) < len(stamps):
        fps, count = rate or 1.0, len(stamps)
        return VideoInfo(
            name, codec, count, fps, size, turns, count / fps, 1 / fps,
            pack_table(range(count)), pack_table([0]), trusted=False, plain_seek=False, bits=bits, cuts=found,
        )  # fmt: skip
    ascending = np.array(sorted(stamps), dtype=np.int64)
    length = float(ascending[-1] - ascending[0]) * time_base
    if name == "gif" or not rate:  # for a GIF the container's rate is a guess from its first frames
        rate = (len(stamps) - 1) / length if len(stamps) > 1 else 1.0
    keyframes = np.searchsorted(ascending, sorted(stamps[key] for key in keys))
    # Containers are sought by decoding times: the next keyframe may be decoded before this one is shown.
    decoded = [dts for _, dts, _ in packets]
    overtaken = any(decoded[later] is None or decoded[later] <= stamps[key] for key, later in pairwise(keys))
    plain_seek = keyframes.tolist() == keys and not overtaken
    return VideoInfo(
        name, codec, len(stamps), rate, size, turns, length + 1 / rate, time_base,
        pack_table(ascending), pack_table(keyframes), trusted=True, plain_seek=plain_seek, bits=bits, cuts=found,
    )  # fmt: skip


def scene_cuts(source: Source) -> tuple[int, ...]:
    """The frames that begin another scene, by FFmpeg's scene score."""
    import av

    with open_container(source) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(template=stream),
            graph.add("scale", "64:64"),
            graph.add("select", f"gt(scene\\,{SCENE_CHANGE})"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        found = []
        for index, frame in enumerate(container.decode(stream)):
            graph.push(frame)
            try:
                graph.pull()
            except (av.BlockingIOError, av.EOFError):  # not a new scene
                continue
            found.append(index)
    return tuple(index for index in found if index)


@contextmanager
def open_container(source: Source) -> Iterator[Any]:
    """An open PyAV container of a kind that we know. UsageError where it is none."""
    import av

    with as_location(source) as location:
        try:
            container = av.open(location, options=_ONLY_KNOWN)
        except Exception as error:
            raise unreadable(source, error) from error
        with container:
            videos = container.streams.video
            codec = videos[0].codec_context.codec.canonical_name if videos else "no video"
            if not videos or codec not in CODECS:
                raise UsageError(
                    f"{shown(source)} cannot be read as a clip: it holds {codec}, not one of {', '.join(CODECS)}"
                )
            videos[0].codec_context.thread_count = 1  # the processes that read are many
            yield container


_ONLY_KNOWN = {"format_whitelist": ",".join(CONTAINERS.values()), "protocol_whitelist": "file"}


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


def unreadable(source: Source, error: Exception) -> UsageError:
    cause = getattr(error, "strerror", None) or first_line(error)
    return UsageError(f"{shown(source)} cannot be read: {shown(cause)}; re-encode it or leave it out")


def _probe_webp(source: Source, max_pixels: int) -> VideoInfo:
    from PIL import Image

    try:
        with open_source(source) as file, Image.open(file, formats=["WEBP"]) as image:
            check_pixels(source, image.height, image.width, max_pixels)
            stamps, now = [], 0
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()
                stamps.append(now)
                now += max(1, round(image.info.get("duration", 0)))
            size = (image.height, image.width)
    except UsageError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error
    return VideoInfo(
        "webp", "webp", len(stamps), 1000 * len(stamps) / now, size, 0, now / 1000, 1e-3,
        pack_table(stamps), pack_table([0]), trusted=True, plain_seek=False,
    )  # fmt: skip


def _short_name(container: Any) -> str:
    return container.format.name.split(",")[0]
