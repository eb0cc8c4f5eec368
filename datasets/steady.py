"""Resampling of clips with a variable frame rate to a constant rate by the nearest frame in time."""

from __future__ import annotations

from typing import Any

import numpy as np

from rin_video.datasets.clip_sampler import nearest_in_time
from rin_video.datasets.video_info import VideoInfo

IRREGULAR = 1.75  # largest ratio of the longest to the shortest step at a constant rate, whose stamps are rounded
MAX_RATE = 60.0  # frames per second
MOST = 4  # output frames per source frame


def is_steady(times: np.ndarray) -> bool:
    """Return whether times (F,) have a constant rate, apart from rounding."""
    steps = np.diff(times)
    return not steps.size or steps.max() <= IRREGULAR * steps.min()


def steady_frames(times: np.ndarray, duration: float, fps: float) -> tuple[list[int], float]:
    """Return the frames that resample a clip to a constant rate, and that rate.

    If the rate is already constant, these are all frames and `fps`. `times` (F,) are seconds from the first frame,
    ascending. The rate matches the shortest step, but is at most MAX_RATE and gives at most MOST output frames per
    source frame.
    """
    if is_steady(times):
        return list(range(len(times))), fps
    shortest = max(float(np.diff(times).min()), 1e-6)
    rate = min(1 / shortest, MAX_RATE, MOST * len(times) / duration)
    rate = round(rate) if abs(rate - round(rate)) < 0.02 * rate else rate
    return nearest_in_time(times, np.arange(max(1, round(duration * rate))) / rate), float(rate)


def steady_clip(info: VideoInfo) -> tuple[list[int], float]:
    """Return the frames and the rate of `steady_frames` for a video file."""
    return steady_frames(info.times, info.duration, info.fps)


def frame_rate(dataset: Any) -> float | None:
    """Return the median frame rate of the clips that a dataset returns; None if it is unknown."""
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
