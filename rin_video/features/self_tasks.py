"""The tasks that the extractor "self" learns: which order and speed the frames have, or how an image was changed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ORDERS = ("forward", "backward", "shuffled", "swapped", "fast", "slow", "frozen", "stuttering", "jumping")
CHANGES = ("none", "turned by 90", "turned by 180", "turned by 270", "quarters exchanged", "mirrored quarters")


def window_length(num_frames: int) -> int:
    """Return the frames of a window: about half of the clip, so that the clip can also be played at double speed."""
    return (num_frames + 1) // 2 if num_frames >= 7 else num_frames


def reordered(order: str, num_frames: int, rng: np.random.Generator) -> list[int]:
    """Return the numbers of the frames that a window of a clip shows in an order of `ORDERS`."""
    length = window_length(num_frames)
    start = int(rng.integers(num_frames - length + 1))
    frames = list(range(start, start + length))
    if order == "backward":
        return frames[::-1]
    if order == "shuffled":
        return [frames[i] for i in rng.permutation(length)]
    if order == "swapped":  # one pair of neighbours
        first = int(rng.integers(length - 1))
        frames[first], frames[first + 1] = frames[first + 1], frames[first]
    elif order == "fast":
        start = int(rng.integers(max(num_frames - 2 * length + 2, 1)))
        frames = [min(start + 2 * i, num_frames - 1) for i in range(length)]
    elif order == "slow":
        frames = [start + i // 2 for i in range(length)]
    elif order == "frozen":  # until some frame, or to the end
        end = int(rng.integers(1, length))
        frames = [frames[0] if i <= end else frame for i, frame in enumerate(frames)]
    elif order == "stuttering":  # some frames repeat their predecessor
        repeats = rng.random(length) < 0.3
        repeats[1 + int(rng.integers(length - 1))] = True
        for i in range(1, length):
            frames[i] = frames[i - 1] if repeats[i] else frames[i]
    elif order == "jumping":  # from some frame on, others than those that follow
        cut = int(rng.integers(1, length))
        leaps = [leap for leap in range(-frames[cut], num_frames - frames[-1]) if leap]
        leaps = [leap for leap in leaps if abs(leap) > 1] or leaps
        leap = leaps[int(rng.integers(len(leaps)))]
        frames = [frame + leap * (i >= cut) for i, frame in enumerate(frames)]
    return frames


def changed(change: str, image: Tensor) -> Tensor:
    """Return an image (C, H, W) with a change of `CHANGES`; one that is not square is turned by 180 degrees at most."""
    H, W = image.shape[-2:]
    if change.startswith("turned"):
        turns = int(change.split()[-1]) // 90
        return torch.rot90(image, turns if H == W or turns == 2 else 0, (1, 2))
    if change == "quarters exchanged":
        return image.roll((H // 2, W // 2), (1, 2))
    if change == "mirrored quarters":
        image = image.clone()
        image[:, : H // 2, : W // 2] = image[:, : H // 2, : W // 2].flip(2)
        image[:, H // 2 :, W // 2 :] = image[:, H // 2 :, W // 2 :].flip(2)
    return image
