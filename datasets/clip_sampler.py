"""Selection of the source frames of a clip: the stride or frame rate, the start frame, and the clips per epoch."""

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
    """Selects clips of `frames` frames: `stride` apart, resampled to `fps` (nearest frame), or over the complete file.

    An epoch has `windows` clips per file; if sampled over time, that many for each clip length that fits into the file.
    Clip k of n starts in the k-th of n equal parts of the file. Raises `UsageError` if `frames` is below 1.
    """

    def __init__(self, frames: int, options: DataConfig) -> None:
        if frames < 1:
            raise UsageError(f"frames is {frames}: it must be above 0")
        self.frames, self.options = frames, options

    def check(self, source: Source, info: VideoInfo) -> None:
        """Raise `UsageError` if the file, its scenes or its undamaged parts are too short for a clip."""
        if not self._fits(info, 0, info.num_frames):
            raise self._too_short(source, info)
        if info.lost and not ClipSampler(self.frames, replace(self.options, avoid_cuts=False)).starts(info).size:
            raise UsageError(
                f"clip {shown(source)} has no {counted(self.frames, 'consecutive frame')} that can be decoded "
                f"({frames_text(info.lost_ranges)} cannot): use fewer --frames, or re-encode it"
            )
        if self.options.avoid_cuts and not self.starts(info).size:
            raise UsageError(
                f"clip {shown(source)} has no scene of {counted(self.frames, 'frame')} "
                f"(cuts at {list(info.cuts or ())[:8]}): use fewer --frames, or data.avoid_cuts=false"
            )

    def count(self, info: VideoInfo) -> int:
        """Return the number of clips that an epoch draws from the file."""
        if self.options.sampling == "clips" or self.options.span == "whole":
            return self.options.windows
        length = self.frames / self.options.fps * info.fps if self.options.fps else self.frames * self.options.stride
        return self.options.windows * max(1, int(info.num_frames // length))

    def draw(self, info: VideoInfo, part: int, parts: int, rng: np.random.Generator) -> list[int]:
        """Draw a clip from the `part`-th of `parts` equal parts of the file; return its source frames in order."""
        low, high = self.options.augment_speed
        speed = float(np.exp(rng.uniform(np.log(low), np.log(high)))) if low != high else low
        starts = self.starts(info, speed)
        if not starts.size:  # the file is too short for this speed
            speed, starts = 1.0, self.starts(info)
        first, last = (
            part * starts.size // parts,
            max((part + 1) * starts.size // parts, part * starts.size // parts + 1),
        )
        start = int(starts[min(first + int(rng.integers(last - first)), starts.size - 1)])
        indices = self.indices(info, start, speed)
        if self.options.augment_reverse and rng.random() < 0.5:
            indices.reverse()
        return indices

    def starts(self, info: VideoInfo, speed: float = 1.0) -> np.ndarray:
        """Return the source frames that a clip can start at, ascending."""
        if self.options.span == "whole":
            return np.zeros(int(len(_sound(info)) >= self.frames), dtype=np.int64)
        times = info.times if self.options.fps else None
        found = [np.arange(a, a + self._num_starts(info, a, b, speed, times)) for a, b in self._stretches(info)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def indices(self, info: VideoInfo, start: int, speed: float = 1.0) -> list[int]:
        """Return the source frames of the clip that starts at source frame `start`."""
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
        """Return (first, end) of the ranges of source frames without damage and, if `avoid_cuts`, without cuts."""
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
        """Return the number of start frames whose clip lies within source frames `first` to `end`."""
        if times is None:
            reach = int(np.floor((self.frames - 1) * self.options.stride * speed + 1e-6))
            return max(0, end - first - reach)
        # The last frame is displayed for one frame interval, and is the nearest frame for half of it.
        assert self.options.fps is not None
        last_start = times[end - 1] + 0.5 / info.fps - (self.frames - 1) * speed / self.options.fps
        return max(0, int(np.searchsorted(times[first:end], last_start, side="right")))

    def _too_short(self, source: Source, info: VideoInfo) -> ShortClipError:
        name, frames, fps, stride = shown(source), self.frames, self.options.fps, self.options.stride
        has = f"clip {name} has {counted(info.num_frames, 'frame')}"
        if self.options.span == "whole":
            return ShortClipError(f"{has}, but {frames} are needed", f"use --frames {info.num_frames}", info.num_frames)
        if fps is None:
            problem = f"{has}, but {(frames - 1) * stride + 1} are needed for {frames} at stride {stride}"
            fits = (info.num_frames - 1) // stride + 1
            return ShortClipError(problem, f"use --frames {fits}, or a smaller stride", fits)
        problem = (
            f"clip {name} lasts {info.times[-1] + 1 / info.fps:.2f} s, but {frames / fps:.2f} s are needed for "
            f"{counted(frames, 'frame')} at {fps:g} fps"
        )
        fits = int((info.times[-1] + 0.5 / info.fps) * fps) + 1
        return ShortClipError(problem, f"use --frames {fits}, or a higher fps", fits)


def _sound(info: VideoInfo) -> Sequence[int]:
    """Return the frames that can be decoded."""
    if not info.lost:
        return range(info.num_frames)
    lost = {i for first, end in info.lost_ranges for i in range(first, end)}
    return [i for i in range(info.num_frames) if i not in lost]


def nearest_in_time(times: np.ndarray, wanted: Sequence[float] | np.ndarray) -> list[int]:
    """Return, for each wanted time, the frame with the nearest time; the earlier frame wins a tie."""
    wanted = np.asarray(wanted)
    if len(times) == 1:
        return [0] * len(wanted)
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    return [int(i) for i in np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)]
