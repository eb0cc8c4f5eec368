"""Determines the pictures that a decoder outputs for a video file, which are not always its packets.

All packets are read, and short files are decoded completely. For a long file, the pictures are derived from the packets
if nothing indicates a difference and samples from the beginning, the middle and the end agree. Otherwise it is decoded
completely too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rin_video.datasets.geometry import (
    converted,
    has_alpha,
    is_transparent,
    orientation_of,
    oriented_size,
    stretched_size,
)
from rin_video.datasets.probing import beat
from rin_video.datasets.sources import Source, open_source, shown, size_of
from rin_video.datasets.video_info import (
    MAX_PIXELS,
    VideoInfo,
    check_pixels,
    frames_text,
    is_webp,
    pack_table,
    ranges_of,
)
from rin_video.datasets.video_stream import ALPHA_DECODERS, VideoStream, stamp_of, unreadable, video_streams
from rin_video.errors import UsageError

SCENE_CHANGE = 0.3  # of FFmpeg's scene score, 0 to 1
DECODED_PIXELS = 32_000_000  # a file with fewer pixels over all frames is decoded completely
SAMPLED_FRAMES = 24  # frames decoded at the beginning, middle and end of a longer file
SAME_RATE = 0.02  # tolerated relative difference between the container's frame rate and that of the timestamps
NOT_CODED = 16  # bytes: an MPEG-4 packet up to this size may represent a dropped picture
BROWSERS_DELAY = 100  # milliseconds for a frame of an animation whose delay is 10 or less, as in browsers
PROGRESSIVE = 1  # FFmpeg's field order
HDR = {16: "PQ", 18: "HLG"}  # by FFmpeg's number of the transfer function


def probe_video(source: Source | str, *, cuts: bool = False, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Determine the frames and properties of a video file; `cuts` also decodes all frames to find the scene cuts.

    It always uses PyAV (Pillow for WebP), which is safe before a fork. Raises `UsageError` if the file cannot be read.
    """
    source = Path(source) if isinstance(source, str) else source
    if is_webp(source):
        return _probe_webp(source, max_pixels)
    try:
        packets, index = _walk(source)
        info = _probe(source, packets, index, max_pixels)
        return replace(info, cuts=scene_cuts(source, info)) if cuts else info
    except UsageError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error


def scene_cuts(source: Source, info: VideoInfo) -> tuple[int, ...]:
    """Return the first frame of every scene but the first, according to FFmpeg's scene score."""
    import av

    graph: Any = None
    found = []
    with VideoStream(source, info.stream) as video:
        stamps = info.timestamps
        for count, (stamp, frame) in enumerate(video.pictures()):
            beat()
            if frame is None:
                continue
            small = av.VideoFrame.from_ndarray(converted(frame, "rgb24", (64, 64)), format="rgb24")
            small.pts = count
            if graph is None:
                graph = av.filter.Graph()
                nodes = [
                    graph.add_buffer(width=64, height=64, format="rgb24", time_base=video.stream.time_base),
                    graph.add("select", f"gt(scene\\,{SCENE_CHANGE})"),
                    graph.add("buffersink"),
                ]
                graph.link_nodes(*nodes).configure()
            graph.push(small)
            try:
                graph.pull()
            except (av.BlockingIOError, av.EOFError):  # not a new scene
                continue
            found.append(int(np.searchsorted(stamps, stamp)) if info.trusted else count)
    return tuple(index for index in found if index)


# ---- packets


class Packet(NamedTuple):
    """The properties of a packet; the packets themselves would hold the complete file in memory."""

    stamp: int | None
    dts: int | None
    key: bool
    hidden: bool  # decoded but never displayed: before the start of an edit, or a VP8 reference frame
    size: int  # bytes


def _walk(source: Source) -> tuple[list[Packet], int]:
    """Return the packets of the main video stream, and the number of that stream."""
    with VideoStream(source) as video:
        assert video.index is not None
        first, indices = video.index, [stream.index for stream in video_streams(video.container)]
        packets = _notes(video)
    for other in indices if len(packets) < 2 else ():  # cover art that is not marked as such
        if other != first:
            with VideoStream(source, other) as video:
                if len(notes := _notes(video)) > len(packets):
                    packets, first = notes, other
    if not packets:
        raise UsageError(f"{shown(source)} cannot be read: not one frame can be decoded; leave it out")
    return packets, first


def _notes(video: VideoStream) -> list[Packet]:
    vp8 = video.codec == "vp8"
    return [
        Packet(
            stamp_of(packet),
            packet.dts,
            packet.is_keyframe,
            packet.is_discard or (vp8 and not memoryview(packet)[0] & 0x10),  # the bit show_frame
            packet.size,
        )
        for packet in video.packets()
        if packet is not None and packet.size
    ]


# ---- pictures


@dataclass
class _Decoded:
    """The pictures that decoding output, in order."""

    stamps: list[int | None] = field(default_factory=list)
    keys: set[int] = field(default_factory=set)  # stamps of frames that decode independently
    lost: set[int] = field(default_factory=set)
    gaps: set[int] = field(default_factory=set)  # numbers of the pictures that follow lost ones
    thumbnails: list[bytes] = field(default_factory=list)  # small grey versions, for comparison
    sizes: set[tuple[int, int]] = field(default_factory=set)
    interlaced: bool = False

    def add(self, stamp: int | None, frame: Any) -> None:
        """Record a picture; `frame` is None if it could not be decoded."""
        if frame is None:
            self.gaps.add(len(self.stamps))
            if stamp is not None:
                self.lost.add(stamp)
            return
        self.stamps.append(stamp)
        self.thumbnails.append(_thumbnail(frame))
        self.sizes.add((frame.height, frame.width))
        self.interlaced |= bool(frame.interlaced_frame)
        if stamp is not None and frame.key_frame and int(frame.pict_type) in (0, 1):  # unknown, or I
            self.keys.add(stamp)

    @property
    def ordered(self) -> bool:
        """Whether the stamps are complete and ascending, so that they identify the pictures."""
        stamps = self.stamps
        return None not in stamps and all(a < b for a, b in pairwise(stamps))  # type: ignore[operator]


def _probe(source: Source, packets: list[Packet], index: int, max_pixels: int) -> VideoInfo:
    with VideoStream(source, index) as video:
        stream = video.stream
        check_pixels(source, stream.height, stream.width, max_pixels)
        pictures = video.pictures()
        head = list(islice(((s, f) for s, f in pictures if f is not None), 1))
        if not head:
            raise UsageError(f"{shown(source)} cannot be read: not one frame can be decoded; leave it out")
        frame = head[0][1]
        stored = (frame.height, frame.width)
        check_pixels(source, *stored, max_pixels)
        aspect = float(stream.sample_aspect_ratio or 1)
        size = oriented_size(stretched_size(stored, aspect), orientation := orientation_of(frame))
        check_pixels(source, *size, max_pixels)
        sampled = len(packets) * stored[0] * stored[1] > DECODED_PIXELS and not _doubtful(video, packets, frame)
        rate = float(stream.average_rate or 0)
        tag = video.codec == "vp8" or video.codec == "vp9"
        opaque = tag and video.decoder is stream.codec_context and stream.metadata.get("alpha_mode") == "1"
        info = VideoInfo(
            container=video.container_name,
            codec=video.codec,
            num_frames=0,
            fps=rate,
            size=size,
            orientation=orientation,
            duration=0.0,
            time_base=float(stream.time_base),
            stamps="",
            keys="",
            trusted=True,
            plain=False,
            bits=max((part.bits for part in frame.format.components), default=8),
            stream=index,
            tracks=len(video_streams(video.container)),
            stored=stored,
        )
        notes = _notes_on_first(frame, video, aspect, opaque)
        end = size_of(source)  # PyAV before 15 has no index entries
        missing = sum(entry.pos + entry.size > end for entry in getattr(stream, "index_entries", ()))
        alpha = has_alpha(frame)
    expected = _expected(source, index, packets) if sampled else None
    if expected is not None:
        info = _with_table(info, packets, expected, set(), _entries(packets, None))
        return replace(info, plain=info.plain and not alpha, notes=notes)
    return _from_decoded(source, info, packets, _decode_all(source, index), notes, missing, alpha)


def _from_decoded(
    source: Source,
    info: VideoInfo,
    packets: list[Packet],
    decoded: _Decoded,
    notes: tuple[str, ...],
    missing: int,
    alpha: bool,
) -> VideoInfo:
    """Return the info of a file that was decoded completely."""
    if not decoded.stamps:
        raise UsageError(f"{shown(source)} cannot be read: not one frame can be decoded; leave it out")
    count = len(decoded.stamps)
    decoding = [packet.dts for packet in packets if packet.dts is not None]
    in_turn = all(before <= after for before, after in pairwise(decoding))  # no edit repeats or reorders a part
    if decoded.ordered and in_turn:
        stamps: list[Any] = decoded.stamps
        lost = {stamp for stamp in decoded.lost if stamps[0] < stamp < stamps[-1]}
        info = _with_table(info, packets, sorted({*stamps, *lost}), lost, _entries(packets, decoded.keys))
    if not (
        decoded.ordered and in_turn and _seeks_agree(source, info, dict(zip(stamps, decoded.thumbnails, strict=True)))
    ):
        info = _with_table(info, packets, _fallback_times(decoded, packets, info), set(), [])
        gaps = sorted(gap for gap in decoded.gaps if 0 < gap < count)
        info = replace(info, trusted=False, plain=False, lost=tuple(edge for gap in gaps for edge in (gap, gap)))
        if gaps:
            notes += ("damaged: some of its pictures cannot be decoded, clips avoid them",)
    if decoded.ordered:
        last: Any = decoded.stamps[-1]
        tail = max(missing, sum(stamp > last for stamp in decoded.lost))
        if tail:
            notes += (f"truncated: only the first {info.num_frames} of {info.num_frames + tail} frames",)
    if info.lost and info.trusted:
        notes += (f"damaged: {frames_text(info.lost_ranges)} cannot be decoded, clips avoid them",)
    if decoded.interlaced:
        notes += ("interlaced: moving edges show combing",)
    if len(decoded.sizes) > 1:
        sizes = ", ".join(f"{H}x{W}" for H, W in sorted(decoded.sizes))
        notes += (f"size changes: {sizes}, all frames are scaled to {info.size[0]}x{info.size[1]}",)
    plain = info.plain and not alpha and not decoded.interlaced and len(decoded.sizes) == 1 and len(packets) == count
    plain = plain and len(info.entries) == sum(
        packet.key for packet in packets
    )  # of a container with a table of keyframes
    return replace(info, plain=plain, notes=notes)


def _with_table(
    info: VideoInfo, packets: list[Packet], stamps: list[int], lost: set[int], entries: list[int]
) -> VideoInfo:
    """Return `info` with the frames, rate, duration, entries and damage filled in."""
    table = np.array(stamps, dtype=np.int64)
    count, rate = len(table), info.fps
    length = float(table[-1] - table[0]) * info.time_base
    step = float(np.median(np.diff(table))) * info.time_base if count > 1 and length > 0 else 1 / (rate or 1.0)
    average = count / (length + step)
    # A GIF's rate is a guess from its first frames; a container without a duration may report its time base instead.
    if info.container == "gif" or not rate or abs(rate / average - 1) > SAME_RATE:
        rate = average
    spoilt = [i for i, stamp in enumerate(stamps) if stamp in lost]
    return replace(
        info,
        num_frames=count,
        fps=rate,
        duration=length + step,
        stamps=pack_table(table),
        keys=pack_table(entries),
        plain=info.orientation == 0 and not lost and _simple(packets, stamps),
        lost=tuple(edge for pair in ranges_of(spoilt) for edge in pair),
    )


def _simple(packets: list[Packet], stamps: list[int]) -> bool:
    """Return whether every packet is a picture and every seek is exact, as simple decoders assume."""
    packet_stamps = [packet.stamp for packet in packets]
    if None in packet_stamps or any(packet.hidden for packet in packets) or sorted(packet_stamps) != list(stamps):  # type: ignore
        return False
    keys = [i for i, packet in enumerate(packets) if packet.key]
    if not keys or keys[0]:
        return False
    # Containers seek by decoding times: the next keyframe may be decoded before this one is displayed.
    for key, following in pairwise(keys):
        if packets[following].dts is None or packets[following].dts <= packets[key].stamp:  # type: ignore[operator]
            return False
    return bool(np.array_equal(np.searchsorted(stamps, [packet_stamps[i] for i in keys]), keys))  # type: ignore[arg-type]


def _entries(packets: list[Packet], alone: set[int] | None) -> list[int]:
    """Return the stamps of the keyframe packets; with `alone`, of displayed ones only if their stamp is in it."""
    return sorted(
        {p.stamp for p in packets if p.key and p.stamp is not None and (alone is None or p.hidden or p.stamp in alone)}
    )


def _doubtful(video: VideoStream, packets: list[Packet], frame: Any) -> bool:
    """Return whether the packets may differ from the pictures."""
    stamps = [packet.stamp for packet in packets if not packet.hidden]
    decoding = [packet.dts for packet in packets if packet.dts is not None]
    return (
        not stamps
        or any(after < before for before, after in pairwise(decoding))  # edits repeat or reorder a part
        or None in stamps
        or len(set(stamps)) < len(stamps)
        or not any(packet.key for packet in packets)
        or bool(frame.interlaced_frame)
        or (video.codec == "h264" and getattr(video.decoder, "field_order", PROGRESSIVE) != PROGRESSIVE)
        or (video.codec == "mpeg4" and min(packet.size for packet in packets) <= NOT_CODED)
        or (video.container_name == "avi" and bool(video.decoder.has_b_frames))  # its timestamps are decoding times
        or video.container_name in ("mpegts", "mpeg")  # a parser splits the packets
    )


def _expected(source: Source, index: int, packets: list[Packet]) -> list[int] | None:
    """Return the stamps of the pictures as derived from the packets, or None if decoded samples disagree."""
    stamps: list[Any] = sorted(packet.stamp for packet in packets if not packet.hidden)  # type: ignore[type-var]
    entries = np.array(_entries(packets, None))
    first = None
    with VideoStream(source, index) as video:
        for start in (None, int(entries[len(entries) // 2]), int(entries[-1])):
            sample = _Decoded()
            for stamp, frame in video.pictures_from(start, entries):
                if start is None or (stamp is not None and stamp >= start):
                    sample.add(stamp, frame)
                if len(sample.stamps) >= SAMPLED_FRAMES:
                    break
            if not sample.stamps or not sample.ordered or sample.lost or sample.interlaced or len(sample.sizes) > 1:
                return None
            if first is None:
                first = sample.stamps[0]
                stamps = [stamp for stamp in stamps if stamp >= first]  # earlier ones refer to missing frames
            elif start is not None and start >= first and not (sample.stamps[0] == start and start in sample.keys):
                return None
            place = int(np.searchsorted(stamps, sample.stamps[0]))  # type: ignore[arg-type]
            if stamps[place : place + len(sample.stamps)] != sample.stamps:
                return None
    return stamps


def _decode_all(source: Source, index: int) -> _Decoded:
    found = _Decoded()
    with VideoStream(source, index) as video:
        for stamp, frame in video.pictures():
            found.add(stamp, frame)
    return found


def _seeks_agree(source: Source, info: VideoInfo, thumbnails: dict[int, bytes]) -> bool:
    """Return whether seeking finds the same pictures as sequential decoding, at three entries and at the end."""
    stamps, entries = info.timestamps, info.entries
    if len(entries) < 2:
        return True
    places = {len(entries) // 2, 1, len(entries) - 1}
    behind = [int(np.searchsorted(stamps, entries[place])) for place in places]
    indices = sorted({min(i + step, len(stamps) - 1) for i in behind for step in (0, 3)} | {len(stamps) - 1})
    indices = [i for i in indices if int(stamps[i]) in thumbnails]
    with VideoStream(source, info.stream) as video:
        for index in indices:
            for _, frame in video.find([index], stamps, entries, seekable=True):
                if frame is None or _thumbnail(frame) != thumbnails[int(stamps[index])]:
                    return False
    return True


def _fallback_times(decoded: _Decoded, packets: list[Packet], info: VideoInfo) -> list[int]:
    """Return ascending times for pictures whose own timestamps are missing or out of order."""
    count = len(decoded.stamps)
    stamps = {stamp for stamp in decoded.stamps if stamp is not None}
    if len(stamps) == count:
        return sorted(stamps)
    decoding = sorted({packet.dts for packet in packets if packet.dts is not None})
    if len(decoding) == count:
        return decoding
    return np.rint(np.arange(count) / ((info.fps or 1.0) * info.time_base)).astype(int).tolist()


def _notes_on_first(frame: Any, video: VideoStream, aspect: float, opaque: bool) -> tuple[str, ...]:
    notes: list[str] = []
    if name := HDR.get(int(getattr(video.decoder, "color_trc", 0) or 0)):
        notes.append(f"HDR: {name}, colours are not tone-mapped and look flat")
    if stretched_size((frame.height, frame.width), aspect) != (frame.height, frame.width):
        notes.append(f"pixel aspect: {aspect:.3g}, the width is scaled by that, as in players")
    if opaque:
        notes.append(f"transparency lost: this FFmpeg has no {ALPHA_DECODERS[video.codec]}")
    elif is_transparent(frame):
        notes.append("transparent: composited over white")
    return tuple(notes)


def _thumbnail(frame: Any) -> bytes:
    return converted(frame, "gray", (16, 16)).tobytes()


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
                delay = round(image.info.get("duration", 0))
                now += delay if delay > 10 else BROWSERS_DELAY
            size = (image.height, image.width)
    except UsageError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error
    return VideoInfo(
        "webp", "webp", len(stamps), 1000 * len(stamps) / now, size, 0, now / 1000, 1e-3,
        pack_table(stamps), pack_table([0]), trusted=True, plain=False,
    )  # fmt: skip
