"""Probing in subprocesses, with a time limit per file, because files may crash or hang a decoder."""

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
FILES_PER_CHILD = 8  # another process is not worth its cost for fewer files
SECONDS_TO_START = 120.0  # until a child is ready for its first task; a spawned child must import torch
TRIES = 8  # attempts within this time to start a forked child
BEAT_EVERY = 0.5  # seconds between signs of life


@dataclass
class _Child:
    process: Any
    pipe: Connection
    started: bool = False  # it has reported that it is ready
    task: int | None = None  # the number of its current task
    since: float = 0.0  # start of the task's time limit; in the future until the child has started
    tries: int = 1  # attempts to start it


def run_in_subprocess(
    tasks: Sequence[T],
    work: Callable[[T], Any],
    *,
    seconds: float,
    processes: int | None = None,
    daemon: bool = True,
    option: str = "data.read_timeout",
) -> Iterator[tuple[int, Any]]:
    """Run `work` on tasks in child processes and yield (i, `work(tasks[i])`) in the order of completion.

    A failed task yields a `UsageError` object instead of a result. A child that dies, or exceeds `seconds` for a task,
    is replaced and its task fails; `option` is the option that the error tells the user to raise. The limit excludes
    the start of the child and restarts with every `beat`. Before its first task a child calls `work.warm_up`, if there
    is one, so that imports do not count towards a limit. A `daemon` child cannot have children of its own. Raises
    `UsageError` if a child does not start.
    """
    limit = processes or os.cpu_count() or 1
    children = [_start(work, daemon) for _ in range(min(limit, -(-len(tasks) // FILES_PER_CHILD)))]
    waiting = iter(range(len(tasks)))
    # If a traceback keeps this generator open until exit, multiprocessing would join children that wait for a task.
    end = partial(_end, children, os.getpid())
    atexit.register(end)
    try:
        busy = [child for child in children if _send_task(child, tasks, waiting)]
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
                        _check_started(child)
                        yield child.task, _crash_error(tasks[child.task], child.process.exitcode)
                        _replace(child, work, daemon)
                elif time.monotonic() - child.since > (seconds if child.started else 0) and not child.pipe.poll():
                    if _start_again(child, work, daemon):
                        child.pipe.send(tasks[child.task])
                        continue
                    _check_started(child)
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
                if not _send_task(child, tasks, waiting):
                    busy.remove(child)
    finally:
        atexit.unregister(end)
        end()


def end_with_parent() -> None:
    """Make this child process exit about a second after its parent, whatever it is doing.

    Waiting for the pipe to close is not sufficient: processes that were forked later keep its other end open.
    """
    parent, number = parent_process(), os.getppid()
    assert parent is not None

    def watch() -> None:
        while parent.is_alive() and os.getppid() == number:  # the number changes on POSIX only
            parent.join(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def how_it_ended(code: int | None) -> str:
    """Describe the exit code of a process."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def did_not_start(code: int | None) -> UsageError:
    """Return the error for a process that exited during its start with `code`; None: its start took too long."""
    how = f"took more than {SECONDS_TO_START:g} s to start" if code is None else f"exited at its start (code {code})"
    return UsageError(
        f"a process that reads files {how}: the machine may be short of memory; on macOS and Windows, where processes "
        'are spawned, a script must call rin_video under `if __name__ == "__main__":`'
    )


def beat() -> None:
    """Report progress of slow work, which restarts its time limit; a no-op outside `run_in_subprocess`."""
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
    process: Any = context.Process(target=_child_main, args=(theirs, ours, work), daemon=daemon)
    process.start()
    theirs.close()
    return _Child(process, ours)


def _replace(child: _Child, work: Callable[[T], Any], daemon: bool) -> None:
    child.process.kill()
    child.process.join()
    child.pipe.close()
    fresh = _start(work, daemon)
    child.process, child.pipe, child.started = fresh.process, fresh.pipe, False


def _send_task(child: _Child, tasks: Sequence[T], waiting: Iterator[int]) -> bool:
    child.task = next(waiting, None)
    child.since = time.monotonic() + (0.0 if child.started else _seconds_to_start())
    if child.task is not None:
        with suppress(OSError):  # the child is dead, which receiving its result will reveal
            child.pipe.send(tasks[child.task])
    return child.task is not None


def _child_main(pipe: Connection, other_end: Connection, work: Callable[[T], Any]) -> None:
    """The main loop of a child process."""
    import torch

    global _beats
    end_with_parent()
    gc.freeze()  # do not collect inherited objects: their cleanup may wait for threads that a fork does not copy
    other_end.close()
    torch.set_num_threads(1)
    getattr(work, "warm_up", lambda: None)()
    pipe.send(None)  # ready
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
            pipe.send(TransientError(f"{shown(str(task))} needs more memory than is available"))
        except KeyboardInterrupt:
            return
        except Exception as error:  # any error of a library: one file must not end the run
            pipe.send(UsageError(f"{shown(str(task))} cannot be read: {shown(repr(error))}"))


def _start_again(child: _Child, work: Callable[[T], Any], daemon: bool) -> bool:
    """Replace a forked child that hangs at its start, if attempts are left; return whether it was replaced.

    A fork copies the locks that other threads hold, but not the threads. A child may therefore wait for a lock forever.
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
    """The time limit of one attempt to start a child."""
    return SECONDS_TO_START / _tries()


def _check_started(child: _Child) -> None:
    """Raise `UsageError` if a child has not started: then the file is not at fault."""
    if not child.started:
        raise did_not_start(child.process.exitcode)


def _crash_error(task: Any, code: int | None) -> UsageError:
    kind = TransientError if code in (-signal.SIGTERM, -getattr(signal, "SIGKILL", 9)) else UsageError
    return kind(f"{shown(str(task))} makes its decoder crash ({how_it_ended(code)}): re-encode it or leave it out")


def _end(children: Sequence[_Child], owner: int) -> None:
    if os.getpid() != owner:  # a forked process has copies of the handles
        return
    for child in children:
        child.pipe.close()
        child.process.kill()
        child.process.join()
