"""One training at a time in a folder: a lock that the system drops with the process, however it ends."""

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
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder` within the block. Child processes do not keep the lock.

    Raises `UsageError` if another process trains there. A file system without locks is tolerated with a warning: a
    marker file in place of a lock would outlive a process that is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UsageError(
            f"another process is training in {folder}: wait until it ends, stop it, or give another folder (--out)"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): do not train there with a second process", folder, error)
    try:
        yield
    finally:
        lock.release()
