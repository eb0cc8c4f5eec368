"""What a launcher (torchrun, accelerate, Slurm) says of this process and its number."""

from __future__ import annotations

import os


def num_started() -> int:
    """How many processes were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several_processes() -> bool:
    """Whether there are others beside this process."""
    return num_started() > 1


def is_first() -> bool:
    """Whether this is the first process, or the only one: the one that talks and writes."""
    return os.environ.get("RANK", "0") == "0"
