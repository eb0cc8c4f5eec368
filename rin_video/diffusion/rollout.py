"""Rollouts: clips of any length, window by window, each conditioned on the last frames of the one before.

Frames are yielded as they are generated, and only one window is kept in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.config import SampleConfig
from rin_video.diffusion.noise import derive_seed
from rin_video.diffusion.sampling import Diffusion, count_samples, resolve_config, sample
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
    """Generate clips of `frames` frames; yield parts (B, C, f, H, W) in order, in [0, 1] on the CPU.

    A window has the shape `shape` (C, F, H, W), by default that of the model. Each window is conditioned on the last
    `overlap` frames before it and keeps them bit for bit. By default, `overlap` is the most known frames of training
    (`known_frames`), or a quarter of the window. The first window is conditioned on `context` (C, f, H, W) or
    (B, C, f, H, W), with f below `frames`; the clips start with it. With `carry_latents`, the latents of a window are
    initialised from the last latents of the window before.

    With `key_frames`, every (F - overlap)-th frame is generated first, as if these frames were consecutive. The frames
    between them are generated afterwards. This is more stable over long clips if training has used such distances
    (`data.stride`, or "ends" in `diffusion.known`). `config` and `options` are those of `sample`. Raises `UsageError`
    for arguments that do not fit.
    """
    if refused := {"known", "self_cond", "return_trajectory", "return_self_cond"} & options.keys():
        raise UsageError(f"a rollout does not take {', '.join(sorted(refused))}: use `sample` for single windows")
    fields = {field.name for field in dataclasses.fields(SampleConfig)} - {"label"}  # labels are an argument too
    config = resolve_config(diffusion, config, {name: options.pop(name) for name in fields & options.keys()})
    context = None if context is None else torch.as_tensor(context)
    shape = shape or diffusion.shape
    if shape is None or len(shape) != 4:
        raise UsageError(f"a rollout requires clips (C, F, H, W), but the model generates {shape}")
    window = shape[1]
    if overlap is None:
        trained = list(getattr(diffusion.config, "known_frames", ()))
        overlap = min(trained[1] if trained else max(window // 4, 1), window - 1)
    if not 1 <= overlap < window:
        raise UsageError(f"overlap is {overlap}: it must be 1 to {window - 1}, because the window has {window} frames")
    if getattr(diffusion.model, "known_mask", True) is False:
        raise UsageError(
            f"{frames} frames are more than the window of {window}, and the model takes no conditioning frames: "
            "train with model.known_mask=true diffusion.known.none=1 diffusion.known.first=1"
        )
    if carry_latents and getattr(diffusion.model, "interface_self_conditioning", False):
        raise UsageError(
            "carry_latents excludes interface self-conditioning, whose tokens belong to the frames of one window"
        )
    batched = context if context is not None and context.ndim == 5 and len(context) > 1 else None
    batch_size = count_samples(config, batch_size, batched, options.get("embedding"), options.get("label"), rank=4)
    if context is not None:
        context = to_unit_range(context if context.ndim == 5 else context.unsqueeze(0))
        if context.shape[2] >= frames:
            raise UsageError(
                f"context has {context.shape[2]} frames, but the clips have {frames}: leave some frames to generate"
            )
        context = context.expand(batch_size if len(context) == 1 else -1, -1, -1, -1, -1)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    run = _KeyFrames if key_frames else _Sliding
    windows = run(diffusion, config, batch_size, shape, overlap, carry_latents, options)
    left = frames
    for part in windows.parts(context, frames, seed):
        yield part[:, :, :left]
        left -= part.shape[2]
        if left <= 0:
            return


class _Sliding:
    """Generates one window after the other."""

    def __init__(
        self,
        diffusion: Diffusion,
        config: SampleConfig,
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
        """Yield the context, then new frames without end."""
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
        """Generate a window (B, C, F, H, W) that begins with the frames `start`, or keeps their pixels in `known`."""
        sampled: tuple[Tensor, dict[str, Any]] = sample(
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
        clip, self_cond = sampled
        if self.carry_latents:
            self.self_cond = {"latents": self_cond["latents"]}
        return clip.cpu()


class _KeyFrames(_Sliding):
    """Generates key frames window after window, then the frames between them, segment by segment."""

    def parts(self, context: Tensor | None, frames: int, seed: int) -> Iterator[Tensor]:
        """Yield the context, then new frames without end."""
        distance = self.window - self.overlap
        sliding = _Sliding(
            self.diffusion, self.config, self.batch_size, self.shape, self.overlap, self.carry_latents, self.options
        )
        last = None if context is None else context[:, :, -1:]
        keys = (
            key for part in sliding.parts(last, frames, derive_seed(seed, 0)) for key in torch.split(part, 1, dim=2)
        )
        first = next(keys)
        tail = first if context is None else context
        yield tail
        tail = tail[:, :, -self.overlap :]
        for number, key in enumerate(keys):
            num_known = tail.shape[2]
            index = num_known - 1 + distance  # of the next key frame in this window
            clip = tail.new_zeros(self.batch_size, *self.shape)
            clip[:, :, :num_known], clip[:, :, index : index + 1] = tail, key
            known = torch.zeros(self.shape[1:], dtype=torch.bool)
            known[:num_known] = known[index] = True
            clip = self.draw(clip, known, derive_seed(seed, 1, number))[:, :, : index + 1]
            yield clip[:, :, num_known:]
            tail = clip[:, :, -self.overlap :]
