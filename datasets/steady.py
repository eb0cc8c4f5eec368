"""Clips of a variable frame rate on a regular grid: the nearest frame in time."""

from __future__ import annotations

from typing import Any

import numpy as np

from rin_video.datasets.clip_sampler import nearest_in_time
from rin_video.datasets.video_info import VideoInfo

IRREGULAR = 1.75  # times the shortest step that the longest may take: stamps of regular clips are rounded
MAX_RATE = 60.0  # frames a second
MOST = 4  # frames of the grid for one of the clip


def is_steady(times: np.ndarray) -> bool:
    """Whether times (F,) are those of a regular rate, but for rounding."""
    steps = np.diff(times)
    return not steps.size or steps.max() <= IRREGULAR * steps.min()


def steady_frames(times: np.ndarray, duration: float, fps: float) -> tuple[list[int], float]:
    """Frames that show a clip at a regular rate, and the rate; all of them at `fps` where it is regular already.

    `times` (F,) are seconds from the first frame, ascending. The grid is as fine as the shortest step, up to MAX_RATE
    and MOST frames for one.
    """
    if is_steady(times):
        return list(range(len(times))), fps
    shortest = max(float(np.diff(times).min()), 1e-6)
    rate = min(1 / shortest, MAX_RATE, MOST * len(times) / duration)
    rate = round(rate) if abs(rate - round(rate)) < 0.02 * rate else rate
    return nearest_in_time(times, np.arange(max(1, round(duration * rate))) / rate), float(rate)


def steady_clip(info: VideoInfo) -> tuple[list[int], float]:
    """`steady_frames` of a video file."""
    return steady_frames(info.times, info.duration, info.fps)


def frame_rate(dataset: Any) -> float | None:
    """Frames a second of the clips that a data set gives: its median; None where it does not tell."""
    parts = [getattr(dataset, name) for name in ("clips", "dataset") if hasattr(dataset, name)]
    parts = parts or list(getattr(dataset, "parts", []))[:1]
    if parts:
        return frame_rate(parts[0])
    infos, options = getattr(dataset, "infos", None), getattr(dataset, "config", None)
    if not infos or options is None or not isinstance(infos[0], VideoInfo):
        return None
    if options.fps:
        return float(options.fps)
    if options.span == "whole":
        rates = [dataset.frames / info.duration for info in infos]
    else:
        rates = [info.fps / options.stride for info in infos]
    return round(float(np.median(rates)), 3)
