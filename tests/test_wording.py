"""Numbers in messages, and progress bars on a terminal and in a log."""

import io
import sys

import pytest

from rin_video import progress
from rin_video.progress import progress_bar
from rin_video.wording import counted, in_bytes, in_flops, in_hours, in_seconds, ranged


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that is advanced by hand."""

    class Clock:
        now = 0.0

    monkeypatch.setattr("rin_video.progress.time.monotonic", lambda: Clock.now)
    return Clock


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (counted(1, "sample"), "1 sample"),
        (counted(2, "sample"), "2 samples"),
        (counted(0, "class"), "0 classes"),
        (ranged(12, 12, "frame"), "12 frames"),
        (ranged(1, 1, "frame"), "1 frame"),
        (ranged(1, 12, "frame"), "1 to 12 frames"),
        (in_bytes(812), "812 B"),
        (in_bytes(3140), "3.14 kB"),
        (in_bytes(999_999), "1 MB"),
        (in_bytes(24.04e6), "24 MB"),
        (in_bytes(1.25e9), "1.25 GB"),
        (in_bytes(3e15), "3000 TB"),
        (in_flops(215.149), "215 GFLOPs"),
        (in_flops(0.1791), "0.179 GFLOPs"),
        (in_flops(0.0034), "3.4 MFLOPs"),
        (in_seconds(0.354), "0.354 seconds"),
        (in_seconds(1.0), "1 second"),
        (in_seconds(45), "45 seconds"),
        (in_seconds(90), "2 minutes"),
        (in_hours(4), "1 minute"),
        (in_hours(45 * 60), "45 minutes"),
        (in_hours(5 * 3600), "5 hours"),
        (in_hours(3_526_000), "41 days"),
    ],
)
def test_numbers_in_words(text, wanted):
    assert text == wanted


def test_a_log_gets_lines_and_no_control_codes(clock, capsys):
    with progress_bar(1000, "training", "step", initial=100) as bar:
        for step in range(900):
            clock.now += 2
            bar.set_postfix_str(f"loss {step}")
            bar.update()
    out, err = capsys.readouterr()
    assert not out
    assert "\r" not in err
    first, *_, last = err.splitlines()
    assert first == "training: 105 of 1000 steps, 2 s per step, 29:50 left, loss 4"
    assert last == "training: 1000 of 1000 steps, 2 s per step, 30:00 in total, loss 899"
    assert len(err.splitlines()) < 40  # further and further apart


def test_a_bar_inside_another_is_left_out_of_a_log(clock, capsys):
    with progress_bar(2, "training", "step") as outer:
        with progress_bar(1, "sampling", "step") as inner:
            clock.now += 60
            inner.update()
        outer.update(2)
    with progress_bar(1, "sampling", "step") as alone:
        clock.now += 2
        alone.update()
    err = capsys.readouterr().err
    assert [line.partition(":")[0] for line in err.splitlines()] == ["training", "sampling"]


@pytest.mark.parametrize("options", [{"disable": True}, {"delay": 2.0}])
def test_what_is_short_or_not_wanted_is_not_shown(options, capsys):
    with progress_bar(1, "reading", "file", **options) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(3, "training", "step") as bar:
        bar.update()
    assert "\rtraining:" in terminal.getvalue()
    assert progress.OPEN == []
