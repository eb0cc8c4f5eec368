"""`rin-video export`: converts clips, frames and arrays to MP4, GIF or an image."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rin_video.datasets.decoding import open_video
from rin_video.datasets.extensions import CLIP_EXTENSIONS, IMAGE_EXTENSIONS
from rin_video.datasets.reading import read_animation, read_image
from rin_video.datasets.steady import is_steady, steady_clip, steady_frames
from rin_video.datasets.video_info import is_webp
from rin_video.errors import UsageError
from rin_video.media import (
    ARRAY_KEY,
    ARRAY_SUFFIXES,
    CHANNELS,
    DEFAULT_FPS,
    PICTURE_SUFFIXES,
    SHEET_FRAMES,
    VIDEO_SUFFIXES,
    StrPath,
    _evenly_spaced,
    _padding_note,
    _require_unit_range,
    check_target,
    contact_sheet,
    save_parts,
    save_samples,
)
from rin_video.wording import counted

ANIMATED = (".png", ".apng", ".avif")  # images that may have several frames
BLOCK_PIXELS = 32_000_000  # pixels of a clip to keep in memory during its conversion


def load_media(path: StrPath) -> tuple[Tensor, float | None]:
    """Read a clip, an image, a folder of frames or an array; return a tensor, and the frames per second or None.

    Clips and animated images (WebP, APNG, AVIF) are uint8 (C, F, H, W), images are uint8 (C, H, W). A clip with a
    variable frame rate is resampled to the nearest frames. Arrays (.npy, .safetensors) keep their dtype and are
    (C, H, W), (C, F, H, W), (B, C, H, W) or (B, C, F, H, W). In an array of rank 4, a second axis of 1 or 3 means a
    batch of images. The channels may be the last axis if no other axis can be the channels. Raises `UsageError` if the
    file does not exist or cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _read_frames(path), None
    if not path.is_file():
        raise UsageError(f"there is no file or folder {path}")
    if suffix in ARRAY_SUFFIXES:
        array = _channels_first(_read_array(path), path)
        _require_unit_range(array, f"the values of {path}")
        return array, None
    if _is_clip(path):
        with open_video(path) as video:
            frames, fps = steady_clip(video.info)
            return video.read(frames).transpose(0, 1), fps
    if suffix in (*IMAGE_EXTENSIONS, *ANIMATED):
        animation = read_animation(path) if suffix in ANIMATED else None
        if animation is None:
            return read_image(path), None
        clip, times, duration = animation
        frames, fps = steady_frames(times, duration, clip.shape[1] / duration)
        return clip[:, frames], fps
    known = (*CLIP_EXTENSIONS, *IMAGE_EXTENSIONS, ".apng", *ARRAY_SUFFIXES)
    raise UsageError(f"cannot read {path}: use a folder of frames, or a file of type {', '.join(known)}")


def export(input: StrPath, output: StrPath, fps: float | None = None) -> str:
    """Convert any input of `load_media` to MP4, GIF or a PNG sheet; return a short report.

    Without `fps`, the output has the rate of the input, or 8 if the input has none. Raises `UsageError` if the input
    cannot be read or the output cannot be written.
    """
    source, target = Path(input), Path(output)
    if target.suffix.lower() not in (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES):
        known = ", ".join((*VIDEO_SUFFIXES, *PICTURE_SUFFIXES))
        raise UsageError(f"cannot write {target}: use a name that ends in one of {known}")
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"{target} is also the input: use another name for the output")
    if source.is_file() and _is_clip(source):
        return _export_clip(source, target, fps)
    media, source_fps = load_media(source)
    is_array, moves = source.suffix.lower() in ARRAY_SUFFIXES, target.suffix.lower() in VIDEO_SUFFIXES
    if is_array and moves and media.ndim == 4 and media.shape[0] not in CHANNELS and media.shape[1] in CHANNELS:
        media = media.transpose(0, 1)  # a video is written, so this axis has the frames of a clip
    is_batch = media.ndim == 5 or (is_array and not moves and _is_image_batch(media))
    batch = media if is_batch else media[None]
    rate = fps if fps is not None else source_fps or DEFAULT_FPS
    read = f"read {source}: {_summary(batch)}" + (f", {source_fps:g} fps" if source_fps else "")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        save_samples(batch, target, rate)
    shown = f", {rate:g} fps" if target.suffix.lower() in VIDEO_SUFFIXES else ""
    return "\n".join([read, f"wrote {target}{shown}", *(str(note.message) for note in notes)])


def _export_clip(source: Path, target: Path, fps: float | None) -> str:
    """Convert a clip file; read only the frames to write, and for an MP4 only a part at a time."""
    suffix = target.suffix.lower()
    with open_video(source) as video, warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        H, W = video.size
        frames, steady = steady_clip(video.info)
        rate = fps if fps is not None else steady
        check_target(target, 5, rate)
        read = f"read {source}: {counted(video.num_frames, 'frame')} of {H}x{W}, {video.fps:g} fps"
        if not is_steady(video.info.times):
            read += f" on average: the rate varies, so the nearest frames at {steady:g} fps are used"
        if suffix in PICTURE_SUFFIXES:
            chosen = [frames[i] for i in _evenly_spaced(len(frames), SHEET_FRAMES)]
            contact_sheet(video.read(chosen).transpose(0, 1)[None], target)
        elif suffix == ".mp4":
            block = max(1, BLOCK_PIXELS // (H * W))
            starts = range(0, len(frames), block)
            parts = (video.read(frames[start : start + block]).transpose(0, 1) for start in starts)
            save_parts((part[None] for part in parts), target, rate)
            if note := _padding_note(H, W):
                warnings.warn(f"{target}: {note}", stacklevel=2)
        else:
            save_samples(video.read(frames).transpose(0, 1)[None], target, rate)
    wrote = f"wrote {target}, {rate:g} fps" if suffix in VIDEO_SUFFIXES else f"wrote {target}"
    return "\n".join([read, wrote, *(str(note.message) for note in notes)])


def _read_array(path: Path) -> Tensor:
    try:
        if path.suffix.lower() == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        from safetensors.torch import load_file

        arrays = load_file(path)
    except Exception as error:
        raise UsageError(f"{path} cannot be read as an array: {error}") from error
    if ARRAY_KEY not in arrays and len(arrays) != 1:
        raise UsageError(f"{path} has the arrays {', '.join(arrays) or '(none)'}: name the one to use {ARRAY_KEY!r}")
    return arrays.get(ARRAY_KEY, next(iter(arrays.values())))


def _channels_first(array: Tensor, path: Path) -> Tensor:
    shape = array.shape
    channel_axes = {3: (0,), 4: (1, 0), 5: (1,)}.get(array.ndim, ())
    if any(shape[axis] in (1, 3) for axis in channel_axes):
        return array
    if channel_axes and shape[-1] in (1, 3):
        return array.movedim(-1, 1 if array.ndim == 5 else 0)
    raise UsageError(
        f"{path} has shape {tuple(shape)}: use (C, H, W), (C, F, H, W), (B, C, H, W) or (B, C, F, H, W) with C 1 or 3"
    )


def _is_clip(path: Path) -> bool:
    """Return whether the decoders of clips read a file."""
    return path.suffix.lower() in CLIP_EXTENSIONS or is_webp(path, moving=True)


def _is_image_batch(media: Tensor) -> bool:
    return media.ndim == 4 and media.shape[1] in CHANNELS


def _read_frames(folder: Path) -> Tensor:
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_EXTENSIONS and file.name[0] != "."]
    if not files:
        raise UsageError(f"{folder} has no frames, which are files of type {', '.join(IMAGE_EXTENSIONS)}")
    files.sort(key=lambda file: _natural_order(file.name))
    frames = [read_image(file) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if frame.shape != frames[0].shape:
            (H, W), (H_first, W_first) = frame.shape[1:], frames[0].shape[1:]
            raise UsageError(
                f"frame {file} is {H}x{W}, but {files[0].name} is {H_first}x{W_first}: resize them to one size"
            )
    return torch.stack(frames, dim=1)


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _summary(batch: Tensor) -> str:
    size = f"{batch.shape[-2]}x{batch.shape[-1]}"
    if batch.ndim == 4:
        return f"{counted(len(batch), 'image')} of {size}"
    frames = f"{counted(batch.shape[2], 'frame')} of {size}"
    return f"{counted(len(batch), 'clip')} of {frames}" if len(batch) > 1 else frames
