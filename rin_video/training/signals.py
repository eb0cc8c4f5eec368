"""Graceful stop: a signal requests a stop, and the training loop stops at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# Ctrl-C; the signal of clusters and `kill`; the signal of clusters some time before the end of a job.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Records a signal within the block as `received`; a second Ctrl-C raises KeyboardInterrupt at once.

    Python allows signal handlers in the main thread only: in other threads, this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; raise KeyboardInterrupt at the second Ctrl-C."""
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def ignore_signals(worker: int = 0) -> None:
    """Ignore stop signals in a data loader worker: all processes of a job receive them, but the step needs its data."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
