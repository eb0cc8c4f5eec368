"""The dataset of clips in folders and shards."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from rin_video.config import DataConfig, data_config
from rin_video.datasets.buckets import Buckets
from rin_video.datasets.clip_sampler import ClipSampler
from rin_video.datasets.decoding import LostFramesError, VideoInfo, backends_for, close_cached, open_cached
from rin_video.datasets.embeddings import open_embeddings
from rin_video.datasets.epochs import SampleDataset
from rin_video.datasets.folders import number_classes, relabel
from rin_video.datasets.images import make_resize_crop
from rin_video.datasets.index import Entry, describe_notes, describe_skipped, make_index, refuse_skipped
from rin_video.datasets.resize_crop import SampleRNG, class_list, size_range, unaugmented
from rin_video.datasets.sources import Source, shown
from rin_video.errors import ShortClipError, UsageError
from rin_video.wording import counted, ranged

log = logging.getLogger("rin_video")

ATTEMPTS = 16  # draws of a clip before the file is given up as too damaged
SAME_RATE = 1.05  # frame rates within this factor count as equal


class ClipFolder(SampleDataset):
    """A dataset of the clips in a folder, a file or tar shards.

    Items are `{"x": uint8 (C, F, H, W), "label": class or -1}`, plus "embedding" (vectors, width) if configured. A clip
    has `frames` frames from a random start, `stride` apart or resampled to `fps` (the nearest source frame in time).
    Size, crop and flip work as in `ImageFolder` and are the same for all frames. An item depends on (seed, epoch,
    index) alone. `index` is a file that caches the properties of the data between runs; the other options are the
    fields of `DataConfig`, passed by name or as one `config`. Raises `UsageError` if no file is readable and long
    enough.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        image_size: int | tuple[int, int],
        frames: int,
        *,
        channels: int = 3,
        seed: int = 0,
        index: Path | None = None,
        config: DataConfig | None = None,
        **options: Any,
    ) -> None:
        if channels not in (1, 3):
            raise UsageError(f"clips must have 1 or 3 channels, not {channels}")
        self.config = config or data_config(**options)
        self.root, self.frames, self.decoder = Path(root), frames, self.config.decoder
        self.resize_crop = make_resize_crop(image_size, self.config)
        self.clip_sampler = ClipSampler(frames, self.config)
        self.shape = (channels, frames, *self.resize_crop.size)
        self.rng = SampleRNG(seed)
        self.index = make_index(root, "video", self.config, path=index, progress=True)
        self.index.require_some(self.config.strict)
        self.skipped = self.index.unusable
        self.buckets = Buckets(self.config.buckets, rank=3)
        entries = self._choose()
        self.embeddings = open_embeddings(entries, self.config, index)
        self.backends = self._count_backends()
        self._lost: dict[int, frozenset[int]] = {}  # damaged frames by file, as found by this process

    def _choose(self) -> list[Entry]:
        """Select the files that are long enough; set the clips per epoch of each, and the bucket of each clip."""
        shapes = self.buckets.shapes or [(self.frames, *self.resize_crop.size)]
        self.resize_crops = [make_resize_crop(shape[1:], self.config) for shape in shapes]
        self.clip_samplers = [ClipSampler(shape[0], self.config) for shape in shapes]
        shortest = min(self.clip_samplers, key=lambda sampler: sampler.frames)
        chosen: list[Entry] = []
        short: list[ShortClipError] = []
        self.files: list[Source] = []
        self.infos: list[VideoInfo] = []
        self.class_names: list[str | None] = []  # of each file
        self.places: list[tuple[int, int, int]] = []  # file, part, of how many parts
        for entry in self.index.usable:
            try:
                shortest.check(entry.source, entry.info)
            except UsageError as error:
                self.skipped.append((entry.source, str(error)))
                short += [error] if isinstance(error, ShortClipError) else []
                continue
            parts = shortest.count(entry.info)
            self.places += [(len(self.files), part, parts) for part in range(parts)]
            chosen.append(entry)
            self.files.append(entry.source)
            self.infos.append(entry.info)
            self.class_names.append(entry.class_name)
        if short and not self.files:
            longest = max(short, key=lambda error: error.fits)
            if len(short) == 1:
                raise longest
            problem = f"none of {len(short)} clips is long enough: {longest.problem}"
            raise ShortClipError(problem, f"use --frames {longest.fits}", longest.fits)
        refuse_skipped(len(self.files), self.skipped, self.config.strict)
        self.classes, labels = number_classes(self.class_names)
        self.labels = [labels[file] for file, _, _ in self.places]
        files = self.buckets.assign(
            [(self._longest(info), *info.size) for info in self.infos]
            if self.buckets.shapes
            else [(1, 1, 1)] * len(labels)
        )
        self.bucket_of = [files[file] for file, _, _ in self.places]
        return chosen

    def select(self, files: Sequence[int]) -> ClipFolder:
        """Return the dataset of some of the files, by number, with the classes and embeddings of the complete one."""
        part, number = copy.copy(self), {file: i for i, file in enumerate(files)}
        part.rng, part._lost = SampleRNG(self.seed), {}
        part.files, part.infos = [self.files[file] for file in files], [self.infos[file] for file in files]
        part.class_names = [self.class_names[file] for file in files]
        kept = [i for i, place in enumerate(self.places) if place[0] in number]
        part.places = [(number[file], window, count) for file, window, count in (self.places[i] for i in kept)]
        part.labels, part.bucket_of = ([values[i] for i in kept] for values in (self.labels, self.bucket_of))
        part.embeddings = self.embeddings and self.embeddings.select(files)
        part.backends = part._count_backends()
        return part

    def without_augmentation(self) -> ClipFolder:
        """Return the dataset with centre crops and without random changes; the windows stay random."""
        part = copy.copy(self)
        part.rng, part._lost, part.config = SampleRNG(self.seed), {}, unaugmented(self.config)
        part.resize_crops = [make_resize_crop(crop.size, part.config) for crop in self.resize_crops]
        part.resize_crop = make_resize_crop(self.resize_crop.size, part.config)
        part.clip_samplers = [ClipSampler(sampler.frames, part.config) for sampler in self.clip_samplers]
        part.clip_sampler = ClipSampler(self.frames, part.config)
        return part

    def use_classes(self, classes: list[str]) -> None:
        """Number the classes as in other data, `classes`; files without class get label -1."""
        self.classes, labels = classes, relabel(self.class_names, classes)
        self.labels = [labels[file] for file, _, _ in self.places]

    def _count_backends(self) -> Counter[str]:
        return Counter(backends_for(info, self.decoder, strict=False)[0] for info in self.infos)

    def _longest(self, info: VideoInfo) -> int:
        """Return the number of frames of the longest bucket that the file can fill."""
        return max(sampler.frames for sampler in self.clip_samplers if sampler.starts(info).size)

    @property
    def seed(self) -> int:
        """The seed of the random numbers."""
        return self.rng.seed

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of `dataset[index]`, in all workers."""
        self.rng.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.draw(index, self.rng.epoch)

    def draw(self, index: int, epoch: int) -> dict[str, Tensor | int]:
        """Return item `index` of an epoch. Raises `UsageError` if the file cannot be read or is too damaged."""
        index = range(len(self))[index]
        for _ in range(ATTEMPTS):
            file, indices, rng = self._draw_frames(index, epoch)
            resize_crop, info = self.resize_crops[self.bucket_of[index]], self.infos[file]
            try:
                video = open_cached(self.files[file], self.decoder, info)
                x = resize_crop.read_clip(video, indices, info.size, rng, self.shape[0])
                break
            except LostFramesError as error:  # discard this clip, not the file
                if not self._record_lost(file, error):
                    raise
            except Exception:
                close_cached(self.files[file], self.decoder)
                raise
        else:
            raise UsageError(f"{shown(self.files[file])} is too damaged: re-encode it or leave it out")
        item: dict[str, Tensor | int] = {"x": x, "label": self.labels[index]}
        return item if self.embeddings is None else {**item, "embedding": self.embeddings[file]}

    def frames_of(self, index: int, epoch: int) -> list[int]:
        """Return the source frames of item `index` of an epoch."""
        return self._draw_frames(range(len(self))[index], epoch)[1]

    def name_of(self, index: int) -> str:
        """Return the name of the item's file."""
        return str(self.files[self.places[index][0]])

    def group_of(self, index: int) -> int:
        """Return the number of the item's file."""
        return self.places[index][0]

    def describe(self) -> str:
        """Return a summary in a few lines: files, classes, sizes, lengths, decoders, skipped files."""
        counts, rates = [info.num_frames for info in self.infos], [info.fps for info in self.infos]
        sizes = [info.size for info in self.infos]
        decoders = ", ".join(f"{name} for {count}" for name, count in sorted(self.backends.items()))
        lines = [
            f"{counted(len(self.files), 'clip')}, {size_range(sizes)}, {ranged(min(counts), max(counts), 'frame')} at "
            f"{rate_range(rates)} fps{class_list(self.classes)}",
            f"decoders: {decoders}",
        ]
        if len(self) != len(self.files):
            lines.append(f"{counted(len(self), 'clip')} per epoch")
        fps = self.config.fps
        if not fps and self.config.span != "whole" and (differ := _rates_differ(rates)):
            lines.append(differ)
        slow = sum(rate < fps for rate in rates) if fps else 0
        if slow:
            lines.append(f"{slow} of {counted(len(self.files), 'clip')} below {fps:g} fps: some frames repeat")
        lines += [self.embeddings.describe()] if self.embeddings else []
        lines += self.buckets.describe(self.bucket_of)
        lines += describe_notes(self.infos) + self.resize_crop.describe_enlarged(sizes) + describe_skipped(self.skipped)
        return "\n".join(lines + self.index.describe_ignored())

    def _draw_frames(self, index: int, epoch: int) -> tuple[int, list[int], Any]:
        """Return (file, frames, generator) of the first of several draws without known damage.

        The result is the same in every process: one that does not know of the damage finds it and draws again.
        """
        file, part, parts = self.places[index]
        clip_sampler, lost = self.clip_samplers[self.bucket_of[index]], self._lost.get(file, frozenset())
        for attempt in range(ATTEMPTS):
            rng = self.rng.draw(index, epoch, attempt)
            indices = clip_sampler.draw(self.infos[file], part, parts, rng)
            if not lost.intersection(indices):
                break
        return file, indices, rng

    def _record_lost(self, file: int, error: LostFramesError) -> bool:
        """Record frames that cannot be decoded; return False if they were known."""
        known = self._lost.get(file, frozenset())
        if known.issuperset(error.frames):
            return False
        if not known:
            log.warning("using another clip of the file: %s", error)
        self._lost[file] = known.union(error.frames)
        return True


def rate_range(rates: list[float]) -> str:
    """Return the range of frame rates, such as `8` or `8 to 30`."""
    low, high = f"{min(rates):.4g}", f"{max(rates):.4g}"
    return low if low == high else f"{low} to {high}"


def _rates_differ(rates: list[float]) -> str:
    """Return a warning if the frame rates differ, so that a stride is not a fixed time; otherwise an empty string."""
    if max(rates) <= SAME_RATE * min(rates):
        return ""
    common = Counter(f"{rate:.4g}" for rate in rates).most_common(4)
    some = ", ".join(f"{count} at {rate}" for rate, count in common)
    return (
        f"frame rates differ ({some}{', ...' if len(common) == 4 else ''}), so a stride is not a fixed time and "
        f"motion has different speeds; data.fps={min(rates):.3g} makes them equal"
    )
