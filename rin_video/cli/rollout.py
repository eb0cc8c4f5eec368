"""Plans and runs the sampling of clips of the requested size and length: in one window, or as a rollout."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from rin_video.cli.options import parse_size
from rin_video.config import SampleConfig
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import UsageError
from rin_video.progress import progress_bar
from rin_video.ranks import is_first
from rin_video.training.parallel_sampling import rank_part
from rin_video.wording import counted


class SamplingPlan(NamedTuple):
    """The shape of a window (C, *grid), and the total number of frames (0: images)."""

    shape: tuple[int, ...]
    frames: int

    @property
    def is_rollout(self) -> bool:
        """Whether the samples require a rollout over several windows."""
        return len(self.shape) == 4 and self.frames > self.shape[1]


def plan_sampling(model: Any, frames: int | None, size: str | None, window: int | None) -> SamplingPlan:
    """Return the shape of a window and the number of frames for the requested frames, size and window.

    More frames than those of the model are generated window by window if the model takes an observed mask, else in one
    window. Raises `UsageError` if the model cannot generate the requested samples.
    """
    for name, value, least in (("frames", frames, 0), ("window", window, 1)):
        if value is not None and value < least:
            raise UsageError(f"--{name} is {value}: it must be at least {least}")
    clips = next((shape for shape in model.shapes if len(shape) == 4), None)
    images = next((shape for shape in model.shapes if len(shape) == 3), None)
    if clips is None and (frames or window):
        kind, flag = "images" if images else model.shape, "frames" if frames else "window"
        raise UsageError(f"the model generates {kind}, not clips: leave out --{flag}")
    if frames == 0 and images is None:
        raise UsageError(
            "the model generates only clips: --frames 0 requires a model for images too (tokenizer=tube+image)"
        )
    shape = images if images and (frames == 0 or clips is None) else clips or model.shape
    assert shape is not None
    if size:
        if len(shape) < 3:
            raise UsageError("--size is for images and clips")
        height_width = parse_size(size)
        H, W = height_width if isinstance(height_width, list) else (height_width, height_width)
        shape = (*shape[:-2], H, W)
    if len(shape) != 4:
        return SamplingPlan(shape, 0)
    frames = frames or shape[1]
    if window is None:
        window = shape[1] if frames > shape[1] and model.known_mask else frames
    return SamplingPlan((shape[0], min(window, frames), *shape[2:]), frames)


def refuse_rollout_options(options: Namespace, plan: SamplingPlan) -> None:
    """Raise `UsageError` for rollout options if a single window has all frames."""
    for flag in ("overlap", "carry_latents", "key_frames"):
        if getattr(options, flag):
            raise UsageError(
                f"--{flag.replace('_', '-')} is for clips longer than a window: {counted(plan.frames, 'frame')} "
                "fit into one window"
            )


def rollout_parts(
    diffusion: GaussianDiffusion, wanted: SampleConfig, options: Namespace, plan: SamplingPlan, common: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield the samples in parts (B, C, f, H, W) and show the progress; `common` are arguments of `sample`."""
    merged, gather = rank_part(diffusion, wanted, common)
    parts = diffusion.rollout(
        plan.frames,
        wanted,
        overlap=options.overlap,
        carry_latents=options.carry_latents,
        key_frames=options.key_frames,
        **merged,
    )
    with progress_bar(plan.frames, "sampling", "frame", disable=not is_first()) as bar:
        for part in parts:
            bar.update(part.shape[2])
            yield gather(part)
