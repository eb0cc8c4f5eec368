"""Tar shards in the WebDataset layout: files with one key are one sample (`a/b.mp4`, `a/b.cls`, `a/b.txt`).

Shards are read in place: their headers tell where every member begins, so that samples can be drawn in any order, in
any process, and a run resumes exactly. Nothing is ever unpacked, so a member's name cannot lead anywhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path, PurePosixPath

from rin_video.datasets.sources import Member, decode_text, open_source, shown
from rin_video.errors import UsageError
from rin_video.files import atomic_write
from rin_video.wording import counted

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000
PIPE = "pipe:"


def is_shards(root: str | PathLike[str]) -> bool:
    """Whether `root` names tar shards: a .tar, a pattern `{000..123}.tar`, `pipe:`, or a folder with .tar files.

    A folder may hold other files beside them (tables, notes), but no media.
    """
    from rin_video.datasets.extensions import KINDS

    name = os.fspath(root)
    if name.startswith(PIPE) or (name.endswith(".tar") and not Path(name).is_dir()):
        return True
    if not Path(name).is_dir():
        return False
    suffixes = {path.suffix.lower() for path in Path(name).iterdir() if path.is_file() and path.name[0] != "."}
    return ".tar" in suffixes and not any(suffixes & set(extensions) for extensions in KINDS.values())


def list_shards(root: str | PathLike[str], *, allow_pipe: bool = False, cache: Path | None = None) -> list[Path]:
    """The shards that `root` names, in order. UsageError for one that is not there, and for `pipe:` unless allowed.

    The output of an allowed `pipe:COMMAND` is kept as a file in the folder `cache`, because shards are read in place.
    """
    name = os.fspath(root)
    if name.startswith(PIPE):
        if not allow_pipe:
            raise UsageError(
                f"{shown(name)} runs a command: if you trust it, allow it with data.allow_pipe=true on the command line"
            )
        if cache is None:
            raise UsageError(
                f"{shown(name)} is kept in the folder of a run, and this command has none: use train, index or prepare"
            )
        return [_run_pipe(command[len(PIPE) :], cache) for command in expand(name)]
    if Path(name).is_dir():
        return sorted(path for path in Path(name).iterdir() if path.suffix == ".tar" and path.name[0] != ".")
    shards = [Path(one) for one in expand(name)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UsageError(f"there is no shard {shown(missing[0])} ({len(missing)} of {len(shards)} are missing)")
    return shards


def expand(pattern: str) -> list[str]:
    """`{000..123}` as the numbers, as wide as the first one is written. UsageError for a range that runs backwards."""
    found = RANGE.search(pattern)
    if not found:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MAX_SHARDS:
        raise UsageError(
            f"{shown(pattern)} names {last - first + 1} shards: the range goes up, to {MAX_SHARDS:,} at most"
        )
    width = len(found[1]) if found[1].startswith("0") else 1
    return [
        one
        for n in range(first, last + 1)
        for one in expand(f"{pattern[: found.start()]}{n:0{width}}{pattern[found.end() :]}")
    ]


def members_of(shard: Path) -> tuple[list[Member], list[tuple[str, str]]]:
    """The files in a shard, and the members that are refused, with the reason. UsageError where it is no tar file."""
    try:
        modified = shard.stat().st_mtime_ns
    except OSError as error:
        raise UsageError(f"{shown(shard)} cannot be read: {error.strerror}") from error
    return _members(shard, modified)


@lru_cache(maxsize=4096)
def _members(shard: Path, modified: int) -> tuple[list[Member], list[tuple[str, str]]]:
    members: list[Member] = []
    refused: list[tuple[str, str]] = []
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:  # not compressed: a member is read where it lies
            for info in tar:
                path = PurePosixPath(info.name.replace("\\", "/"))
                if info.isdir() or path.name.startswith("."):
                    continue
                if not info.isreg() or info.issparse():
                    refused.append((info.name, f"{shown(shard)}:{shown(info.name)} is a link or a device, not a file"))
                elif path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    refused.append((info.name, f"{shown(shard)}:{shown(info.name)} names a place outside the shard"))
                elif info.offset_data + info.size > size:
                    refused.append((info.name, f"{shown(shard)}:{shown(info.name)} is cut off by the end of the shard"))
                else:
                    members.append(Member(shard, str(path), info.offset_data, info.size))
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        if not members:
            raise UsageError(
                f"{shown(shard)} cannot be read as a plain tar file ({shown(str(error))}): make it again"
            ) from error
        refused.append(
            (shard.name, f"{shown(shard)} breaks off after {counted(len(members), 'file')} ({shown(str(error))})")
        )
    return members, refused


def companions(members: list[Member]) -> dict[tuple[Path, str], dict[str, Member]]:
    """The files that belong to one sample, by extension, for every (shard, key)."""
    found: dict[tuple[Path, str], dict[str, Member]] = {}
    for member in members:
        found.setdefault((member.shard, member.key), {})[member.extension.lower()] = member
    return found


def companion(aside: Mapping[tuple[Path, str], Mapping[str, Member]], member: Member, suffix: str) -> Member | None:
    """The file of a sample with a suffix: of `x.left.mp4`, `x.left.txt`, else `x.txt`."""
    own = aside.get((member.shard, member.key), {})
    inner = member.extension[: -len(member.suffix)].lower() if member.suffix else ""
    return own.get(inner + suffix) or own.get(suffix)


def read_text(member: Member, limit: int = 10_000) -> str:
    """The beginning of a member as text, without white space around it."""
    with open_source(member) as file:
        return decode_text(file.read(limit))


def write_shard(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a shard; the same files give the same bytes."""
    with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _run_pipe(command: str, cache: Path) -> Path:
    target = cache / f"{hashlib.sha256(command.encode()).hexdigest()[:16]}.tar"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary, temporary.open("wb") as file:
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        shutil.copyfileobj(process.stdout, file)
        if process.wait():
            raise UsageError(f"pipe:{shown(command)} failed with exit code {process.returncode}")
    return target
