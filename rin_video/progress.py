"""Progress of long tasks: a bar on a terminal and in a notebook, otherwise plain lines that suit a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm.asyncio import tqdm as terminal_tqdm
from tqdm.auto import tqdm

from rin_video.wording import counted

FIRST, LONGEST = 10.0, 300.0  # limits of the seconds between lines, which are a tenth of the elapsed time
SHORTEST = 1.0  # seconds; nothing is written for a shorter loop
OPEN: list[object] = []  # the active bars; nested ones do not write to a log


class Bar(Protocol):
    """The interface of a progress bar."""

    total: int  # may change while the loop runs

    def update(self, n: int = 1) -> object:
        """Advance by `n`."""

    def set_postfix_str(self, s: str) -> object:
        """Set the text after the progress, such as the loss."""


class Lines:
    """Writes lines such as `training: 120 of 1000 steps, 2.3 steps/s, 06:21 left, loss 0.1` to stderr."""

    def __init__(self, total: int, desc: str, unit: str, initial: int, *, quiet: bool) -> None:
        self.total, self.desc, self.unit, self.quiet = total, desc, unit, quiet
        self.n = self.initial = initial
        self.start = self.last = time.monotonic()
        self.postfix = ""

    def update(self, n: int = 1) -> None:
        """Advance by `n`, and write a line if one is due."""
        self.n += n
        now = time.monotonic()
        if now - self.last >= min(max(FIRST, (now - self.start) / 10), LONGEST) and self.n < self.total:
            self.last = now
            self.write()

    def set_postfix_str(self, s: str) -> None:
        """Set the text at the end of the line."""
        self.postfix = s

    def write(self) -> None:
        """Write a line, unless the lines are quiet."""
        if self.quiet:
            return
        seconds, done = time.monotonic() - self.start, self.n - self.initial
        parts = [f"{self.desc}: {self.n} of {counted(self.total, self.unit)}"]
        if done:
            rate = done / max(seconds, 1e-9)
            parts.append(f"{rate:.3g} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s per {self.unit}")
            left = tqdm.format_interval((self.total - self.n) / rate)
            parts.append(f"{left} left" if self.n < self.total else f"{tqdm.format_interval(seconds)} in total")
        tqdm.write(", ".join([*parts, *([self.postfix] if self.postfix else [])]), file=sys.stderr)


@contextmanager
def progress_bar(
    total: int, desc: str, unit: str, *, initial: int = 0, delay: float = 0.0, disable: bool = False
) -> Iterator[Bar]:
    """Show the progress of a loop, which calls `update` of the returned bar.

    On a terminal and in a notebook it is a tqdm bar. Otherwise it writes lines to stderr, but not for nested bars.
    Tasks that take less than `delay` seconds show nothing.
    """
    nested = bool(OPEN)
    if not disable and is_interactive():
        bar = tqdm(total=total, initial=initial, desc=desc, unit=unit, delay=delay, leave=not nested)
        OPEN.append(bar)
        try:
            with bar:
                yield bar
        finally:
            OPEN.remove(bar)
        return
    lines = Lines(total, desc, unit, initial, quiet=disable or nested)
    OPEN.extend([] if disable else [lines])
    try:
        yield lines
    finally:
        if not disable:
            OPEN.remove(lines)
        if time.monotonic() - lines.start >= max(delay, SHORTEST) and lines.n > initial:
            lines.write()


def is_interactive() -> bool:
    """Return whether a bar can be redrawn, which requires a terminal or a notebook."""
    return tqdm is not terminal_tqdm or (sys.stderr is not None and sys.stderr.isatty())
