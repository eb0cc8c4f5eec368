"""Clips of any length from a model of a few frames: window by window, each told the end of what came before.

A generator: frames are handed out as they come, and no more than a window is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.config import SampleConfig
from rin_video.diffusion.noise import derive_seed
from rin_video.diffusion.sampling import Diffusion, sample
from rin_video.errors import UsageError
from rin_video.tensors import to_unit_range


def rollout(
    diffusion: Diffusion,
    frames: int,
    config: SampleConfig | None = None,
    /,
    *,
    batch_size: int | None = None,
    shape: tuple[int, ...] | None = None,
    overlap: int | None = None,
    context: Tensor | np.ndarray | None = None,
    carry_latents: bool = False,
    key_frames: bool = False,
    seed: int | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Clips of `frames` frames, in order and in parts (B, C, f, H, W) in [0, 1] on the CPU.

    A window is `shape` (C, F, H, W), the model's where it is not given. Each is given the last `overlap` frames before
    it (the most that training gave, or a quarter of the window), which it keeps bit for bit; the first is given
    `context` (C, f, H, W) or (B, C, f, H, W) of any length below `frames`, which the clips start with. With
    `carry_latents` a window's latents start as the last ones of the window before.

    With `key_frames` every (F - overlap)-th frame comes first, as if it were the next one, and the frames between two
    of them are filled in: steadier over long times, where training has seen such leaps (data.stride, or "ends" in
    diffusion.known). `config` and `options` are those of `sample`. Raises `UsageError` for what does not fit.
    """
    context = None if context is None else torch.as_tensor(context)
    shape = shape or diffusion.shape
    if shape is None or len(shape) != 4:
        raise UsageError(f"only clips (C, F, H, W) can be extended, the model makes {shape}")
    window = shape[1]
    if overlap is None:
        trained = list(getattr(diffusion.config, "known_frames", ()))
        overlap = min(trained[1] if trained else max(window // 4, 1), window - 1)
    if not 1 <= overlap < window:
        raise UsageError(f"overlap is {overlap}: it must lie between 1 and {window - 1}, the window is {window} frames")
    if getattr(diffusion.model, "known_mask", True) is False:
        raise UsageError(
            f"{frames} frames are more than the window of {window}, and the model cannot go on from given frames: "
            "train with model.known_mask=true diffusion.known.none=1 diffusion.known.first=1"
        )
    if carry_latents and getattr(diffusion.model, "interface_self_conditioning", False):
        raise UsageError("carry_latents cannot hand on interface tokens, which belong to the frames of one window")
    if context is not None:
        context = to_unit_range(context if context.ndim == 5 else context.unsqueeze(0))
        if context.shape[2] >= frames:
            raise UsageError(f"context has {context.shape[2]} frames of {frames}: nothing is left to invent")
        batch_size = batch_size or len(context)
        context = context.expand(batch_size, -1, -1, -1, -1)
    num = (config or SampleConfig()).num_samples
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    run = _KeyFrames if key_frames else _Sliding
    windows = run(diffusion, config, batch_size or num, shape, overlap, carry_latents, options)
    left = frames
    for part in windows.parts(context, frames, seed):
        yield part[:, :, :left]
        left -= part.shape[2]
        if left <= 0:
            return


class _Sliding:
    """Windows one after the other."""

    def __init__(
        self,
        diffusion: Diffusion,
        config: SampleConfig | None,
        batch_size: int,
        shape: tuple[int, ...],
        overlap: int,
        carry_latents: bool,
        options: dict[str, Any],
    ) -> None:
        self.diffusion, self.config, self.batch_size, self.shape = diffusion, config, batch_size, shape
        self.overlap, self.carry_latents, self.options = overlap, carry_latents, options
        self.window = shape[1]
        self.self_cond: Any = None

    def parts(self, context: Tensor | None, frames: int, seed: int) -> Iterator[Tensor]:
        """New frames, without end; the context first."""
        if context is not None:
            yield context
            context = context[:, :, -self.overlap :] if context.shape[2] >= self.window else context
        number = 0
        while True:
            clip = self.draw(context, None, derive_seed(seed, number))
            yield clip[:, :, 0 if context is None else context.shape[2] :]
            context = clip[:, :, -self.overlap :]
            number += 1

    def draw(self, start: Tensor | None, known: Tensor | None, seed: int) -> Tensor:
        """One window (B, C, F, H, W) that starts with frames, or keeps those that are known."""
        clip, self_cond = sample(
            self.diffusion,
            self.config,
            batch_size=self.batch_size,
            shape=self.shape,
            context=start,
            known=known,
            seed=seed,
            self_cond=self.self_cond,
            return_self_cond=True,
            **self.options,
        )
        if self.carry_latents:
            self.self_cond = {"latents": self_cond["latents"]}
        return clip.cpu()


class _KeyFrames(_Sliding):
    """Frames far apart first, by sliding, then those in between, segment by segment."""

    def parts(self, context: Tensor | None, frames: int, seed: int) -> Iterator[Tensor]:
        apart = self.window - self.overlap
        sliding = _Sliding(
            self.diffusion, self.config, self.batch_size, self.shape, self.overlap, self.carry_latents, self.options
        )
        last = None if context is None else context[:, :, -1:]
        keys = (key for part in sliding.parts(last, frames, derive_seed(seed, 0)) for key in part.split(1, dim=2))
        first = next(keys)
        tail = first if context is None else context
        yield tail
        tail = tail[:, :, -self.overlap :]
        for number, key in enumerate(keys):
            num_given = tail.shape[2]
            place = num_given - 1 + apart  # of the next key frame in this window
            clip = tail.new_zeros(self.batch_size, *self.shape)
            clip[:, :, :num_given], clip[:, :, place : place + 1] = tail, key
            known = torch.zeros(self.shape[1:], dtype=torch.bool)
            known[:num_given] = known[place] = True
            clip = self.draw(clip, known, derive_seed(seed, 1, number))[:, :, : place + 1]
            yield clip[:, :, num_given:]
            tail = clip[:, :, -self.overlap :]
