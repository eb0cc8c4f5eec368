"""One video stream of a file: which one, its packets, its pictures, and how any of them is found again.

Packets are not pictures: some are never shown, some hold one field of a picture, some cannot be decoded. A picture is
known by its *stamp*, the presentation time in units of the stream's time base; decoding starts at *entries*, the stamps
of keyframe packets, whether these are shown or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np

from rin_video.datasets.sources import Source, as_location, not_media, shown
from rin_video.errors import UsageError, first_line

# FFmpeg's full names of the containers that are clips; it guesses raw codecs from random bytes, reads play lists that
# name other files, and more. Nothing outside this list is even tried. WebP is Pillow's.
CONTAINERS = {
    "mov": "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska": "matroska,webm",
    "avi": "avi",
    "gif": "gif",
    "mpegts": "mpegts",
    "mpeg": "mpeg",
    "asf": "asf",
    "ogg": "ogg",
    "flv": "flv",
}
CODECS = (
    "h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg1video", "mpeg2video", "h263", "msmpeg4v1", "msmpeg4v2",
    "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "mjpeg", "gif", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff",
    "theora", "png", "rawvideo", "qtrle", "cinepak", "flv1", "svq1", "svq3", "dvvideo",
)  # fmt: skip
# Decoders that read `skip_frame` for every packet; others, such as dav1d for AV1, read it once, when they are opened.
SKIPPING = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these drop the alpha channel
ATTACHED_PICTURE, TIMED_THUMBNAILS = 0x400, 0x800  # FFmpeg's dispositions
UNALIGNED = 1  # FFmpeg's flag: crop as the stream's header says, not only by multiples of 32 pixels
SEEKS = 3  # entries before the wanted one that a seek tries before it reads from the beginning

_ONLY_KNOWN = {"format_whitelist": ",".join(CONTAINERS.values()), "protocol_whitelist": "file"}


class VideoStream:
    """An open video stream. A context manager. UsageError where the file holds none that we read."""

    def __init__(self, source: Source, index: int | None = None) -> None:
        self.source, self.index = source, index
        self._open()

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def codec(self) -> str:
        return self.stream.codec_context.codec.canonical_name

    @property
    def container_name(self) -> str:
        return self.container.format.name.split(",")[0]

    def packets(self) -> Iterator[Any]:
        """The packets from here on; the last one is empty. A container that is damaged or cut off ends there."""
        import av

        try:
            yield from self.container.demux(self.stream)
        except av.FFmpegError:
            yield None

    def pictures(
        self, packets: Iterator[Any] | None = None, needed: set[int] | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """(stamp, frame) of what is shown, in order; the frame is None where damage spoils it.

        Damage lasts until the next keyframe. Pictures that are not in `needed`, and that no other builds on, may be
        passed over without being decoded.
        """
        import av

        begun = damaged = corrupt = False
        after: int | None = None  # the keyframe that ended the damage: what is shown before it refers back
        lost: set[int] = set()
        skip = needed is not None and self.decoder.codec.name in SKIPPING
        for packet in self.packets() if packets is None else packets:
            at_end = packet is None or not packet.size
            stamp = None if at_end else stamp_of(packet)
            if not at_end and stamp is not None:
                if packet.is_keyframe:
                    after, damaged = (stamp if damaged else None), False
                elif damaged or (after is not None and stamp < after):
                    lost.add(stamp)
            if skip:
                wanted = stamp is None or stamp in needed  # type: ignore[operator]
                self.decoder.skip_frame = "DEFAULT" if wanted else "NONREF"
            try:
                frames = self.decoder.decode(None if at_end else packet)
            except av.EOFError:
                frames = []
            except av.FFmpegError:
                frames = []
                if begun and not at_end:  # before that, what refers to frames that are not there
                    damaged = True
                    if stamp is not None and not packet.is_discard:
                        lost.add(stamp)
                        yield stamp, None
            for frame in frames:
                begun = True
                corrupt = frame.is_corrupt or (corrupt and not frame.key_frame)
                yield frame.pts, None if corrupt or frame.pts in lost else frame
            if at_end:
                return

    def pictures_from(
        self, entry: int | None, entries: np.ndarray, needed: set[int] | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """`pictures` decoded from the keyframe `entry` on, one of the ascending `entries`; None: from the beginning."""
        return self.pictures(self._packets_from(entry, entries), needed)

    def find(
        self, indices: Sequence[int], stamps: np.ndarray, entries: np.ndarray, *, seekable: bool, skip: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """(index, frame) of the pictures `indices`, ascending; None for one that cannot be decoded.

        `stamps` are those of all pictures, `entries` where decoding can start; both ascending. Without `seekable`,
        the pictures that damage has left are counted from the beginning.
        """
        wanted = sorted(set(indices))
        needed = set(stamps[wanted].tolist()) if skip else None
        while wanted:
            # One run of decoding serves every wanted picture up to a gap that holds an entry to jump to.
            entry = _entry_before(entries, stamps[wanted[0]]) if seekable else None
            if seekable:
                found = self._indexed(self.pictures_from(entry, entries, needed), stamps)
            else:
                found = enumerate(frame for _, frame in self.pictures_from(None, entries) if frame is not None)
            spoilt = set()
            for index, frame in found:
                if frame is None and seekable:  # perhaps told before earlier ones are shown
                    spoilt.add(index)
                    continue
                while wanted and wanted[0] < index:
                    yield wanted.pop(0), None
                if wanted and wanted[0] == index:
                    yield wanted.pop(0), None if index in spoilt else frame
                    following = stamps[min(index + 1, len(stamps) - 1)]
                    if not wanted or (seekable and _jumps(entries, following, stamps[wanted[0]])):
                        break
                elif not wanted:
                    break
            else:
                yield from ((index, None) for index in wanted)
                return

    def _indexed(self, pictures: Iterator[tuple[Any, Any]], stamps: np.ndarray) -> Iterator[tuple[int, Any]]:
        for stamp, frame in pictures:
            if stamp is not None:
                index = int(np.searchsorted(stamps, stamp))
                if index < len(stamps) and stamps[index] == stamp:
                    yield index, frame

    def _packets_from(self, entry: int | None, entries: np.ndarray) -> Iterator[Any]:
        """Packets beginning with the keyframe `entry`, wherever the container's own seek ends."""
        import av

        if entry is None:
            return self._from_beginning()
        # Containers are sought by decoding times, or roughly: try earlier places until the entry lies ahead.
        place = int(np.searchsorted(entries, entry))
        for target in entries[max(0, place - SEEKS) : place + 1][::-1].tolist():
            try:
                self.container.seek(target, stream=self.stream)
            except av.FFmpegError:  # a file cut short may have lost its index
                break
            if self.decoder.is_open:
                self.decoder.flush_buffers()
            packets = self.packets()
            if first := _skip_to(packets, entry):
                return chain([first], packets)
        packets = self._from_beginning()
        first = _skip_to(packets, entry)
        return chain([first], packets) if first else self._from_beginning()

    def _from_beginning(self) -> Iterator[Any]:
        self.close()
        self._open()
        return self.packets()

    def _open(self) -> None:
        self._stack = ExitStack()
        self.container = self._stack.enter_context(open_container(self.source))
        try:
            stream: Any = self.container.streams[self.index] if self.index is not None else best_stream(self.container)
            if stream is None:
                raise UsageError(
                    f"{shown(self.source)} cannot be read as a clip: it holds {_content(self.container)}, "
                    f"not one of {', '.join(CODECS)}"
                )
            self.stream, self.index = stream, stream.index
            self.decoder = _alpha_decoder(stream) or stream.codec_context
            self.decoder.thread_count = 1  # the processes that read are many
            self.decoder.flags |= UNALIGNED
        except BaseException:
            self._stack.close()
            raise


def stamp_of(packet: Any) -> int | None:
    return packet.dts if packet.pts is None else packet.pts


@contextmanager
def open_container(source: Source) -> Iterator[Any]:
    """An open PyAV container of a kind that we know. UsageError where it is none."""
    import av

    with as_location(source) as location:
        try:
            # Tags may be of any encoding, and nobody reads them.
            container = av.open(location, options=_ONLY_KNOWN, metadata_errors="replace")
        except Exception as error:
            raise unreadable(source, error) from error
        with container:
            yield container


def video_streams(container: Any) -> list[Any]:
    """The video streams that may be a film: no cover art, no thumbnails, a codec that we know."""
    return [
        stream
        for stream in container.streams.video
        if not int(stream.disposition) & (ATTACHED_PICTURE | TIMED_THUMBNAILS) and _codec_of(stream) in CODECS
    ]


def best_stream(container: Any) -> Any:
    """The film among the streams, by FFmpeg's choice; else the largest; None where there is none."""
    streams = video_streams(container)
    best = container.streams.best("video")
    if best is not None and best.index in [stream.index for stream in streams]:
        return best
    return max(streams, key=lambda stream: stream.width * stream.height, default=None)


def unreadable(source: Source, error: Exception) -> UsageError:
    if what := not_media(source):
        return UsageError(f"{shown(source)} {what}")
    cause = getattr(error, "strerror", None) or first_line(error)
    return UsageError(f"{shown(source)} cannot be read: {shown(cause)}; re-encode it or leave it out")


def _codec_of(stream: Any) -> str:
    context = stream.codec_context
    return context.codec.canonical_name if context is not None else "an unknown codec"


def _content(container: Any) -> str:
    codecs = [_codec_of(stream) for stream in container.streams.video]
    return ", ".join(codecs) or "no video"


def _alpha_decoder(stream: Any) -> Any:
    """The decoder that keeps the alpha channel of a VP8 or VP9 stream that has one; else None."""
    import av

    name = ALPHA_DECODERS.get(_codec_of(stream))
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if name is None or tags.get("alpha_mode") != "1":
        return None
    try:
        decoder: Any = av.CodecContext.create(name, "r")
    except Exception:  # an FFmpeg without libvpx; the probe says it
        return None
    decoder.extradata = stream.codec_context.extradata
    return decoder


def _entry_before(entries: np.ndarray, stamp: int) -> int | None:
    place = int(np.searchsorted(entries, stamp, side="right"))
    return int(entries[place - 1]) if place else None


def _jumps(entries: np.ndarray, following: int, wanted: int) -> bool:
    """Whether there is an entry after the next picture and up to the wanted one: cheaper than decoding on."""
    entry = _entry_before(entries, wanted)
    return entry is not None and entry > following


def _skip_to(packets: Iterator[Any], entry: int) -> Any:
    """The keyframe packet of that stamp; None where the packets have passed it, or end."""
    for packet in packets:
        if packet is None or not packet.size:
            return None
        if packet.is_keyframe and stamp_of(packet) == entry:
            return packet
        if packet.dts is not None and packet.dts > entry:
            return None
    return None
