"""Writing of samples as MP4, GIF, PNG and arrays; all media files are written by this module.

Samples are torch tensors or numpy arrays with channels first, floats in [0, 1] or uint8. Files are written atomically,
so a failed write leaves no file behind.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rin_video.errors import UsageError
from rin_video.files import ARRAY_KEY, ARRAY_SUFFIXES, atomic_write

StrPath = str | PathLike[str]
Samples = Tensor | np.ndarray | Sequence[Tensor]  # a batch, or samples of different sizes

CHANNELS = (1, 3)
VIDEO_SUFFIXES = (".mp4", ".gif")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DEFAULT_FPS = 8
MAX_GIF_FPS = 50  # browsers slow down faster GIFs
TOLERANCE = 1e-3  # how far outside [0, 1] a value may be
SMPTE_170M, LIMITED_RANGE = 6, 1  # FFmpeg's numbers for BT.601 colours and for luma from 16 to 235
SHEET_FRAMES = 8  # frames per clip on a contact sheet
ENCODER = "libx264"
LONGEST_NAME = 100  # bytes of a title in a file name
LONGEST_TITLE = 300  # characters of a title that are drawn
MARGIN = 2  # pixels between the pictures of a grid
TITLE_HEIGHT = 12  # pixels above a picture


def write_video(clip: Tensor | np.ndarray, path: StrPath, fps: float = DEFAULT_FPS, *, crf: int = 18) -> None:
    """Write a clip (C, F, H, W), C 1 or 3, as H.264 MP4 for browsers or as GIF, depending on the suffix of `path`.

    H.264 requires even sizes: for an odd H or W, the last row or column is repeated and a warning is issued. A GIF
    stores consecutive equal frames as one longer frame. `crf` is the quality of the MP4; smaller is better. Raises
    `UsageError` if the clip cannot be written.
    """
    path = Path(path)
    note = _write_clip(as_pixels(clip), path, fps, crf)
    if note:
        warnings.warn(f"{path}: {note}", stacklevel=2)


class VideoWriter:
    """A context manager that writes an H.264 MP4 in parts, so that memory does not grow with the length of the clip.

    All frames must have the same size. The file appears when the block succeeds. `crf` is the quality; smaller is
    better. `options` are further options of libx264. Raises `UsageError` if `path` is not an .mp4 file.
    """

    def __init__(self, path: StrPath, fps: float = DEFAULT_FPS, *, crf: int = 18, **options: str) -> None:
        if Path(path).suffix.lower() != ".mp4":
            raise UsageError(f"only .mp4 can be written in parts, not {path}")
        # Without cpu-independent, x264's rate control reads beyond small frames and gives different bytes every time.
        self.options = {"crf": str(crf), "x264-params": "cpu-independent=1", **options}
        self.path = Path(path)
        self.rate = Fraction(fps).limit_denominator(1001)
        self._stack = ExitStack()
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        import av

        require_encoder(self.path)
        temporary = self._stack.enter_context(_replacing(self.path))
        self._container = self._stack.enter_context(av.open(temporary, "w", options={"movflags": "+faststart"}))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._stack.__exit__(kind, error, trace)

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append frames (C, F, H, W), C 1 or 3, floats in [0, 1] or uint8."""
        import av

        frames = as_pixels(frames).expand(3, -1, -1, -1)
        H, W = frames.shape[2:]
        frames = F.pad(frames.float(), (0, W % 2, 0, H % 2), mode="replicate").byte()  # H.264 requires even sizes
        if self._stream is None:
            self._stream = self._open_stream(frames.shape[2], frames.shape[3])
        for pixels in rearrange(frames, "c f h w -> f h w c").contiguous().numpy():
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def _open_stream(self, height: int, width: int) -> Any:
        stream: Any = self._container.add_stream(ENCODER, rate=self.rate, options=self.options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context  # without colour metadata players guess: it is BT.601, limited range
        context.color_primaries = context.color_trc = context.colorspace = SMPTE_170M
        context.color_range = LIMITED_RANGE
        return stream


def write_image_grid(
    images: Samples,
    path: StrPath,
    columns: int | None = None,
    upscale: int = 1,
    titles: Sequence[str] | None = None,
) -> None:
    """Write images (B, C, H, W) as a grid with `columns` columns, by default a square grid."""
    _write_picture(_grid([as_pixels(image) for image in images], columns, upscale, titles), Path(path))


def contact_sheet(
    clips: Samples,
    path: StrPath,
    max_frames: int = SHEET_FRAMES,
    upscale: int = 1,
    titles: Sequence[str] | None = None,
) -> None:
    """Write clips (B, C, F, H, W) as a picture with one row per clip: up to `max_frames` evenly spaced frames."""
    rows = [_row(as_pixels(clip), max_frames, upscale) for clip in clips]
    _write_picture(_grid(rows, 1, titles=titles), Path(path))


def video_grid(
    clips: Samples, columns: int | None = None, upscale: int = 1, titles: Sequence[str] | None = None
) -> Tensor:
    """Arrange clips (B, C, F, H, W) in a grid, as one uint8 clip (3, F, H', W'); short clips hold their last frame."""
    clips = [as_pixels(clip) for clip in clips]
    frames = [[clip[:, min(f, clip.shape[1] - 1)] for clip in clips] for f in range(max(c.shape[1] for c in clips))]
    return torch.stack([_grid(images, columns, upscale, titles) for images in frames], dim=1)


def save_samples(
    samples: Tensor | np.ndarray,
    path: StrPath,
    fps: float = DEFAULT_FPS,
    upscale: int = 1,
    titles: Sequence[str] | None = None,
) -> list[Path]:
    """Write samples (B, C, *grid) in the format of the suffix of `path`; return the files written.

    Images are written as one grid (.png, .jpg or .webp). Clips are written as one grid (.mp4 or .gif), or as a contact
    sheet (.png, .jpg or .webp). A path without suffix is a folder with one .png or .mp4 per sample. Samples of any
    shape can be written unchanged as .npy or .safetensors. `titles`, one per sample, appear above the pictures and in
    the names of single files. Raises `UsageError` if the samples do not fit the format.
    """
    path, samples = Path(path), torch.as_tensor(samples).detach().cpu()
    check_target(path, samples.ndim, fps, channels=samples.shape[1] if samples.ndim > 1 else None)
    suffix = path.suffix.lower()
    is_clips = samples.ndim == 5
    if suffix in ARRAY_SUFFIXES:
        _write_array(samples, path)
        return [path]
    if not suffix:
        files = sample_files(path, len(samples), ".mp4" if is_clips else ".png", titles)
        return [
            file
            for one, file in zip(samples, files, strict=True)
            for file in save_samples(one[None], file, fps, upscale)
        ]
    if suffix in VIDEO_SUFFIXES and is_clips:
        write_video(video_grid(samples, upscale=upscale, titles=titles), path, fps)
    elif suffix in PICTURE_SUFFIXES and is_clips:
        contact_sheet(samples, path, upscale=upscale, titles=titles)
    else:
        write_image_grid(samples, path, upscale=upscale, titles=titles)
    return [path]


def save_parts(
    parts: Iterable[Tensor], path: StrPath, fps: float = DEFAULT_FPS, titles: Sequence[str] | None = None
) -> list[Path]:
    """Write clips that arrive in parts (B, C, f, H, W), like `save_samples`; return the files written.

    For .mp4, or a folder of .mp4 files, only one part is held in memory; for other formats, all parts are.
    """
    path, parts = Path(path), iter(parts)
    if path.suffix.lower() not in ("", ".mp4"):
        return save_samples(torch.cat([as_pixels(part) for part in parts], dim=2), path, fps, titles=titles)
    first = next(parts)
    files = [path] if path.suffix else sample_files(path, len(first), ".mp4", titles)
    with ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(file, fps)) for file in files]
        for part in chain([first], parts):
            clips = [video_grid(part, titles=titles)] if path.suffix else part.unbind(0)
            for writer, clip in zip(writers, clips, strict=True):
                writer.write(clip)
    return files


def sample_files(folder: Path, count: int, suffix: str, titles: Sequence[str] | None = None) -> list[Path]:
    """Return a file name for every sample: its number and its title, which is made safe for any file system."""
    names = [_cut(re.sub(r"[^\w-]+", "_", title), LONGEST_NAME) for title in titles or [""] * count]
    return [folder / f"{index:04d}{'-' if name else ''}{name}{suffix}" for index, name in enumerate(names)]


def _cut(text: str, size: int) -> str:
    """Truncate a text to at most `size` bytes without splitting a character."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


def can_be_picture(shape: Sequence[int]) -> bool:
    """Return whether samples (B, C, H, W) or (B, C, F, H, W) have 1, 3 or 4 channels, as pictures do."""
    return len(shape) in (4, 5) and shape[1] in (1, 3, 4)


def check_target(path: StrPath, rank: int, fps: float, channels: int | None = None) -> None:
    """Raise `UsageError` if samples cannot be written to `path`, to fail before they are generated.

    `rank` includes the batch axis.
    """
    suffix = Path(path).suffix.lower()
    check_folder(Path(path).parent if suffix else Path(path))
    if not 0 < fps < math.inf:
        raise UsageError(f"fps is {fps:g}: it must be a number above 0")
    if suffix in ARRAY_SUFFIXES:
        return
    if rank not in (4, 5):
        raise UsageError(f"samples of rank {rank} are not pictures: use {' or '.join(ARRAY_SUFFIXES)}, not {path}")
    known = (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES) if rank == 5 else PICTURE_SUFFIXES
    if suffix and suffix not in known:
        kind = "clips" if rank == 5 else "images"
        raise UsageError(f"{kind} cannot be written as {suffix} ({path}): use {', '.join((*known, *ARRAY_SUFFIXES))}")
    moving = suffix in VIDEO_SUFFIXES or (not suffix and rank == 5)
    if channels is not None and channels not in ((1, 3) if moving else (1, 3, 4)):
        kind = "clips" if moving else "pictures"
        raise UsageError(f"{path}: {kind} cannot have {channels} channels: use {' or '.join(ARRAY_SUFFIXES)}")
    if channels == 4 and suffix in (".jpg", ".jpeg"):
        raise UsageError(f"cannot write transparency as {path}: use .png or .webp")
    if suffix == ".mp4" or (not suffix and rank == 5):
        require_encoder(path)
    if suffix == ".gif" and fps > MAX_GIF_FPS:
        raise UsageError(f"{path}: browsers slow down a GIF with {fps:g} fps: use at most {MAX_GIF_FPS}, or .mp4")


def require_encoder(path: StrPath) -> None:
    """Raise `UsageError` if the installed PyAV cannot encode H.264."""
    import av

    if ENCODER not in av.codecs_available:
        raise UsageError(
            f"{path} cannot be written because this PyAV was built without {ENCODER}: pip install av (from PyPI), or "
            "use .gif or .png"
        )


def check_folder(folder: Path) -> None:
    """Raise `UsageError` if files cannot be written to `folder`, which need not exist yet."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file, not a folder: choose another path")
    if not os.access(there, os.W_OK):
        raise UsageError(f"the folder {there} is not writable: choose another path")


def _evenly_spaced(length: int, num: int) -> list[int]:
    return torch.linspace(0, length - 1, min(num, length)).round().long().tolist()


def _padding_note(height: int, width: int) -> str | None:
    if height % 2 == width % 2 == 0:
        return None
    padded = f"{height + height % 2}x{width + width % 2}"
    return f"padded from {height}x{width} to {padded}, because H.264 requires even sizes"


def as_pixels(values: Tensor | np.ndarray) -> Tensor:
    """Convert floats in [0, 1] to uint8 on the CPU; uint8 is returned unchanged.

    Raises a `UsageError` with the range if values are outside [0, 1].
    """
    values = torch.as_tensor(values).detach().cpu()
    _require_unit_range(values, "the samples")
    return values if values.dtype == torch.uint8 else (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _require_unit_range(values: Tensor, name: str) -> None:
    if values.dtype == torch.uint8:
        return
    if not values.is_floating_point() or not values.numel():
        raise UsageError(f"{name}: {values.dtype} of shape {tuple(values.shape)}: pass uint8, or floats in [0, 1]")
    low, high = values.min().item(), values.max().item()
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # false for NaN too
        raise UsageError(f"{name} range from {low:g} to {high:g}: scale them to [0, 1], or to uint8")


def _write_clip(clip: Tensor, path: Path, fps: float, crf: int) -> str | None:
    """Write a clip; return a description of what had to be changed, or None."""
    if clip.ndim != 4 or clip.shape[0] not in (1, 3) or not clip.numel():
        raise UsageError(f"a clip must be (C, F, H, W) with 1 or 3 channels, not {tuple(clip.shape)}")
    if not 0 < fps < math.inf:
        raise UsageError(f"fps is {fps:g}: it must be a number above 0")
    suffix = path.suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise UsageError(f"cannot write a clip as {path}: use {' or '.join(VIDEO_SUFFIXES)}")
    clip = clip.expand(3, -1, -1, -1)
    if suffix == ".gif":
        _write_gif(clip, path, fps)
        return None
    H, W = clip.shape[2:]
    with VideoWriter(path, fps, crf=crf) as writer:
        writer.write(clip)
    return _padding_note(H, W)


def _write_gif(clip: Tensor, path: Path, fps: float) -> None:
    from PIL import Image

    if fps > MAX_GIF_FPS:
        raise UsageError(f"a GIF has at most {MAX_GIF_FPS} fps, not {fps:g}: lower fps or use .mp4")
    frames = [Image.fromarray(pixels) for pixels in rearrange(clip, "c f h w -> f h w c").contiguous().numpy()]
    # Use one palette for the clip, computed from some of its frames, so that static parts do not flicker.
    some = frames[:: -(-len(frames) // 16)]
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in some])).quantize(256)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    # GIF durations are in hundredths of a second: round the times, not the durations, so that errors do not add up.
    times = [round(100 * index / fps) for index in range(len(frames) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(times)]
    with _replacing(path) as temporary:
        indexed[0].save(temporary, save_all=True, append_images=indexed[1:], duration=durations, loop=0)


def _write_picture(pixels: Tensor, path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UsageError(f"cannot write a picture as {path}: use one of {', '.join(PICTURE_SUFFIXES)}")
    if len(pixels) == 4 and path.suffix.lower() in (".jpg", ".jpeg"):
        raise UsageError(f"cannot write transparency as {path}: use .png or .webp")
    with _replacing(path) as temporary:
        Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy()).save(temporary, quality=95)


def _write_array(samples: Tensor, path: Path) -> None:
    with _replacing(path) as temporary:
        if path.suffix.lower() == ".npy":
            np.save(temporary, samples.numpy())
        else:
            from safetensors.torch import save_file

            save_file({ARRAY_KEY: samples.contiguous()}, temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """Like `atomic_write` without sync, but creates missing folders and raises a `UsageError` that names the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, unique=True, durable=False) as temporary:
            yield str(temporary)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _grid(
    images: Sequence[Tensor], columns: int | None, upscale: int = 1, titles: Sequence[str] | None = None
) -> Tensor:
    """Arrange uint8 images (C, H, W) in a grid (3, H', W'), with 4 channels if C is 4; one image gets no margin."""
    from torchvision.utils import make_grid

    for image in images:
        if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or not image.numel():
            raise UsageError(f"images must be (C, H, W) with 1, 3 or 4 channels, not {tuple(image.shape)}")
    images = [image.repeat_interleave(upscale, -2).repeat_interleave(upscale, -1) for image in images]
    if titles:
        images = [
            torch.cat([_title(title, *image.shape[::2]), image], dim=1)
            for title, image in zip(titles, images, strict=True)
        ]
    H, W = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = [F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in images]
    columns = columns or math.ceil(len(images) ** 0.5)
    return make_grid(padded, nrow=columns, padding=MARGIN if len(images) > 1 else 0)


def _row(clip: Tensor, max_frames: int, upscale: int) -> Tensor:
    """Arrange evenly spaced frames of a clip (C, F, H, W) in a row (C, H', W')."""
    if clip.ndim != 4:
        raise UsageError(f"clips must be (C, F, H, W), not {tuple(clip.shape)}")
    frames = clip[:, _evenly_spaced(clip.shape[1], max_frames)].repeat_interleave(upscale, -2)
    frames = F.pad(frames.repeat_interleave(upscale, -1), (0, MARGIN))
    return rearrange(frames, "c f h w -> c h (f w)")[..., :-MARGIN]


@lru_cache(maxsize=1024)
def _title(text: str, channels: int, width: int) -> Tensor:
    """Draw a title in white on black, uint8 (channels, TITLE_HEIGHT, width); long titles are truncated."""
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("L", (width, TITLE_HEIGHT))
    text = " ".join(text.split())[:LONGEST_TITLE].encode("utf-8", "replace").decode()
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(TITLE_HEIGHT - 2)
    try:
        draw.text((1, 0), text, fill=255, font=font)
    except UnicodeEncodeError:  # Pillow without FreeType only supports Latin letters
        draw.text((1, 0), text.encode("ascii", "replace").decode(), fill=255, font=font)
    pixels = torch.from_numpy(np.array(strip)).expand(channels, -1, -1)
    return torch.cat([pixels[:3], torch.full_like(pixels[:1], 255)]) if channels == 4 else pixels
