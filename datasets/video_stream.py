"""The video stream of a file: its selection, its packets and pictures, and seeking.

Packets are not pictures: some are never displayed, some contain one field of a picture, some cannot be decoded. A
picture is identified by its *stamp*, the presentation time in units of the stream's time base. Decoding starts at
*entries*, the stamps of keyframe packets, whether these are displayed or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np

from rin_video.datasets.sources import Source, as_location, not_media, shown
from rin_video.errors import UsageError, first_line

# FFmpeg's full names of the supported containers; no other format is tried, because FFmpeg would also guess raw codecs
# from random bytes or read playlists that refer to other files. Pillow reads WebP.
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
# Decoders that check `skip_frame` for every packet; others, such as dav1d for AV1, read it once when they are opened.
SKIPPING = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these drop the alpha channel
ATTACHED_PICTURE, TIMED_THUMBNAILS = 0x400, 0x800  # FFmpeg's dispositions
UNALIGNED = 1  # FFmpeg's flag: crop exactly as the stream's header specifies, not only by multiples of 32 pixels
SEEKS = 3  # earlier entries to seek to before reading from the beginning

_ONLY_KNOWN = {"format_whitelist": ",".join(CONTAINERS.values()), "protocol_whitelist": "file"}


class VideoStream:
    """An open video stream, as a context manager; `index` is its number in the file, by default the best one.

    Raises `UsageError` if the file has no supported stream.
    """

    def __init__(self, source: Source, index: int | None = None) -> None:
        self.source, self.index = source, index
        self._open()

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec."""
        return self.stream.codec_context.codec.canonical_name

    @property
    def container_name(self) -> str:
        """FFmpeg's name of the container, a key of CONTAINERS."""
        return self.container.format.name.split(",")[0]

    def packets(self) -> Iterator[Any]:
        """Yield the packets from the current position; the last one is empty.

        If the container is damaged or truncated, the last one is None.
        """
        import av

        try:
            yield from self.container.demux(self.stream)
        except av.FFmpegError:
            yield None

    def pictures(
        self, packets: Iterator[Any] | None = None, needed: set[int] | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (stamp, frame) of the displayed pictures, in order; the frame is None if it is damaged.

        Damage lasts until the next keyframe. Pictures that are not in `needed`, and to which no other picture refers,
        may be skipped without decoding.
        """
        import av

        begun = damaged = corrupt = False
        after: int | None = (
            None  # the keyframe that ended the damage; pictures displayed before it refer to damaged ones
        )
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
                if begun and not at_end:  # the first pictures may refer to missing frames
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
        """Yield `pictures` starting at the keyframe `entry`, one of the ascending `entries`; None: at the beginning."""
        return self.pictures(self._packets_from(entry, entries), needed)

    def find(
        self, indices: Sequence[int], stamps: np.ndarray, entries: np.ndarray, *, seekable: bool, skip: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, frame) of the pictures `indices`, ascending; the frame is None if it cannot be decoded.

        `stamps` are the stamps of all pictures, `entries` the stamps at which decoding can start; both are ascending.
        If not `seekable`, the decodable pictures are counted from the beginning.
        """
        wanted = sorted(set(indices))
        needed = set(stamps[wanted].tolist()) if skip else None
        while wanted:
            # Decode all wanted pictures in one pass, until there is an entry between two of them to seek to.
            entry = _entry_before(entries, stamps[wanted[0]]) if seekable else None
            if seekable:
                found = self._indexed(self.pictures_from(entry, entries, needed), stamps)
            else:
                found = enumerate(frame for _, frame in self.pictures_from(None, entries) if frame is not None)
            spoilt = set()
            for index, frame in found:
                if frame is None and seekable:  # may be reported before earlier pictures are output
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
        """Return the packets starting at the keyframe `entry`, even if the container's own seek is not exact."""
        import av

        if entry is None:
            return self._from_beginning()
        # Containers seek by decoding times, or imprecisely: try earlier positions until the entry is ahead.
        place = int(np.searchsorted(entries, entry))
        for target in entries[max(0, place - SEEKS) : place + 1][::-1].tolist():
            try:
                self.container.seek(target, stream=self.stream)
            except av.FFmpegError:  # a truncated file may have lost its index
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
                    f"{shown(self.source)} cannot be read as a clip: it contains {_content(self.container)}, "
                    f"not one of {', '.join(CODECS)}"
                )
            self.stream, self.index = stream, stream.index
            self.decoder = _alpha_decoder(stream) or stream.codec_context
            self.decoder.thread_count = 1  # many processes read at the same time
            self.decoder.flags |= UNALIGNED
        except BaseException:
            self._stack.close()
            raise


def stamp_of(packet: Any) -> int | None:
    """Return the presentation time of a packet, or its decoding time if it has none."""
    return packet.dts if packet.pts is None else packet.pts


@contextmanager
def open_container(source: Source) -> Iterator[Any]:
    """Open a supported container with PyAV. Raises `UsageError` if that fails."""
    import av

    with as_location(source) as location:
        try:
            # Tags may have any encoding and are not used. PyAV 19 replaces what is not UTF-8 by itself.
            tags: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
            container = av.open(location, options=_ONLY_KNOWN, **tags)
        except Exception as error:
            raise unreadable(source, error) from error
        with container:
            yield container


def video_streams(container: Any) -> list[Any]:
    """Return the video streams with a supported codec, without cover art and thumbnails."""
    return [
        stream
        for stream in container.streams.video
        if not int(stream.disposition) & (ATTACHED_PICTURE | TIMED_THUMBNAILS) and _codec_of(stream) in CODECS
    ]


def best_stream(container: Any) -> Any:
    """Return the video stream that FFmpeg considers best, otherwise the largest; None if there is none."""
    streams = video_streams(container)
    best = container.streams.best("video")
    if best is not None and best.index in [stream.index for stream in streams]:
        return best
    return max(streams, key=lambda stream: stream.width * stream.height, default=None)


def unreadable(source: Source, error: Exception) -> UsageError:
    """Return the error for a file that cannot be read, with the cause and the remedy."""
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
    """Return a decoder that keeps the alpha channel of a VP8 or VP9 stream, or None if it has none."""
    import av

    name = ALPHA_DECODERS.get(_codec_of(stream))
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if name is None or tags.get("alpha_mode") != "1":
        return None
    try:
        decoder: Any = av.CodecContext.create(name, "r")
    except Exception:  # FFmpeg without libvpx; the probe reports it
        return None
    decoder.extradata = stream.codec_context.extradata
    return decoder


def _entry_before(entries: np.ndarray, stamp: int) -> int | None:
    place = int(np.searchsorted(entries, stamp, side="right"))
    return int(entries[place - 1]) if place else None


def _jumps(entries: np.ndarray, following: int, wanted: int) -> bool:
    """Return whether an entry lies after the next picture and not after the wanted one, so that seeking is cheaper."""
    entry = _entry_before(entries, wanted)
    return entry is not None and entry > following


def _skip_to(packets: Iterator[Any], entry: int) -> Any:
    """Read packets until the keyframe with that stamp; return it, or None if it was passed or the packets end."""
    for packet in packets:
        if packet is None or not packet.size:
            return None
        if packet.is_keyframe and stamp_of(packet) == entry:
            return packet
        if packet.dts is not None and packet.dts > entry:
            return None
    return None
