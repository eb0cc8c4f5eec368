"""Which source frames a clip is made of: at a stride, at a rate, or the whole file; from which start; how often."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rin_video.config import DataConfig
from rin_video.datasets.sources import Source, shown
from rin_video.datasets.video_info import VideoInfo, frames_text
from rin_video.errors import ShortClipError, UsageError
from rin_video.wording import counted


class ClipSampler:
    """Clips of `frames` frames: `stride` apart, or at `fps` (the nearest source frame in time), or over the whole file.

    A file is drawn from `windows` times an epoch, or, sampled over time, as often as clips fit into it side by side;
    draw k of n starts in the k-th of n parts of the file.
    """

    def __init__(self, frames: int, options: DataConfig) -> None:
        if frames < 1:
            raise UsageError(f"frames is {frames}: it must be above 0")
        self.frames, self.options = frames, options

    def check(self, source: Source, info: VideoInfo) -> None:
        """UsageError where the file is too short, or its scenes are, or what damage leaves of it."""
        if not self._fits(info, 0, info.num_frames):
            raise self._too_short(source, info)
        if info.lost and not ClipSampler(self.frames, replace(self.options, avoid_cuts=False)).starts(info).size:
            raise UsageError(
                f"clip {shown(source)} has no {counted(self.frames, 'frame')} together that can be decoded "
                f"({frames_text(info.lost_ranges)} cannot): use fewer --frames, or re-encode it"
            )
        if self.options.avoid_cuts and not self.starts(info).size:
            raise UsageError(
                f"clip {shown(source)} has no scene of {counted(self.frames, 'frame')} "
                f"(cuts at {list(info.cuts or ())[:8]}): use fewer --frames, or data.avoid_cuts=false"
            )

    def count(self, info: VideoInfo) -> int:
        """How often the file is drawn from in an epoch."""
        if self.options.sampling == "clips" or self.options.span == "whole":
            return self.options.windows
        length = self.frames / self.options.fps * info.fps if self.options.fps else self.frames * self.options.stride
        return self.options.windows * max(1, int(info.num_frames // length))

    def draw(self, info: VideoInfo, part: int, parts: int, chance: np.random.Generator) -> list[int]:
        """The source frames of one clip, in the order in which they are shown."""
        low, high = self.options.augment_speed
        speed = float(np.exp(chance.uniform(np.log(low), np.log(high)))) if low != high else low
        starts = self.starts(info, speed)
        if not starts.size:  # too short for such a speed
            speed, starts = 1.0, self.starts(info)
        first, last = (
            part * starts.size // parts,
            max((part + 1) * starts.size // parts, part * starts.size // parts + 1),
        )
        start = int(starts[min(first + int(chance.integers(last - first)), starts.size - 1)])
        indices = self.indices(info, start, speed)
        if self.options.augment_reverse and chance.random() < 0.5:
            indices.reverse()
        return indices

    def starts(self, info: VideoInfo, speed: float = 1.0) -> np.ndarray:
        """The source frames that a clip can start from, ascending."""
        if self.options.span == "whole":
            return np.zeros(int(len(_sound(info)) >= self.frames), dtype=np.int64)
        times = info.times if self.options.fps else None
        found = [np.arange(a, a + self._num_starts(info, a, b, speed, times)) for a, b in self._stretches(info)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def indices(self, info: VideoInfo, start: int, speed: float = 1.0) -> list[int]:
        """The source frames of the clip that starts at source frame `start`."""
        if self.options.span == "whole":
            sound = _sound(info)
            return [sound[int(i)] for i in np.rint(np.linspace(0, len(sound) - 1, self.frames))]
        if self.options.fps is None:
            steps = np.floor(np.arange(self.frames) * self.options.stride * speed + 1e-6)
            return [start + int(step) for step in steps]
        times = info.times
        wanted = times[start] + np.arange(self.frames) * speed / self.options.fps
        return nearest_in_time(times, wanted)

    def _stretches(self, info: VideoInfo) -> list[tuple[int, int]]:
        """(first, end) of the source frames between damage and, where these are avoided, cuts."""
        cuts = (info.cuts or ()) if self.options.avoid_cuts else ()
        edges = sorted({0, *cuts, *info.lost, info.num_frames})
        damaged = {first for first, end in info.lost_ranges if end > first}
        inside = [any(first < edge < end for first, end in info.lost_ranges) for edge in edges]
        return [
            (a, b)
            for (a, b), within in zip(itertools.pairwise(edges), inside, strict=False)
            if a not in damaged and not within
        ]

    def _fits(self, info: VideoInfo, first: int, end: int) -> bool:
        if self.options.span == "whole":
            return info.num_frames >= self.frames
        return self._num_starts(info, first, end, 1.0, info.times if self.options.fps else None) > 0

    def _num_starts(self, info: VideoInfo, first: int, end: int, speed: float, times: np.ndarray | None) -> int:
        """How many clips lie within source frames `first` to `end`."""
        if times is None:
            reach = int(np.floor((self.frames - 1) * self.options.stride * speed + 1e-6))
            return max(0, end - first - reach)
        # The last frame is shown for one more frame's time; half of it is nearest to that frame.
        assert self.options.fps is not None
        last_start = times[end - 1] + 0.5 / info.fps - (self.frames - 1) * speed / self.options.fps
        return max(0, int(np.searchsorted(times[first:end], last_start, side="right")))

    def _too_short(self, source: Source, info: VideoInfo) -> ShortClipError:
        name, frames, fps, stride = shown(source), self.frames, self.options.fps, self.options.stride
        has = f"clip {name} has {counted(info.num_frames, 'frame')}"
        if self.options.span == "whole":
            return ShortClipError(f"{has}, {frames} are needed", f"use --frames {info.num_frames}", info.num_frames)
        if fps is None:
            problem = f"{has}, {(frames - 1) * stride + 1} are needed for {frames} at stride {stride}"
            fits = (info.num_frames - 1) // stride + 1
            return ShortClipError(problem, f"use --frames {fits}, or a smaller stride", fits)
        problem = (
            f"clip {name} lasts {info.times[-1] + 1 / info.fps:.2f} s, {frames / fps:.2f} s are needed for "
            f"{counted(frames, 'frame')} at {fps:g} fps"
        )
        fits = int((info.times[-1] + 0.5 / info.fps) * fps) + 1
        return ShortClipError(problem, f"use --frames {fits}, or a higher fps", fits)


def _sound(info: VideoInfo) -> Sequence[int]:
    """The frames that damage has left."""
    if not info.lost:
        return range(info.num_frames)
    lost = {i for first, end in info.lost_ranges for i in range(first, end)}
    return [i for i in range(info.num_frames) if i not in lost]


def nearest_in_time(times: np.ndarray, wanted: Sequence[float] | np.ndarray) -> list[int]:
    """For every wanted time the frame whose time is nearest; the earlier one of two."""
    wanted = np.asarray(wanted)
    if len(times) == 1:
        return [0] * len(wanted)
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    return [int(i) for i in np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)]
