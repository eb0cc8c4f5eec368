"""A lock that allows one process per folder; the system releases it when the process ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rin_video.errors import UsageError

log = logging.getLogger("rin_video")

LOCK = ".lock"


@contextmanager
def lock_run(folder: Path, work: str = "training") -> Iterator[None]:
    """Prevent other processes from training in `folder` within the block; child processes do not inherit the lock.

    `work` names what is done there. Raises `UsageError` if another process does it. On a file system without locks,
    this only logs a warning: a marker file instead of a lock would remain after a process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UsageError(
            f"another process is {work} in {folder}: wait until it ends, stop it, or use another folder (--out)"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): do not start a second process there", folder, error)
    try:
        yield
    finally:
        lock.release()
