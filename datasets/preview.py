"""A preview of the training data: a sheet of labelled samples, and statistics."""

from __future__ import annotations

from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.datasets.sources import shown
from rin_video.datasets.video_info import VideoInfo
from rin_video.errors import UsageError
from rin_video.media import contact_sheet, video_grid, write_image_grid, write_video
from rin_video.wording import counted

CELL = 96  # pixels: smaller pictures are enlarged to about this size
SUFFIXES = (".png", ".jpg", ".webp", ".mp4", ".gif")


def check_sheet(path: Path) -> None:
    """Raise `UsageError` if a sheet cannot be written to `path`, to fail before any work."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot write a sheet as {path}: use one of {', '.join(SUFFIXES)}")


def draw_some(dataset: Any, num: int) -> tuple[list[Tensor], list[int]]:
    """Return up to `num` uint8 samples (C, *grid) of epoch 0, evenly spaced over the data, and their indices."""
    chosen = np.linspace(0, len(dataset) - 1, min(num, len(dataset))).round().astype(int).tolist()
    draw = getattr(dataset, "draw", lambda index, epoch: dataset[index])
    samples = [draw(index, 0)["x"] for index in chosen]
    return [x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8) for x in samples], chosen


def captions(dataset: Any, chosen: list[int]) -> list[str]:
    """Return a line per sample with its file, its class and its source frames."""
    texts = []
    for index in chosen:
        parts = [Path(dataset.name_of(index)).name]
        if dataset.classes:
            label = dataset.labels[index] if len(getattr(dataset, "labels", [])) == len(dataset) else None
            label = dataset[index]["label"] if label is None else label
            parts += [dataset.classes[label]] if label >= 0 else []
        if hasattr(dataset, "frames_of"):
            frames = dataset.frames_of(index, 0)
            parts.append(f"frames {frames[0]} to {frames[-1]}")
        texts.append(shown("  ".join(parts)))
    return texts


def write_sheet(samples: list[Tensor], texts: list[str], path: str | PathLike[str], fps: float = 8.0) -> None:
    """Write samples with a line of text above each: clips as rows of frames, or as a playing grid (.mp4 or .gif).

    Raises `UsageError` if the samples are not pictures or do not fit the format.
    """
    path = Path(path)
    check_sheet(path)
    if samples[0].ndim not in (3, 4):
        raise UsageError(f"samples of shape {tuple(samples[0].shape)} are not pictures: leave out --out")
    moving = path.suffix.lower() in (".mp4", ".gif")
    if moving and samples[0].ndim == 3:
        raise UsageError(f"{path}: a video format requires clips, not images: use --out sheet.png")
    pictures = [x[:3].expand(3, *x.shape[1:]) for x in samples]
    upscale = max(1, round(CELL / max(max(x.shape[-2:]) for x in pictures)))
    clips = [x if x.ndim == 4 else x[:, None] for x in pictures]
    if moving:
        clip = video_grid(clips, upscale=upscale, titles=texts)
        write_video(torch.nn.functional.pad(clip, (0, clip.shape[-1] % 2, 0, clip.shape[-2] % 2)), path, fps)
    elif samples[0].ndim == 4:
        contact_sheet(clips, path, upscale=upscale, titles=texts)
    else:
        write_image_grid(pictures, path, upscale=upscale, titles=texts)


def statistics(dataset: Any, samples: list[Tensor], chosen: list[int]) -> list[str]:
    """Return lines with classes, durations, sizes, and the mean and std of the samples' channels in [0, 1]."""
    lines = []
    if dataset.classes and hasattr(dataset, "labels"):
        counts = Counter(dataset.labels)
        lines.append(
            "samples per class: " + ", ".join(f"{shown(c)} {counts[i]}" for i, c in enumerate(dataset.classes))
        )
    infos = getattr(dataset, "infos", [])
    if infos and isinstance(infos[0], VideoInfo):
        seconds = sorted(info.duration for info in infos)
        middle = seconds[len(seconds) // 2]
        several = f"{seconds[0]:.2f} to {seconds[-1]:.2f} s, median {middle:.2f} s"
        each = several if seconds[0] < seconds[-1] else f"{middle:.2f} s each"
        lines.append(f"durations: {each}, total {sum(seconds):.1f} s")
    sizes = [info.size for info in infos if isinstance(info, VideoInfo)] or getattr(dataset, "sizes", [])
    if sizes:
        common = Counter(sizes).most_common(5)
        lines.append("sizes: " + ", ".join(f"{H}x{W} {count}" for (H, W), count in common))
    values = torch.cat([x.flatten(1).float() / 255 for x in samples], dim=1)
    mean, std = (" ".join(f"{v:.3f}" for v in part.tolist()) for part in (values.mean(1), values.std(1)))
    shapes = Counter("x".join(map(str, x.shape)) for x in samples)
    drawn = " and ".join(f"{counted(number, 'sample')} of {shape}" for shape, number in shapes.items())
    lines.append(f"{drawn}: mean {mean}, std {std}")
    still = sum(bool((x[:, 1:] == x[:, :-1]).all()) for x in samples if x.ndim == 4 and x.shape[1] > 1)
    flat = [dataset.name_of(i) for x, i in zip(samples, chosen, strict=True) if int(x.max()) - int(x.min()) < 8]
    lines += [f"static: {still} of {counted(len(samples), 'sample')}"] if still else []
    lines += [f"single colour: {len(flat)} of {len(samples)} ({', '.join(map(shown, flat[:3]))})"] if flat else []
    return lines
