"""Formatting of numbers in messages: 1 sample, 2 samples; 12 frames, 8 to 12 frames; 3.1 kB."""

from __future__ import annotations


def plural(noun: str) -> str:
    """Return the plural of a noun: `samples`, `classes`."""
    return f"{noun}es" if noun.endswith(("s", "x", "ch")) else f"{noun}s"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: `1 sample`, `2 samples`."""
    return f"{number} {noun if number == 1 else plural(noun)}"


def ranged(low: int, high: int, noun: str) -> str:
    """Format a range with its noun: `12 frames`, `8 to 12 frames`."""
    return counted(low, noun) if low == high else f"{low} to {counted(high, noun)}"


def in_bytes(num_bytes: float) -> str:
    """Format bytes with the largest unit that keeps the number at 1 or more: `812 B`, `3.1 kB`, `24 MB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{scaled(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{scaled(num_bytes)} TB"


def in_flops(gflops: float) -> str:
    """Format GFLOPs: `31.9 GFLOPs`, `3.2 MFLOPs`."""
    return f"{scaled(gflops)} GFLOPs" if gflops >= 0.1 else f"{scaled(1000 * gflops)} MFLOPs"


def in_hours(seconds: float) -> str:
    """Format a long duration, given in seconds: `40 minutes`, `5 hours`, `41 days`."""
    if seconds < 90 * 60:
        return counted(max(round(seconds / 60), 1), "minute")
    return counted(round(seconds / 3600), "hour") if seconds < 48 * 3600 else counted(round(seconds / 86400), "day")


def in_seconds(seconds: float) -> str:
    """Format a duration, given in seconds, with its unit: `0.35 seconds`, `45 seconds`, `40 minutes`, `5 hours`."""
    number = scaled(seconds)
    return f"{number} {'second' if number == '1' else 'seconds'}" if seconds < 89.5 else in_hours(seconds)


def scaled(value: float) -> str:
    """Format a number with at most three significant digits, without trailing zeros of a fraction."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
