"""File names, and atomic writes of files and folders: a reader sees either the old version or the complete new one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from rin_video.errors import UsageError
from rin_video.wording import in_bytes

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
HUB, PIPE = "hf:", "pipe:"  # prefixes of names of data that are not paths
ARRAY_SUFFIXES, ARRAY_KEY = (".npy", ".safetensors"), "samples"  # the key of an array in a safetensors file


def remove_file(path: Path) -> None:
    """Delete a file if it exists."""
    path.unlink(missing_ok=True)


@contextmanager
def atomic_write(
    path: Path, *, remove: Callable[[Path], None] = remove_file, unique: bool = False, durable: bool = True
) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which replaces `path` if the block succeeds and is removed otherwise.

    The block writes a file to it, or makes a folder, which `remove` deletes. `unique` allows several processes to write
    at the same time; without it, a process that was killed leaves at most one temporary file. `durable` syncs the
    result to the disk before the block ends, and raises `UsageError` if the disk is full.
    """
    own = f".{secrets.token_hex(4)}" if unique else ""
    name = f".{path.stem}{own}.tmp{path.suffix}" if remove is remove_file else f"{path.name}{own}.tmp"
    temporary = path.with_name(name)
    try:
        with disk_full_handler(path) if durable else nullcontext():
            yield temporary
            is_folder = temporary.is_dir()
            if durable:
                for part in (*(temporary.iterdir() if is_folder else ()), temporary):
                    sync(part)
            if is_folder:
                remove(path)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
    finally:
        with suppress(OSError):
            remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file or folder is stored on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_full_handler(path: Path) -> Iterator[None]:
    """Convert "no space left" errors while `path` is written to a `UsageError` that names the free space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free
        raise UsageError(
            f"{path} could not be written, {in_bytes(free)} are free ({error}): free some space, or lower "
            "train.keep_checkpoints. Earlier checkpoints are complete: the same command resumes from them"
        ) from None


def is_full_disk(error: BaseException) -> bool:
    """Return whether an error of the system, or of safetensors (by its text), means a full disk or quota."""
    codes = [errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)]
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code})" in str(error) for code in codes)
