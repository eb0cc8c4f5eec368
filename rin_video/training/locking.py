"""One training at a time in a folder: a lock that the system drops with the process, however it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

from rin_video.errors import UsageError

LOCK = ".lock"


def lock_run(folder: Path) -> IO[bytes]:
    """Keep other processes from training in `folder` until the file that is returned is closed.

    Raises `UsageError` where another one does. The lock is this process' own: those it starts do not keep it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("ab")
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UsageError(
            f"another process is training in {folder}: wait until it ends, stop it, or give another folder (--out)"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file
