"""Folders and shards of clips."""

from __future__ import annotations

import logging
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from rin_video.config import DataConfig, data_config
from rin_video.datasets.buckets import Buckets
from rin_video.datasets.clip_sampler import ClipSampler
from rin_video.datasets.decoding import LostFramesError, VideoInfo, backends_for, kept_open, let_go
from rin_video.datasets.embeddings import open_embeddings
from rin_video.datasets.epochs import SampleDataset
from rin_video.datasets.folders import number_classes
from rin_video.datasets.images import make_framing
from rin_video.datasets.index import Entry, describe_notes, describe_skipped, make_index, refuse_skipped
from rin_video.datasets.resize_crop import SampleRNG, class_list, size_range, smaller
from rin_video.datasets.sources import Source, shown
from rin_video.errors import ShortClipError, UsageError
from rin_video.wording import counted, ranged

log = logging.getLogger("rin_video")

ATTEMPTS = 16  # windows of a file that are drawn until one has no damage
SAME_RATE = 1.05  # frame rates up to this factor apart count as one


class ClipFolder(SampleDataset):
    """Clips of a folder, of one file or of tar shards; item: `{"x": uint8 (C, F, H, W), "label": class or -1}`, with
    "embedding" (vectors, width) where the options ask for them.

    A clip is `frames` frames, `stride` apart or resampled to `fps` (the nearest source frame in time), from a random
    start; size, crop and flip are those of `ImageFolder`, the same for all its frames. What is drawn depends on
    (seed, epoch, index) alone. `index` is a file that keeps what is known of the data between runs; the other options
    are the fields of `DataConfig`, by name or as one `config`. Raises UsageError where no file can be read or is long
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
            raise UsageError(f"clips have 1 or 3 channels, not {channels}")
        self.config = config or data_config(**options)
        self.root, self.frames, self.decoder = Path(root), frames, self.config.decoder
        self.framing = make_framing(image_size, self.config)
        self.windows = ClipSampler(frames, self.config)
        self.shape = (channels, frames, *self.framing.size)
        self.chance = SampleRNG(seed)
        self.index = make_index(root, "video", self.config, path=index, progress=True)
        self.index.require_some(self.config.strict)
        self.skipped = self.index.unusable
        self.buckets = Buckets(self.config.buckets, rank=3)
        entries = self._choose()
        self.embeddings = open_embeddings(entries, self.config, index)
        self.backends = Counter(backends_for(info, self.decoder, strict=False)[0] for info in self.infos)
        self._lost: dict[int, frozenset[int]] = {}  # frames of files that turned out to be damaged, in this process

    def _choose(self) -> list[Entry]:
        """The files that are long enough, how often each is drawn from, and the bucket of each draw."""
        shapes = self.buckets.shapes or [(self.frames, *self.framing.size)]
        self.framings = [make_framing(shape[1:], self.config) for shape in shapes]
        self.lengths = [ClipSampler(shape[0], self.config) for shape in shapes]
        shortest = min(self.lengths, key=lambda windows: windows.frames)
        chosen: list[Entry] = []
        short: list[ShortClipError] = []
        self.files: list[Source] = []
        self.infos: list[VideoInfo] = []
        names: list[str | None] = []
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
            names.append(entry.class_name)
        if short and not self.files:
            longest = max(short, key=lambda error: error.fits)
            if len(short) == 1:
                raise longest
            problem = f"none of {len(short)} clips is long enough: {longest.problem}"
            raise ShortClipError(problem, f"use --frames {longest.fits}", longest.fits)
        refuse_skipped(len(self.files), self.skipped, self.config.strict)
        self.classes, labels = number_classes(names)
        self.labels = [labels[file] for file, _, _ in self.places]
        files = self.buckets.assign(
            [(self._longest(info), *info.size) for info in self.infos]
            if self.buckets.shapes
            else [(1, 1, 1)] * len(labels)
        )
        self.bucket_of = [files[file] for file, _, _ in self.places]
        return chosen

    def _longest(self, info: VideoInfo) -> int:
        """The frames of the longest bucket that fits into a file."""
        return max(w.frames for w in self.lengths if w.starts(info).size)

    @property
    def seed(self) -> int:
        return self.chance.seed

    def set_epoch(self, epoch: int) -> None:
        self.chance.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.draw(index, self.chance.epoch)

    def draw(self, index: int, epoch: int) -> dict[str, Tensor | int]:
        """The item as a given epoch draws it."""
        from torchvision.transforms.v2 import functional as transforms

        index = range(len(self))[index]
        for _ in range(ATTEMPTS):
            file, indices, chance = self._plan(index, epoch)
            framing, info = self.framings[self.bucket_of[index]], self.infos[file]
            frame = framing.plan(info.size, chance)
            try:
                video = kept_open(self.files[file], self.decoder, info)
                frames = video.read(indices, smaller(frame.size, info.size))
                break
            except LostFramesError as error:  # it costs this window, not the file
                if not self._learn(file, error):
                    raise
            except Exception:
                let_go(self.files[file], self.decoder)
                raise
        else:
            raise UsageError(f"{shown(self.files[file])} is too damaged to draw from: re-encode it or leave it out")
        frames = framing.cut(frames, frame)
        if self.shape[0] == 1:
            frames = transforms.rgb_to_grayscale(frames)
        item: dict[str, Tensor | int] = {"x": frames.transpose(0, 1).contiguous(), "label": self.labels[index]}
        return item if self.embeddings is None else {**item, "embedding": self.embeddings[file]}

    def frames_of(self, index: int, epoch: int) -> list[int]:
        """The source frames that an epoch's draw shows."""
        return self._plan(range(len(self))[index], epoch)[1]

    def name_of(self, index: int) -> str:
        return str(self.files[self.places[index][0]])

    def describe(self) -> str:
        """A few lines on what was found: files, classes, sizes, lengths, decoders, what was skipped."""
        counts, rates = [info.num_frames for info in self.infos], [info.fps for info in self.infos]
        sizes = [info.size for info in self.infos]
        decoders = ", ".join(f"{name} for {count}" for name, count in sorted(self.backends.items()))
        lines = [
            f"{counted(len(self.files), 'clip')}, {size_range(sizes)}, {ranged(min(counts), max(counts), 'frame')} at "
            f"{rate_range(rates)} fps{class_list(self.classes)}",
            f"read by {decoders}",
        ]
        if len(self) != len(self.files):
            lines.append(f"{counted(len(self), 'window')} an epoch")
        fps = self.config.fps
        if not fps and self.config.span != "whole" and (differ := _rates_differ(rates)):
            lines.append(differ)
        slow = sum(rate < fps for rate in rates) if fps else 0
        if slow:
            lines.append(
                f"slower than {fps:g} fps: {slow} of {counted(len(self.files), 'clip')}, of which some frames repeat"
            )
        lines += [self.embeddings.describe()] if self.embeddings else []
        lines += self.buckets.describe(self.bucket_of)
        lines += describe_notes(self.infos) + self.framing.describe_enlarged(sizes) + describe_skipped(self.skipped)
        return "\n".join(lines + self.index.describe_passed_over())

    def _plan(self, index: int, epoch: int) -> tuple[int, list[int], Any]:
        """File, frames and the chance for the rest: the first of several draws that touches no known damage.

        The same whoever draws: a reader that does not know of the damage finds it, and draws again.
        """
        file, part, parts = self.places[index]
        windows, lost = self.lengths[self.bucket_of[index]], self._lost.get(file, frozenset())
        for attempt in range(ATTEMPTS):
            chance = self.chance.draw(index, epoch, attempt)
            indices = windows.draw(self.infos[file], part, parts, chance)
            if not lost.intersection(indices):
                break
        return file, indices, chance

    def _learn(self, file: int, error: LostFramesError) -> bool:
        """Note frames that cannot be decoded; False where they were known."""
        known = self._lost.get(file, frozenset())
        if known.issuperset(error.frames):
            return False
        if not known:
            log.warning("another window is taken: %s", error)
        self._lost[file] = known.union(error.frames)
        return True


def rate_range(rates: list[float]) -> str:
    """`8`, or `8 to 30`."""
    low, high = f"{min(rates):.4g}", f"{max(rates):.4g}"
    return low if low == high else f"{low} to {high}"


def _rates_differ(rates: list[float]) -> str:
    """What to say where frames of one stride are not of one time; empty where they are."""
    if max(rates) <= SAME_RATE * min(rates):
        return ""
    common = Counter(f"{rate:.4g}" for rate in rates).most_common(4)
    some = ", ".join(f"{count} at {rate}" for rate, count in common)
    return (
        f"frame rates differ ({some}{', ...' if len(common) == 4 else ''}): a stride is another time, and movement "
        f"another speed, in each; data.fps={min(rates):.3g} makes them one"
    )
