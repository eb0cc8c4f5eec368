"""Tar shards in the WebDataset layout: files with the same key are one sample (`a/b.mp4`, `a/b.cls`, `a/b.txt`).

Shards are read in place: their headers contain the position of every member, so samples can be drawn in any order and
in any process, and a run resumes exactly. Nothing is ever unpacked, so the name of a member cannot cause a write.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from os import PathLike
from pathlib import Path, PurePosixPath

from rin_video.datasets.sources import Member, decode_text, open_source, shown
from rin_video.errors import UsageError
from rin_video.files import PIPE, atomic_write
from rin_video.wording import counted

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000


def is_shards(root: str | PathLike[str]) -> bool:
    """Return whether `root` names tar shards: a .tar file, a pattern `{000..123}.tar`, `pipe:`, or a folder of them.

    The folder may also contain other files (tables, notes), but no media.
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
    """Return the shards that `root` names, in order.

    The output of `pipe:COMMAND`, which must be allowed, is stored as a file in the folder `cache`, because shards are
    read in place. Raises `UsageError` if a shard is missing, or if `pipe:` is not allowed or fails.
    """
    name = os.fspath(root)
    if name.startswith(PIPE):
        if not allow_pipe:
            raise UsageError(
                f"{shown(name)} runs a command: if you trust it, allow it with data.allow_pipe=true on the command line"
            )
        if cache is None:
            raise UsageError(
                f"{shown(name)} needs the folder of a run for its shards, and this command has none: use train, index "
                "or prepare"
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
    """Expand `{000..123}` in a pattern, zero-padded like the first number.

    Raises `UsageError` if a range is descending or there are too many shards. The package `braceexpand` is unsuitable:
    it has no limit on the number, and fails for other braces, as in a `pipe:` command.
    """
    fixed, starts, ends = (RANGE.split(pattern)[i::3] for i in range(3))
    ranges = [range(int(start), int(end) + 1) for start, end in zip(starts, ends, strict=True)]
    count = math.prod(part.stop - part.start for part in ranges)
    if count > MAX_SHARDS or not all(ranges):
        raise UsageError(f"{shown(pattern)} names {count} shards: use an ascending range of at most {MAX_SHARDS:,}")
    widths = [len(start) if start.startswith("0") else 1 for start in starts]
    return [
        fixed[0] + "".join(f"{n:0{width}}{text}" for n, width, text in zip(numbers, widths, fixed[1:], strict=True))
        for numbers in product(*ranges)
    ]


def members_of(shard: Path) -> tuple[list[Member], list[tuple[str, str]]]:
    """Return the files in a shard, and (name, reason) of the refused members.

    Raises `UsageError` if the shard is not a plain tar file.
    """
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
        with tarfile.open(shard, "r:") as tar:  # uncompressed, because members are read in place
            for info in tar:
                path = PurePosixPath(info.name.replace("\\", "/"))
                if info.isdir() or path.name.startswith("."):
                    continue
                if not info.isreg() or info.issparse():
                    refused.append((info.name, f"{shown(shard)}:{shown(info.name)} is a link or a device, not a file"))
                elif path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    refused.append((info.name, f"{shown(shard)}:{shown(info.name)} has a path outside the shard"))
                elif info.offset_data + info.size > size:
                    refused.append(
                        (info.name, f"{shown(shard)}:{shown(info.name)} is truncated by the end of the shard")
                    )
                else:
                    members.append(Member(shard, str(path), info.offset_data, info.size))
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        if not members:
            raise UsageError(
                f"{shown(shard)} cannot be read as an uncompressed tar file ({shown(str(error))}): create it again"
            ) from error
        reason = f"{shown(shard)} is truncated after {counted(len(members), 'file')} ({shown(str(error))})"
        refused.append((shard.name, reason))
    return members, refused


def companions(members: list[Member]) -> dict[tuple[Path, str], dict[str, Member]]:
    """Return the files of each sample, by extension, for every (shard, key)."""
    found: dict[tuple[Path, str], dict[str, Member]] = {}
    for member in members:
        found.setdefault((member.shard, member.key), {})[member.extension.lower()] = member
    return found


def companion(by_key: Mapping[tuple[Path, str], Mapping[str, Member]], member: Member, suffix: str) -> Member | None:
    """Return the companion of a member with a suffix: for `x.left.mp4` it is `x.left.txt`, otherwise `x.txt`."""
    own = by_key.get((member.shard, member.key), {})
    inner = member.extension[: -len(member.suffix)].lower() if member.suffix else ""
    return own.get(inner + suffix) or own.get(suffix)


def read_text(member: Member, limit: int = 10_000) -> str:
    """Read the first `limit` bytes of a member as text, and strip it."""
    with open_source(member) as file:
        return decode_text(file.read(limit))


def write_shard(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a shard atomically; the same files give the same bytes."""
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
