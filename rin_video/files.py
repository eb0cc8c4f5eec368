"""Names of files, and writing files and folders atomically: a reader sees the complete new one, or the old one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from rin_video.errors import UsageError

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
HUB, PIPE = "hf:", "pipe:"  # what names of data begin with that are no paths
ARRAY_SUFFIXES, ARRAY_KEY = (".npy", ".safetensors"), "samples"  # the key of an array in a safetensors file


def remove_file(path: Path) -> None:
    """Delete a file, if it is there."""
    path.unlink(missing_ok=True)


@contextmanager
def atomic_write(
    path: Path, *, remove: Callable[[Path], None] = remove_file, unique: bool = False, durable: bool = True
) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it if the block ends well and removed if it does not.

    The block writes a file there, or makes a folder, which `remove` deletes. `unique` is for what several processes may
    write at once. `durable`: it is on the disk when the block ends, and a full disk is a `UsageError`.
    """
    own = f".{os.getpid()}" if unique else ""
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
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_full_handler(path: Path) -> Iterator[None]:
    """Turns "no space left" while writing `path` into a `UsageError` that says how much is free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free
        raise UsageError(
            f"{path} could not be written, {free / 1e6:,.0f} MB are free ({error}): make room, or lower "
            "train.keep_checkpoints. What was written before is whole: the same command goes on from there"
        ) from None


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of the system, or of safetensors, which gives its text only, means a full disk or quota."""
    codes = [errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)]
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code})" in str(error) for code in codes)
