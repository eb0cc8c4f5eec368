"""Stopping kindly: signals ask for a stop, and the training loop heeds it when a step is done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# Ctrl-C, what clusters and `kill` send, and what clusters send some time before they take the machine away.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Within the block, a signal is remembered as `received`; a second Ctrl-C raises KeyboardInterrupt at once.

    Python allows handlers in the main thread only: in another one, nothing changes.
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
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def ignore_signals(worker: int = 0) -> None:
    """For processes that read data: a signal goes to all of a job, and they are needed until the step is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
