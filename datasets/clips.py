"""Folders of clips."""

from __future__ import annotations

from collections import Counter
from os import PathLike
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from rin_video.datasets.decoding import VideoInfo, backends_for, open_video, probe_video
from rin_video.datasets.folders import CLIP_EXTENSIONS, class_labels, find_files, probe_files
from rin_video.datasets.images import Chance, Framing, class_list, describe_skipped, size_range
from rin_video.errors import UsageError


class ClipFolder(Dataset[dict[str, Tensor | int]]):
    """Clips of a folder, or of one file; item: `{"x": uint8 (C, F, H, W), "label": class or -1}`.

    A clip is `frames` frames, `stride` apart or resampled to `fps` (the nearest source frame in time), from a random
    start; size, crop and flip are those of `ImageFolder`, the same for all its frames. What is drawn depends on
    (seed, epoch, index) alone. Raises UsageError where no file can be read or is long enough.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        image_size: int | tuple[int, int],
        frames: int,
        *,
        stride: int = 1,
        fps: float | None = None,
        channels: int = 3,
        augment_horizontal_flip: bool = False,
        crop: str = "center",
        decoder: str = "auto",
        seed: int = 0,
    ) -> None:
        if frames < 1 or stride < 1 or (fps is not None and fps <= 0):
            raise UsageError(f"frames {frames}, stride {stride} and fps {fps} must be above 0")
        if fps is not None and stride != 1:
            raise UsageError(f"fps {fps:g} and stride {stride} both say which frames to take: leave one out")
        if channels not in (1, 3):
            raise UsageError(f"clips have 1 or 3 channels, not {channels}")
        self.root = Path(root)
        self.frames, self.stride, self.fps, self.decoder = frames, stride, fps, decoder
        self.framing = Framing(image_size, crop=crop, flip=augment_horizontal_flip)
        self.shape = (channels, frames, *self.framing.size)
        self.chance = Chance(seed)
        infos, self.skipped = probe_files(find_files(root, CLIP_EXTENSIONS), self._probe)
        self.files, self.infos = list(infos), list(infos.values())
        self.backends = Counter(backends_for(info, decoder)[0] for info in self.infos)
        self.classes, self.labels = class_labels(root, self.files)

    @property
    def seed(self) -> int:
        return self.chance.seed

    def set_epoch(self, epoch: int) -> None:
        self.chance.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.draw(index, self.chance.epoch)

    def draw(self, index: int, epoch: int) -> dict[str, Tensor | int]:
        """The item as a given epoch draws it."""
        from torchvision.transforms.v2 import functional as transforms

        index = range(len(self))[index]
        chance, info = self.chance.draw(index, epoch), self.infos[index]
        start = int(chance.integers(self._num_starts(info)))
        with open_video(self.files[index], self.decoder, info) as video:
            frames = self.framing(video.read(self._indices(info, start)), chance)
        if self.shape[0] == 1:
            frames = transforms.rgb_to_grayscale(frames)
        return {"x": frames.transpose(0, 1).contiguous(), "label": self.labels[index]}

    def describe(self) -> str:
        """A few lines on what was found: files, classes, sizes, lengths, decoders, what was skipped."""
        counts, rates = [info.num_frames for info in self.infos], [info.fps for info in self.infos]
        sizes = [info.size for info in self.infos]
        decoders = ", ".join(f"{name} for {count}" for name, count in sorted(self.backends.items()))
        lines = [
            f"{len(self)} clips, {size_range(sizes)}, {min(counts)} to {max(counts)} frames at {min(rates):g} to "
            f"{max(rates):g} fps{class_list(self.classes)}",
            f"read by {decoders}",
        ]
        slow = sum(rate < self.fps for rate in rates) if self.fps else 0
        if slow:
            lines.append(f"{slow} of {len(self)} have fewer than {self.fps:g} fps: some of their frames repeat")
        return "\n".join(lines + self.framing.describe_enlarged(sizes) + describe_skipped(self.skipped))

    def _indices(self, info: VideoInfo, start: int) -> list[int]:
        """The source frames of the clip that starts at source frame `start`."""
        if self.fps is None:
            return list(range(start, start + self.frames * self.stride, self.stride))
        wanted = info.times[start] + np.arange(self.frames) / self.fps
        after = np.searchsorted(info.times, wanted).clip(1, info.num_frames - 1) if info.num_frames > 1 else 0
        before = np.maximum(after - 1, 0)
        nearest = np.where(wanted - info.times[before] <= info.times[after] - wanted, before, after)
        return [int(i) for i in np.broadcast_to(nearest, wanted.shape)]

    def _num_starts(self, info: VideoInfo) -> int:
        """How many source frames a clip can start from; none where the file is too short."""
        if self.fps is None:
            return max(0, info.num_frames - (self.frames - 1) * self.stride)
        # The last frame is shown for one more frame's time; half of it is nearest to that frame.
        last_start = info.times[-1] + 0.5 / info.fps - (self.frames - 1) / self.fps
        return int(np.searchsorted(info.times, last_start, side="right"))

    def _probe(self, file: Path) -> VideoInfo:
        """What the file holds; UsageError where it is too short."""
        info = probe_video(file)
        if self._num_starts(info):
            return info
        if self.fps is None:
            fits = (info.num_frames - 1) // self.stride + 1
            raise UsageError(
                f"clip {file} has {info.num_frames} frames, {(self.frames - 1) * self.stride + 1} are needed "
                f"for {self.frames} at stride {self.stride}: use --frames {fits}, or a smaller stride"
            )
        fits = int((info.times[-1] + 0.5 / info.fps) * self.fps) + 1
        raise UsageError(
            f"clip {file} lasts {info.times[-1] + 1 / info.fps:.2f} s, {self.frames / self.fps:.2f} s are needed "
            f"for {self.frames} frames at {self.fps:g} fps: use --frames {fits}, or a higher fps"
        )
