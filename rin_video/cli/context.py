"""Reading what a sample is given from files: frames of a clip, an image; and which frames are to be invented."""

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

from rin_video.cli.rollout import Pass
from rin_video.config import Config, DataConfig
from rin_video.datasets.clip_sampler import nearest_in_time
from rin_video.datasets.decoding import open_video
from rin_video.datasets.extensions import CLIP_EXTENSIONS
from rin_video.datasets.folders import find_files
from rin_video.datasets.probe import probe_video
from rin_video.datasets.reading import read_image
from rin_video.datasets.resize_crop import ResizeCrop
from rin_video.datasets.video_info import VideoInfo
from rin_video.diffusion.masks import known_frames_mask
from rin_video.errors import UsageError
from rin_video.wording import counted, ranged

log = logging.getLogger("rin_video")


def read_context_options(options: Namespace, pass_: Pass, config: Config) -> dict[str, Any]:
    """The context of the samples, and what of it is known, as arguments of `diffusion.sample`."""
    for name, needs in (("context_frames", "context"), ("fill", "context"), ("image", None), ("context", None)):
        if getattr(options, name) is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if not pass_.frames:
            raise UsageError(f"{flag} is for clips, and these are images")
        if needs and getattr(options, needs) is None:
            raise UsageError(f"{flag} says which frames are given, but not of what: give --{needs} clip.mp4")
    if options.image is not None and options.context is not None:
        raise UsageError("give either --image or --context: both are the start")
    if options.fill is not None and options.context_frames is not None:
        raise UsageError("give either --context-frames or --fill: both say which frames are given")
    if options.image is not None:
        return {"context": read_start_image(Path(options.image), pass_.shape)}
    if options.context is None:
        return {}
    count, frames = config.sample.num_samples, options.context_frames
    if frames is not None and not 0 < frames < pass_.frames:
        raise UsageError(
            f"--context-frames is {frames}, the clips have {pass_.frames}: give 1 to {pass_.frames - 1}, "
            "or more --frames"
        )
    if options.fill is not None:
        if pass_.extends:
            raise UsageError(f"--fill needs the whole clip in one pass: use --window {pass_.frames}")
        known = known_frames_mask(pass_.shape[1:], parse_fill(options.fill, pass_.frames))
        context = read_context(Path(options.context), pass_.shape, config.data, count, pass_.frames)
        return {"context": context, "known": known}
    most = config.diffusion.known_frames[-1] if config.diffusion.known_frames else max(pass_.frames // 2, 1)
    context = read_context(Path(options.context), pass_.shape, config.data, count, frames, pass_.frames, most)
    return {"context": context}


def read_embedding_options(options: Namespace, config: Config) -> dict[str, Any]:
    """The embeddings of the samples, from files or from captions, as arguments of `diffusion.sample`.

    Several go round: sample i gets the i-th, and they start again behind the last.
    """
    from rin_video.datasets.captions import TextEncoder
    from rin_video.datasets.embeddings import read_embedding

    captions, files = options.caption, options.embedding
    if not captions and not files:
        return {}
    if captions and files:
        raise UsageError("give either --caption or --embedding: both say what the samples are to be")
    width, most = config.model.embedding_dim, config.model.embedding_tokens
    if not width:
        raise UsageError("the model was trained without embeddings or captions: it takes no --caption, no --embedding")
    if captions:
        source = config.data.text_encoder
        if source is None:
            raise UsageError("the model was not trained on captions: give --embedding FILE")
        rows, cut = TextEncoder(source).encode(captions, config.data.caption_tokens)
        if cut:
            log.warning("%d of %d captions are longer than %d tokens: cut", cut, len(captions), rows.shape[1])
        rows[[not caption.strip() for caption in captions]] = 0  # as training takes a file without one
        told = list(rows)
    else:
        told = [read_embedding(_existing(Path(file))) for file in files]
        for file, vectors in zip(files, told, strict=True):
            if vectors.shape[1] != width or len(vectors) > most:
                raise UsageError(
                    f"{file} holds {counted(len(vectors), 'vector')} of {vectors.shape[1]}, the model takes "
                    f"1 to {most} of {width}"
                )
    longest = max(len(vectors) for vectors in told)
    padded = torch.stack([torch.nn.functional.pad(v, (0, 0, 0, longest - len(v))) for v in told])
    return {"embedding": padded[torch.arange(config.sample.num_samples) % len(told)]}


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
    """The first `frames` frames of a clip, as training would cut them: uint8 (num, C, frames, H, W).

    At the stride or rate of `options`, resized and cropped at the centre to the H and W of `shape` (C, F, H, W). None:
    all frames; the first `most` of a clip that leaves nothing to invent of `length` frames, which is logged. A folder
    gives sample i its i-th clip, and starts again after the last. Lengths are looked at before anything is read.
    """
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
            f"the clips of {path} have {ranged(min(lengths), max(lengths), 'frame')}: give --context-frames"
        )
    clips = [_read_clip(*clip, shape) for clip in zip(files, infos, chosen, strict=True)]
    return torch.stack([clips[i % len(clips)] for i in range(num)])


def read_start_image(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An image as a clip of one frame, resized and cropped at the centre: uint8 (C, 1, H, W)."""
    resize_crop = ResizeCrop((shape[-2], shape[-1]))
    return resize_crop(read_image(_existing(path), shape[0]), np.random.default_rng(0)).unsqueeze(1)


def parse_fill(text: str, frames: int) -> range:
    """`4:12` is frames 4 to 11, those to invent, as in Python. `UsageError` where the clip has no such frames."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise UsageError(f"--fill {text} is not understood: write FIRST:END, 4:12 for frames 4 to 11")
    invented = range(int(found[1]), int(found[2]))
    if not len(invented) or invented.stop > frames:
        raise UsageError(f"--fill {text} names no frames of a clip of {frames}: write FIRST:END, up to {frames}")
    if len(invented) == frames:
        raise UsageError(f"--fill {text} is the whole clip: leave out --context and --fill")
    return invented


def _read_clip(file: Path, info: VideoInfo, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    resize_crop = ResizeCrop((shape[-2], shape[-1]))
    with open_video(file, "auto", info) as video:  # all decoders give the same frames
        return resize_crop.read_clip(video, indices, info.size, np.random.default_rng(0), shape[0])


def _indices(file: Path, info: VideoInfo, options: DataConfig, frames: int | None) -> Sequence[int]:
    """The first frames of a file, or all of them, at the stride or the rate of training."""
    if options.fps is None:
        indices: Sequence[int] = range(0, info.num_frames, options.stride)
    else:
        wanted = np.arange(0, info.times[-1] + 0.5 / info.fps, 1 / options.fps)
        indices = nearest_in_time(info.times, wanted)
    if frames is not None and frames > len(indices):
        raise UsageError(
            f"{file} has {counted(len(indices), 'frame')} at this stride or rate, not {frames}: give a longer clip, or "
            f"fewer frames (--context-frames, with --fill --frames)"
        )
    return indices[:frames]
