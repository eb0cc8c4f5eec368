"""Looking into files that may crash or hang a decoder: in child processes, with a time limit for each file."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from rin_video.datasets.sources import shown
from rin_video.errors import TimeLimitError, TransientError, UsageError

T = TypeVar("T")
FILES_PER_CHILD = 8  # fewer files do not pay for another process
SECONDS_TO_START = 120.0  # of a child, before its first task: it imports torch, where processes are spawned
TRIES = 8  # to start a child that is forked, within this time
BEAT_EVERY = 0.5  # seconds between signs of life


@dataclass
class _Child:
    process: Any
    pipe: Connection
    started: bool = False  # has said so
    task: int | None = None  # what it is at
    since: float = 0.0  # in the future until it has started
    tries: int = 1  # to start


def run_in_subprocess(
    tasks: Sequence[T],
    work: Callable[[T], Any],
    *,
    seconds: float,
    processes: int | None = None,
    daemon: bool = True,
    option: str = "data.read_timeout",
) -> Iterator[tuple[int, Any]]:
    """(i, `work(tasks[i])`) as they come, worked out in child processes; UsageError objects for what cannot be done.

    A child that dies, or takes more than `seconds` for one task (its own start aside, and counted anew from every
    `beat`), is replaced and its task given up; `option` is what a user raises then. Before its first task a child calls
    `work.warm_up`, where there is one: imports are not what a file is given up for. Children that are to have children
    of their own cannot be a `daemon`. Raises UsageError if one does not start.
    """
    limit = processes or os.cpu_count() or 1
    children = [_start(work, daemon) for _ in range(min(limit, -(-len(tasks) // FILES_PER_CHILD)))]
    waiting = iter(range(len(tasks)))
    # If a traceback keeps this generator open until exit: there, children are joined that wait for a task.
    end = partial(_end, children, os.getpid())
    atexit.register(end)
    try:
        busy = [child for child in children if _give(child, tasks, waiting)]
        while busy:
            due = min(child.since + (seconds if child.started else 0) for child in busy)
            ready = wait([child.pipe for child in busy], timeout=max(0.0, due - time.monotonic()))
            for child in list(busy):
                assert child.task is not None
                if child.pipe in ready:
                    try:
                        message = child.pipe.recv()
                        if isinstance(message, _Beat):
                            child.since = time.monotonic()
                            continue
                        if not child.started:
                            child.started, child.since = True, time.monotonic()
                            continue
                        yield child.task, message
                    except (EOFError, OSError):
                        child.process.join()
                        _must_have_started(child)
                        yield child.task, _died(tasks[child.task], child.process.exitcode)
                        _replace(child, work, daemon)
                elif time.monotonic() - child.since > (seconds if child.started else 0) and not child.pipe.poll():
                    if _start_again(child, work, daemon):
                        child.pipe.send(tasks[child.task])
                        continue
                    _must_have_started(child)
                    yield (
                        child.task,
                        TimeLimitError(
                            f"{shown(str(tasks[child.task]))} takes more than {seconds:g} s to read: "
                            f"raise {option}, or leave it out"
                        ),
                    )
                    _replace(child, work, daemon)
                else:
                    continue
                if not child.process.is_alive():
                    _replace(child, work, daemon)
                if not _give(child, tasks, waiting):
                    busy.remove(child)
    finally:
        atexit.unregister(end)
        end()


def end_with_parent() -> None:
    """End this child process about a second after its parent, whatever it is doing.

    Waiting for the end of a pipe is not enough: processes that were forked later hold the other end open.
    """
    parent, number = parent_process(), os.getppid()
    assert parent is not None

    def watch() -> None:
        while parent.is_alive() and os.getppid() == number:  # the number changes on POSIX only
            parent.join(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def how_it_ended(code: int | None) -> str:
    """The exit code of a process in words."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def did_not_start(code: int | None) -> UsageError:
    """The error for a process that ended at its start with an exit code; None: that took too long to start."""
    how = f"took more than {SECONDS_TO_START:g} s to start" if code is None else f"ended at its start (code {code})"
    return UsageError(
        f"a process that was to read files {how}: the machine may be short of memory, and where processes are "
        'spawned (macOS, Windows) a script has to call rin_video under `if __name__ == "__main__":`'
    )


def beat() -> None:
    """A sign of life from slow work: its time limit starts again. Does nothing outside `run_in_subprocess`."""
    now = time.monotonic()
    if _beats is not None and now - _beats.sent > BEAT_EVERY:
        _beats.sent = now
        with suppress(OSError):
            _beats.pipe.send(_Beat())


class _Beat:
    """The message of `beat`."""


@dataclass
class _Beats:
    pipe: Connection
    sent: float = 0.0


_beats: _Beats | None = None  # in a child


def _start(work: Callable[[T], Any], daemon: bool) -> _Child:
    context = get_context()
    ours, theirs = context.Pipe()
    process: Any = context.Process(target=_serve, args=(theirs, ours, work), daemon=daemon)
    process.start()
    theirs.close()
    return _Child(process, ours)


def _replace(child: _Child, work: Callable[[T], Any], daemon: bool) -> None:
    child.process.kill()
    child.process.join()
    child.pipe.close()
    fresh = _start(work, daemon)
    child.process, child.pipe, child.started = fresh.process, fresh.pipe, False


def _give(child: _Child, tasks: Sequence[T], waiting: Iterator[int]) -> bool:
    child.task = next(waiting, None)
    child.since = time.monotonic() + (0.0 if child.started else _seconds_to_start())
    if child.task is not None:
        with suppress(OSError):  # of a child that is dead: the answer will be missing
            child.pipe.send(tasks[child.task])
    return child.task is not None


def _serve(pipe: Connection, other_end: Connection, work: Callable[[T], Any]) -> None:
    """What a child does."""
    import torch

    global _beats
    end_with_parent()
    gc.freeze()  # what was inherited is not tidied up here: it may wait for threads that a fork does not copy
    other_end.close()
    torch.set_num_threads(1)
    getattr(work, "warm_up", lambda: None)()
    pipe.send(None)  # started
    _beats = _Beats(pipe)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            pipe.send(work(task))
        except UsageError as error:
            pipe.send(error)
        except MemoryError:
            pipe.send(TransientError(f"{shown(str(task))} needs more memory than there is"))
        except KeyboardInterrupt:
            return
        except Exception as error:  # of a library; a file must not end the search
            pipe.send(UsageError(f"{shown(str(task))} cannot be read: {shown(repr(error))}"))


def _start_again(child: _Child, work: Callable[[T], Any], daemon: bool) -> bool:
    """Replace a forked child that hangs at its start, where there are tries left.

    A fork copies the locks that other threads hold, but not the threads: a child now and then waits for one for ever.
    """
    if child.started or child.tries >= _tries() or not child.process.is_alive():
        return False
    child.tries += 1
    _replace(child, work, daemon)
    child.since = time.monotonic() + _seconds_to_start()
    return True


def _tries() -> int:
    return TRIES if get_context().get_start_method() == "fork" else 1


def _seconds_to_start() -> float:
    """Of one try."""
    return SECONDS_TO_START / _tries()


def _must_have_started(child: _Child) -> None:
    """What fails before is no fault of a file."""
    if not child.started:
        raise did_not_start(child.process.exitcode)


def _died(task: Any, code: int | None) -> UsageError:
    kind = TransientError if code in (-signal.SIGTERM, -getattr(signal, "SIGKILL", 9)) else UsageError
    return kind(f"{shown(str(task))} makes its decoder crash ({how_it_ended(code)}): re-encode it or leave it out")


def _end(children: Sequence[_Child], owner: int) -> None:
    if os.getpid() != owner:  # a forked process has copies of the handles
        return
    for child in children:
        child.pipe.close()
        child.process.kill()
        child.process.join()
