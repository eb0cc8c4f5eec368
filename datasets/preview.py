"""What training will see: a sheet of labelled samples, and statistics."""

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
from rin_video.wording import counted

LINE = 12  # pixels of a line of text
CELL = 96  # pixels: smaller pictures are enlarged to about this
MARGIN = 4
COLUMNS = 8  # frames of a row
SUFFIXES = (".png", ".jpg", ".webp", ".mp4", ".gif")


def check_sheet(path: Path) -> None:
    """UsageError where a sheet cannot be written to `path`: before the work."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot write a sheet as {path}: use one of {', '.join(SUFFIXES)}")


def draw_some(dataset: Any, num: int) -> tuple[list[Tensor], list[int]]:
    """Up to `num` samples (C, *grid) uint8 from all over the data, as epoch 0 draws them, and their indices."""
    chosen = np.linspace(0, len(dataset) - 1, min(num, len(dataset))).round().astype(int).tolist()
    draw = getattr(dataset, "draw", lambda index, epoch: dataset[index])
    samples = [draw(index, 0)["x"] for index in chosen]
    return [x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8) for x in samples], chosen


def captions(dataset: Any, chosen: list[int]) -> list[str]:
    """For each sample: file, class, and which source frames it shows."""
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
    """Samples with a line of text above each: clips as rows of frames, or, as .mp4 or .gif, playing side by side."""
    from rin_video.media import write_image_grid, write_video

    path = Path(path)
    check_sheet(path)
    if samples[0].ndim not in (3, 4):
        raise UsageError(f"samples of shape {tuple(samples[0].shape)} are no pictures: leave out --out")
    clips = [x if x.ndim == 4 else x[:, None] for x in samples]
    moving = path.suffix.lower() in (".mp4", ".gif")
    if moving and samples[0].ndim == 3:
        raise UsageError(f"{path}: images do not move: use --out sheet.png")
    if not moving and samples[0].ndim == 4:
        sheet = _stack([_titled(_row(clip), text) for clip, text in zip(clips, texts, strict=True)], columns=1)
        write_image_grid(sheet[None], path)
        return
    columns = int(np.ceil(len(clips) ** 0.5))
    length = max(clip.shape[1] for clip in clips)
    frames = [
        _stack(
            [_titled(_enlarged(c[:, min(f, c.shape[1] - 1)]), t) for c, t in zip(clips, texts, strict=True)], columns
        )
        for f in range(length)
    ]
    if not moving:
        write_image_grid(frames[0][None], path)
        return
    clip = torch.stack(frames, dim=1)
    write_video(torch.nn.functional.pad(clip, (0, clip.shape[-1] % 2, 0, clip.shape[-2] % 2)), path, fps)


def statistics(dataset: Any, samples: list[Tensor], chosen: list[int]) -> list[str]:
    """Classes, durations, sizes; mean and standard deviation of the samples' channels in [0, 1]."""
    lines = []
    if dataset.classes and hasattr(dataset, "labels"):
        counts = Counter(dataset.labels)
        lines.append(
            "samples of each class: " + ", ".join(f"{shown(c)} {counts[i]}" for i, c in enumerate(dataset.classes))
        )
    infos = getattr(dataset, "infos", [])
    if infos and isinstance(infos[0], VideoInfo):
        seconds = sorted(info.duration for info in infos)
        middle = seconds[len(seconds) // 2]
        several = f"{seconds[0]:.2f} to {seconds[-1]:.2f} s, median {middle:.2f} s"
        each = several if seconds[0] < seconds[-1] else f"{middle:.2f} s each"
        lines.append(f"durations: {each}, {sum(seconds):.1f} s in all")
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
    lines += [f"without movement: {still} of {counted(len(samples), 'sample')}"] if still else []
    lines += [f"of one colour: {len(flat)} of {len(samples)} ({', '.join(map(shown, flat[:3]))})"] if flat else []
    return lines


def _row(clip: Tensor) -> Tensor:
    """(C, F, H, W) to (C, H', W'): up to COLUMNS frames from first to last."""
    some = torch.linspace(0, clip.shape[1] - 1, min(COLUMNS, clip.shape[1])).round().long()
    return torch.cat([torch.nn.functional.pad(_enlarged(clip[:, f]), (0, MARGIN), value=255) for f in some], dim=-1)


def _enlarged(image: Tensor) -> Tensor:
    """RGB, and large enough to be seen."""
    image = image[:3].expand(3, -1, -1)
    factor = max(1, round(CELL / max(image.shape[-2:])))
    return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _titled(image: Tensor, text: str) -> Tensor:
    """A line of text above a picture."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(10)
    strip = Image.new("RGB", (image.shape[-1], LINE), "white")
    while len(text) > 1 and font.getlength(text) > strip.width:
        text = text[:-2] + "…"
    ImageDraw.Draw(strip).text((0, 0), text, fill="black", font=font)
    return torch.cat([torch.from_numpy(np.array(strip)).permute(2, 0, 1), image], dim=1)


def _stack(images: list[Tensor], columns: int) -> Tensor:
    """Pictures (3, H, W) of any size in a table, on white."""
    H, W = (max(image.shape[axis] for image in images) + MARGIN for axis in (1, 2))
    rows = -(-len(images) // columns)
    sheet = torch.full((3, rows * H, columns * W), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * H, i % columns * W
        sheet[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return sheet
