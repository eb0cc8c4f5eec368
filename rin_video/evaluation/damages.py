"""Damages of known kind and strength, to test whether a distance between sets of samples rises when samples get worse.

Every damage is a function of uint8 clips (n, C, F, H, W) or images (n, C, H, W), a strength of 1, 2 or 3, and a seed,
and does not depend on torch's or numpy's global generators. Stronger damages contain the weaker ones where that is
possible: the noise has the same pattern, the reversed clips include those reversed before. Sizes in pixels are for
heights up to 64 and grow with larger ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rin_video.errors import UsageError

STRENGTHS = (1, 2, 3)
MOVING = 0.1  # deviation from the median picture of a clip, as a fraction of the range, that counts as motion
BLUR = (0.5, 1.0, 2.0)  # standard deviation of the Gaussian, in pixels
NOISE = (0.02, 0.05, 0.12)  # standard deviation, as a fraction of the range
QUALITY = (40, 20, 8)  # of JPEG
COLOUR = (0.03, 0.08, 0.2)  # shift of the first channel up and of the last one down, as a fraction of the range
SEAMS = (0.02, 0.05, 0.12)  # standard deviation of the brightness of a patch, as a fraction of the range
PATCH = 8  # side of a patch, in pixels
FROZEN = (1 / 4, 1 / 2, 1)  # fraction of the frames
REVERSED = (1 / 3, 2 / 3, 1)  # fraction of the clips
REPEATED = (8, 4, 2)  # one frame in so many repeats its predecessor
ERASED = (1 / 4, 1 / 2, 1)  # fraction of the moving pixels
CLUSTERS = 4  # modes of samples without classes


@dataclass(frozen=True)
class Damage:
    """A damage of the pixels of every sample: `function(x, strength, seed)`; a temporal one requires clips."""

    function: Callable[[Tensor, int, int], Tensor]
    temporal: bool
    strengths: tuple[str, str, str]  # what each strength means, for tables

    def __call__(self, x: Tensor, strength: int, seed: int = 0) -> Tensor:
        """Return damaged copies of uint8 samples of the same shape.

        Raises `UsageError` for other types, shapes and strengths, and for a temporal damage of images.
        """
        check_samples(x, strength)
        if self.temporal and x.ndim == 4:
            raise UsageError(f"images (n, C, H, W) of shape {tuple(x.shape)} have no time: pass clips (n, C, F, H, W)")
        return self.function(x, strength, seed)


def check_samples(x: Tensor, strength: int) -> None:
    """Raise `UsageError` unless `x` are uint8 images or clips and the strength is 1, 2 or 3."""
    if x.dtype != torch.uint8 or x.ndim not in (4, 5):
        raise UsageError(
            f"samples of {x.dtype} and shape {tuple(x.shape)} cannot be damaged: pass uint8 images (n, C, H, W) or "
            "clips (n, C, F, H, W)"
        )
    if strength not in STRENGTHS:
        raise UsageError(f"the strength of a damage is 1, 2 or 3, not {strength}")


def blur(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Blur every frame with a Gaussian; the border is mirrored."""
    sigma = BLUR[strength - 1] * _scale(x)
    radius = max(round(3 * sigma), 1)
    at = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    frames = _to_frames(x)
    for part in _parts(frames):
        planes = frames[part].flatten(0, 1)[:, None].float()
        planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), "reflect"), kernel[None, None, None])
        planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), "reflect"), kernel[None, None, :, None])
        frames[part] = _to_uint8(planes).view_as(frames[part])
    return _from_frames(frames, x)


def noise(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Add Gaussian noise, independent in every pixel, channel and frame."""
    std = 255 * NOISE[strength - 1]
    draws = ((clip, rng.standard_normal(clip.shape, np.float32)) for clip, rng in _each(x, seed))
    return torch.stack([_to_uint8(clip + std * torch.from_numpy(drawn)) for clip, drawn in draws])


def jpeg(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Compress every frame as JPEG and decompress it again."""
    from PIL import Image

    frames = _to_frames(x)
    if frames.shape[1] not in (1, 3):
        raise UsageError(f"JPEG has 1 or 3 channels, not {frames.shape[1]}: leave out this damage")
    for frame in frames:
        file, pixels = io.BytesIO(), frame.permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY[strength - 1])
        frame.copy_(torch.from_numpy(np.array(Image.open(file))).view(*frame.shape[1:], -1).permute(2, 0, 1))
    return _from_frames(frames, x)


def colour_shift(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Shift the first channel up and the last one down, equally in all samples; a single channel is shifted up."""
    shift = torch.linspace(1, -1, x.shape[1]) if x.shape[1] > 1 else torch.ones(1)
    shift = 255 * COLOUR[strength - 1] * shift.view(-1, *[1] * (x.ndim - 2))
    return torch.stack([_to_uint8(clip + shift) for clip in x])


def patch_seams(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Shift the brightness of every patch by its own amount, which stays the same in all frames of a clip."""
    side, (height, width) = max(round(PATCH * _scale(x)), 1), x.shape[-2:]
    std = 255 * SEAMS[strength - 1]
    damaged = []
    for clip, rng in _each(x, seed):
        shift = torch.from_numpy(rng.standard_normal((-(-height // side), -(-width // side)), np.float32))
        shift = shift.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
        damaged.append(_to_uint8(clip + std * shift))
    return torch.stack(damaged)


def frozen_start(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Replace the first frames by the first one."""
    count = max(round(FROZEN[strength - 1] * x.shape[2]), 1)
    return torch.cat([x[:, :, :1].expand(-1, -1, count, -1, -1), x[:, :, count:]], dim=2)


def shuffled_frames(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Permute the frames within windows of two frames, of half the clip, and of the entire clip.

    The windows begin at a random frame, and none keeps its order; the first and the last one may be shorter.
    """
    frames = x.shape[2]
    if frames < 2:
        raise UsageError(f"clips of {frames} frame have no order: pass at least 2 frames")
    window = (2, max(frames // 2, 2), frames)[strength - 1]
    return torch.stack([clip[:, _permutation(frames, window, rng)] for clip, rng in _each(x, seed)])


def reversed_clips(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Play some of the clips backwards."""
    chosen = np.random.default_rng(seed).permutation(len(x))[: round(REVERSED[strength - 1] * len(x))]
    damaged = x.clone()
    damaged[chosen] = x[chosen].flip(2)
    return damaged


def repeated_frames(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Replace one frame in eight, four or two by its predecessor, like a video that stutters."""
    every, frames = REPEATED[strength - 1], x.shape[2]
    damaged = []
    for clip, rng in _each(x, seed):
        phase = int(rng.integers(8)) % every
        damaged.append(clip[:, [t - 1 if t % every == phase and t else t for t in range(frames)]])
    return torch.stack(damaged)


def erased_motion(x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Replace a part of the moving pixels by the median picture of the clip.

    Pixels move where a channel deviates from the clip's median over time by more than `MOVING`. The erased ones lie
    together: they have the lowest values of a smooth random picture, which is the same in all frames.
    """
    height, width = x.shape[-2:]
    damaged = []
    for clip, rng in _each(x, seed):
        still = clip.float().quantile(0.5, dim=1, keepdim=True)
        moving = ((clip - still).abs() > 255 * MOVING).any(0)
        coarse = torch.from_numpy(rng.standard_normal((1, 1, 5, 5), np.float32))
        field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].expand_as(moving)
        rank = torch.full(moving.shape, torch.inf)
        order = field[moving].argsort(stable=True)
        rank[moving] = torch.empty(len(order)).scatter_(0, order, torch.arange(len(order), dtype=torch.float32))
        erased = rank < ERASED[strength - 1] * len(order)
        damaged.append(torch.where(erased, _to_uint8(still), clip))
    return torch.stack(damaged)


DAMAGES: dict[str, Damage] = {
    "blur": Damage(blur, False, ("0.5 pixels", "1 pixel", "2 pixels")),
    "noise": Damage(noise, False, ("2 %", "5 %", "12 %")),
    "jpeg": Damage(jpeg, False, ("quality 40", "20", "8")),
    "colour shift": Damage(colour_shift, False, ("3 %", "8 %", "20 %")),
    "patch seams": Damage(patch_seams, False, ("2 %", "5 %", "12 %")),
    "frozen start": Damage(frozen_start, True, ("1/4 of the frames", "1/2", "all")),
    "shuffled": Damage(shuffled_frames, True, ("within 2 frames", "half the clip", "the clip")),
    "reversed": Damage(reversed_clips, True, ("1/3 of the clips", "2/3", "all")),
    "repeated": Damage(repeated_frames, True, ("1 frame in 8", "in 4", "in 2")),
    "erased motion": Damage(erased_motion, True, ("1/4 of the moving pixels", "1/2", "all")),
}
MODES = ("one missing", "half", "all but one")  # the strengths of `drop_modes`


def drop_modes(labels: Sequence[int], spare: Sequence[int], strength: int, *, seed: int = 0) -> list[int]:
    """Choose samples so that one class is missing, half of the classes, or all but one; others take their places.

    `labels` are the classes of the samples and `spare` those of further samples. Returns as many indices as there are
    `labels`, into the samples followed by the spare ones. Of an odd number of classes, half of the samples of one class
    are missing in strength 2. Samples are only used twice when the spare ones do not suffice, because fewer different
    samples would be another damage. Raises `UsageError` if there are fewer than three classes.
    """
    classes = sorted({*labels})
    if len(classes) < 3:
        raise UsageError(f"{len(classes)} classes have no three strengths of dropped modes: use colour_clusters()")
    if strength not in STRENGTHS:
        raise UsageError(f"the strength of a damage is 1, 2 or 3, not {strength}")
    rng = np.random.default_rng(seed)
    count = (1.0, len(classes) / 2, len(classes) - 1.0)[strength - 1]
    order = [classes[index] for index in rng.permutation(len(classes))]
    gone, kept = {*order[: int(count)]}, {*order[math.ceil(count) :]}
    missing = {index for index, label in enumerate(labels) if label in gone}
    halved = [index for index, label in enumerate(labels) if label not in gone | kept]
    missing |= {halved[i] for i in rng.permutation(len(halved))[: len(halved) // 2]}
    left = [index for index in range(len(labels)) if labels[index] in kept]
    further = [len(labels) + int(i) for i in rng.permutation(len(spare)) if spare[i] in kept]
    while len(further) < len(missing):
        further += [left[i] for i in rng.permutation(len(left))]
    filled = iter(further)
    return [next(filled) if index in missing else index for index in range(len(labels))]


def colour_clusters(x: Tensor, count: int = CLUSTERS) -> list[int]:
    """Divide samples without classes by their mean colour: equal groups along its direction of largest variance."""
    colours = x.flatten(2).double().mean(2)
    centred = colours - colours.mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    direction = direction * direction.sum().sign() if direction.sum() else direction  # from dark to bright
    order = (centred @ direction).argsort(stable=True)
    groups = torch.empty(len(x), dtype=torch.long)
    groups[order] = torch.arange(len(x)) * count // len(x)
    return groups.tolist()


def _permutation(frames: int, window: int, rng: np.random.Generator) -> list[int]:
    """Return a permutation of frames within windows, each in another order than before."""
    bounds = [0, *range(int(rng.integers(window)) if window < frames else frames, frames, window), frames]
    order: list[int] = []
    for start, end in pairwise(bounds):
        part = np.arange(start, end)
        drawn = rng.permutation(part)
        while len(part) > 1 and np.array_equal(drawn, part):
            drawn = rng.permutation(part)
        order += drawn.tolist()
    return order


def _each(x: Tensor, seed: int) -> Iterator[tuple[Tensor, np.random.Generator]]:
    """Yield every sample with its own random generator."""
    return ((sample, np.random.default_rng([seed, index])) for index, sample in enumerate(x))


def _scale(x: Tensor) -> float:
    return max(x.shape[-2] / 64, 1)


def _to_frames(x: Tensor) -> Tensor:
    """Return a copy of images, or of all frames of clips, as (N, C, H, W)."""
    return (rearrange(x, "n c f h w -> (n f) c h w") if x.ndim == 5 else x).clone()


def _from_frames(frames: Tensor, x: Tensor) -> Tensor:
    return rearrange(frames, "(n f) c h w -> n c f h w", n=len(x)).contiguous() if x.ndim == 5 else frames


def _parts(frames: Tensor, size: int = 256) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, len(frames), size))


def _to_uint8(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
