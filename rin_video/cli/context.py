"""Reads the conditions of samples from files: context frames, a start image, embeddings and captions."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.cli.rollout import SamplingPlan
from rin_video.config import Config, DataConfig
from rin_video.datasets.clip_sampler import nearest_in_time
from rin_video.datasets.decoding import open_video
from rin_video.datasets.extensions import CLIP_EXTENSIONS, IMAGE_EXTENSIONS
from rin_video.datasets.folders import find_files
from rin_video.datasets.probe import probe_video
from rin_video.datasets.reading import read_image
from rin_video.datasets.resize_crop import ResizeCrop
from rin_video.datasets.video_info import VideoInfo
from rin_video.diffusion.masks import known_frames_mask
from rin_video.errors import UsageError
from rin_video.wording import counted, ranged

log = logging.getLogger("rin_video")


def read_context_options(options: Namespace, plan: SamplingPlan, config: Config) -> dict[str, Any]:
    """Return the context and the observed mask of the samples, as arguments of `diffusion.sample`.

    Raises `UsageError` for flags that do not fit each other, the model or the clip.
    """
    for name, needs in (("context_frames", "context"), ("fill", "context"), ("image", None), ("context", None)):
        if getattr(options, name) is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if not plan.frames:
            raise UsageError(f"{flag} is for clips, but the samples are images")
        if needs and getattr(options, needs) is None:
            raise UsageError(f"{flag} selects frames of a clip: add --{needs} clip.mp4")
    if options.image is not None and options.context is not None:
        raise UsageError("--image and --context exclude each other: both set the first frames")
    if options.fill is not None and options.context_frames is not None:
        raise UsageError("--context-frames and --fill exclude each other: both set the known frames")
    if options.image is not None:
        return {"context": read_start_image(Path(options.image), plan.shape)}
    if options.context is None:
        return {}
    count, frames = config.sample.num_samples, options.context_frames
    if frames is not None and not 0 < frames < plan.frames:
        raise UsageError(
            f"--context-frames is {frames}, but the clips have {plan.frames}: use 1 to {plan.frames - 1}, "
            "or more --frames"
        )
    if options.fill is not None:
        if plan.is_rollout:
            raise UsageError(f"--fill requires a window as long as the clip: use --window {plan.frames}")
        known = known_frames_mask(plan.shape[1:], parse_fill(options.fill, plan.frames))
        context = read_context(Path(options.context), plan.shape, config.data, count, plan.frames)
        return {"context": context, "known": known}
    most = config.diffusion.known_frames[-1] if config.diffusion.known_frames else max(plan.frames // 2, 1)
    context = read_context(Path(options.context), plan.shape, config.data, count, frames, plan.frames, most)
    return {"context": context}


def read_embedding_options(options: Namespace, config: Config) -> dict[str, Any]:
    """Return the embeddings of the samples, from files or captions, as arguments of `diffusion.sample`.

    Sample i uses embedding i modulo their number. Raises `UsageError` if the model does not take them.
    """
    from rin_video.datasets.captions import TextEncoder
    from rin_video.datasets.embeddings import read_embedding

    captions, files = options.caption, options.embedding
    if not captions and not files:
        return {}
    if captions and files:
        raise UsageError("--caption and --embedding exclude each other: both set the embeddings")
    width, most = config.model.embedding_dim, config.model.embedding_tokens
    if not width:
        raise UsageError("the model was trained without embeddings and captions: leave out --caption and --embedding")
    if captions:
        source = config.data.text_encoder
        if source is None:
            raise UsageError("the model was not trained on captions: use --embedding FILE")
        rows, cut = TextEncoder(source).encode(captions, config.data.caption_tokens)
        if cut:
            log.warning(
                "%d of %d captions are longer than %d tokens and are truncated", cut, len(captions), rows.shape[1]
            )
        rows[[not caption.strip() for caption in captions]] = 0  # as in training for a file without a caption
        embeddings = list(rows)
    else:
        embeddings = [read_embedding(_existing(Path(file))) for file in files]
        for file, vectors in zip(files, embeddings, strict=True):
            if vectors.shape[1] != width or len(vectors) > most:
                raise UsageError(
                    f"{file} has {counted(len(vectors), 'vector')} of {vectors.shape[1]}, but the model takes "
                    f"1 to {most} of {width}"
                )
    longest = max(len(vectors) for vectors in embeddings)
    padded = torch.stack([torch.nn.functional.pad(v, (0, 0, 0, longest - len(v))) for v in embeddings])
    return {"embedding": padded[torch.arange(config.sample.num_samples) % len(embeddings)]}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return path


def read_context(
    path: Path,
    shape: tuple[int, ...],
    options: DataConfig,
    num: int,
    frames: int | None,
    length: int | None = None,
    most: int = 1,
) -> Tensor:
    """Read the first `frames` frames of a clip, or of the clips in a folder: uint8 (num, C, frames, H, W).

    Frames are sampled at the stride or rate of `options`, resized and centre-cropped to the H and W of `shape`
    (C, F, H, W). Without `frames`, all frames are read. But if these are `length` frames or more, which leaves nothing
    to generate, only the first `most` are read, and this is logged. Sample i uses clip i modulo their number. Raises
    `UsageError` if a clip is too short, or if the clips of a folder differ in length.
    """
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        raise UsageError(f"--context {path} is an image: use --image")
    files = find_files(path, CLIP_EXTENSIONS)[:num]
    infos = [probe_video(file, max_pixels=options.max_pixels) for file in files]
    chosen = [_indices(file, info, options, frames) for file, info in zip(files, infos, strict=True)]
    longest = max(map(len, chosen))
    if length is not None and longest >= length:
        taken = counted(min(most, length - 1), "frame")
        log.info("context: the first %s of %d in %s (--context-frames chooses how many)", taken, longest, path)
        chosen = [indices[: min(most, length - 1)] for indices in chosen]
    lengths = {len(indices) for indices in chosen}
    if len(lengths) > 1:
        raise UsageError(
            f"the clips of {path} have {ranged(min(lengths), max(lengths), 'frame')}: set --context-frames"
        )
    clips = [_read_clip(*clip, shape) for clip in zip(files, infos, chosen, strict=True)]
    return torch.stack([clips[i % len(clips)] for i in range(num)])


def read_start_image(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read an image as a clip of one frame, resized and centre-cropped: uint8 (C, 1, H, W)."""
    if path.suffix.lower() in CLIP_EXTENSIONS:
        raise UsageError(f"--image {path} is a clip: use --context")
    resize_crop = ResizeCrop((shape[-2], shape[-1]))
    return resize_crop(read_image(_existing(path), shape[0]), np.random.default_rng(0)).unsqueeze(1)


def parse_fill(text: str, frames: int) -> range:
    """Parse the frames to generate: `4:12` means frames 4 to 11. Raises `UsageError` if the clip has no such frames."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise UsageError(f"--fill {text} is not a range of frames: write FIRST:END, such as 4:12 for frames 4 to 11")
    unknown = range(int(found[1]), int(found[2]))
    if not len(unknown) or unknown.stop > frames:
        raise UsageError(
            f"--fill {text} is not within a clip of {frames} frames: write FIRST:END, with END at most {frames}"
        )
    if len(unknown) == frames:
        raise UsageError(f"--fill {text} is the complete clip: leave out --context and --fill")
    return unknown


def _read_clip(file: Path, info: VideoInfo, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    resize_crop = ResizeCrop((shape[-2], shape[-1]))
    with open_video(file, "auto", info) as video:  # all decoders give the same frames
        return resize_crop.read_clip(video, indices, info.size, np.random.default_rng(0), shape[0])


def _indices(file: Path, info: VideoInfo, options: DataConfig, frames: int | None) -> Sequence[int]:
    """Return the indices of the first `frames` frames, or of all, at the stride or the rate of training."""
    if options.fps is None:
        indices: Sequence[int] = range(0, info.num_frames, options.stride)
    else:
        wanted = np.arange(0, info.times[-1] + 0.5 / info.fps, 1 / options.fps)
        indices = nearest_in_time(info.times, wanted)
    if frames is not None and frames > len(indices):
        raise UsageError(
            f"{file} has {counted(len(indices), 'frame')} at this stride or rate, not {frames}: use a longer clip, or "
            f"fewer frames (--context-frames; with --fill, --frames)"
        )
    return indices[:frames]
