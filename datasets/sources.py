"""Where the bytes of a sample lie: a file of its own, or a member of a tar shard."""

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
    """A file inside a tar shard, which is read in place: nothing is ever unpacked."""

    shard: Path
    name: str
    offset: int  # of the first byte of its content in the shard
    size: int  # bytes

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    @property
    def key(self) -> str:
        """What the files of one sample share, as WebDataset has it: the name up to the first dot behind the folders."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def extension(self) -> str:
        """What follows the key: `.mp4`, `.left.mp4`."""
        return self.name[len(self.key) :]

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


@dataclass(frozen=True)
class Buffer:
    """A file that is in memory already."""

    name: str
    content: bytes

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    def __str__(self) -> str:
        return self.name


Source: TypeAlias = Path | Member | Buffer


MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


class Slice(io.RawIOBase):
    """A stretch of a file as a file of its own, for reading."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_source(source: Source) -> BinaryIO:
    """The bytes of a source, for reading. UsageError where it is no regular file (a pipe would wait for ever)."""
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
    """What libraries take: a path that no protocol or option can be read into, or else an open file."""
    if isinstance(source, Path) and _is_utf8(source):
        if not source.is_file():
            raise UsageError(f"there is no file {shown(source)}")
        yield os.path.abspath(source)
    else:
        with open_source(source) as file:
            yield file


def not_media(source: Source) -> str:
    """What a file is that bears the name of a picture or a clip and is none, with the remedy; empty where unknown."""
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
        return "is text (XML or JSON), not media, such as a server's error: download the file again"
    return ""


def size_of(source: Source) -> int:
    """Bytes."""
    if isinstance(source, Buffer):
        return len(source.content)
    return source.size if isinstance(source, Member) else source.stat().st_size


def decode_text(content: bytes) -> str:
    """A short text file, which may be cut off, without white space around it: UTF-8, UTF-16 with a mark, or cp1252."""
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "ignore").strip()
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        if error.start >= len(content) - 3:  # cut off within a character
            return content[: error.start].decode("utf-8").strip()
        return content.decode("cp1252", "replace").strip()


def shown(source: Source | str) -> str:
    """A name as one line that any terminal and any file can hold, whatever bytes it is made of."""
    return one_line(source)


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
