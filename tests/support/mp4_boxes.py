"""Edits of MP4 files that no available encoder makes, for files whose index comes last, as PyAV writes them."""

import struct
from collections.abc import Callable, Sequence


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def with_edits(content: bytes, edits: Sequence[tuple[int, int]]) -> bytes:
    """Replace the edit list: (duration in 1/1000 s, first time in units of the track) for each part."""
    entries = b"".join(struct.pack(">IiI", duration, time, 0x10000) for duration, time in edits)
    new = box(b"edts", box(b"elst", struct.pack(">II", 0, len(edits)) + entries))
    content = _changed(content, (b"moov", b"trak", b"edts"), lambda body: None)
    return _changed(content, (b"moov", b"trak", b"tkhd"), lambda body: box(b"tkhd", body) + new)


def with_matrix(content: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Replace the display matrix: x' = a x + c y, y' = b x + d y."""
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    matrix = struct.pack(">9i", *values)
    return _changed(content, (b"moov", b"trak", b"tkhd"), lambda body: box(b"tkhd", body[:40] + matrix + body[76:]))


def without(content: bytes, kind: bytes) -> bytes:
    """Replace a box with one that readers skip."""
    place = content.rindex(kind)
    return content[:place] + b"free" + content[place + 4 :]


def _changed(data: bytes, path: Sequence[bytes], change: Callable[[bytes], bytes | None]) -> bytes:
    parts, place = [], 0
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + size]
        if kind != path[0]:
            parts.append(data[place : place + size])
        elif len(path) > 1:
            parts.append(box(kind, _changed(body, path[1:], change)))
        else:
            parts.append(change(body) or b"")
        place += size
    return b"".join(parts)
