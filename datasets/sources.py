"""The location of the bytes of a sample: a file, a member of a tar shard, or memory."""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from rin_video.errors import TransientError, UsageError, one_line


@dataclass(frozen=True)
class Member:
    """A file inside a tar shard; it is read in place and never unpacked."""

    shard: Path
    name: str
    offset: int  # position in the shard of the first byte of its content
    size: int  # bytes

    @property
    def suffix(self) -> str:
        """The last extension of the name, with the dot."""
        return os.path.splitext(self.name)[1]

    @property
    def key(self) -> str:
        """The name up to the first dot of its base name, which the files of a sample share, as in WebDataset."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def extension(self) -> str:
        """The part of the name after the key, such as `.mp4` or `.left.mp4`."""
        return self.name[len(self.key) :]

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


@dataclass(frozen=True)
class Buffer:
    """A file in memory."""

    name: str
    content: bytes

    @property
    def suffix(self) -> str:
        """The last extension of the name, with the dot."""
        return os.path.splitext(self.name)[1]

    def __str__(self) -> str:
        return self.name


Source: TypeAlias = Path | Member | Buffer


MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


class Slice(io.RawIOBase):
    """A section of a file as a read-only file object."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position within the section and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        """Return the position within the section."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read bytes into `buffer`, up to the end of the section, and return their number."""
        wanted = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._position += count
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def open_source(source: Source) -> BinaryIO:
    """Open a source for reading. Raises `UsageError` if it is not a regular file (a named pipe would block forever)."""
    if isinstance(source, Buffer):
        return io.BytesIO(source.content)
    path = source.shard if isinstance(source, Member) else source
    if not path.is_file():
        raise UsageError(f"there is no file {shown(path)}")
    try:
        if isinstance(source, Member):
            return io.BufferedReader(Slice(path, source.offset, source.size), 1 << 16)
        return path.open("rb")
    except OSError as error:
        raise TransientError(f"{shown(source)} cannot be read: {error.strerror}") from error


@contextmanager
def as_location(source: Source) -> Iterator[str | BinaryIO]:
    """Yield a source as libraries accept it: an absolute path, which cannot be parsed as a URL, or an open file."""
    if isinstance(source, Path) and _is_utf8(source):
        if not source.is_file():
            raise UsageError(f"there is no file {shown(source)}")
        yield os.path.abspath(source)
    else:
        with open_source(source) as file:
            yield file


def not_media(source: Source) -> str:
    """Return what a file is that is named like an image or clip but is not one, with the remedy; empty if unknown."""
    try:
        with open_source(source) as file:
            head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except (UsageError, OSError):
        return ""
    if not head:
        return "is empty: download the file again"
    if b"/annex/objects/" in head:
        return "is a git-annex pointer, not the file itself: run `git annex get`"
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")) and b"html" in head:
        return "is a web page (HTML), not media: download the file again"
    if head.startswith((b"<?xml", b"{", b"[")):
        return "is text (XML or JSON), perhaps a server error, not media: download the file again"
    return ""


def size_of(source: Source) -> int:
    """Return the size of a source in bytes."""
    if isinstance(source, Buffer):
        return len(source.content)
    return source.size if isinstance(source, Member) else source.stat().st_size


def decode_text(content: bytes) -> str:
    """Decode a short, possibly truncated text as UTF-8, UTF-16 with a byte order mark, or cp1252, and strip it."""
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "ignore").strip()
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        if error.start >= len(content) - 3:  # truncated within a character
            return content[: error.start].decode("utf-8").strip()
        return content.decode("cp1252", "replace").strip()


def shown(source: Source | str) -> str:
    """Return a name of any bytes as one line of printable text."""
    return one_line(source)


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
