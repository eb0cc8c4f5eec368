"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rin_video.errors import UsageError
from rin_video.wording import in_bytes

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with disk_full_handler(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            f"{path} could not be written, {in_bytes(free)} are free ({error}): make room, or lower "
            "train.keep_checkpoints. What was written before is whole: the same command goes on from there"
        ) from None


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of the system, or of safetensors, which gives its text only, means a full disk or quota."""
    codes = [errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)]
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code})" in str(error) for code in codes)
