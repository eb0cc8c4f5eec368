"""The rank of this process and the number of processes, as set by a launcher (torchrun, accelerate, Slurm)."""

from __future__ import annotations

import os


def num_started() -> int:
    """Return the number of processes that the launcher started (the world size); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several_processes() -> bool:
    """Return whether the launcher started more than one process."""
    return num_started() > 1


def is_first() -> bool:
    """Return whether this is the first or only process, which writes logs and files."""
    return os.environ.get("RANK", "0") == "0"
