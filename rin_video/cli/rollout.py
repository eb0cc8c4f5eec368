"""How samples of the size and length that a user asked for are made: in one pass, or window by window."""

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


class Pass(NamedTuple):
    """What one pass makes, (C, *grid), and how many frames are wanted in all; 0: images."""

    shape: tuple[int, ...]
    frames: int

    @property
    def extends(self) -> bool:
        """Whether it takes several passes."""
        return len(self.shape) == 4 and self.frames > self.shape[1]


def plan_pass(model: Any, frames: int | None, size: str | None, window: int | None) -> Pass:
    """By what the model is and what is asked for. `UsageError` where they do not go together.

    More frames than the model's are made window by window where it can go on from given frames, else in one pass.
    """
    for name, value, least in (("frames", frames, 0), ("window", window, 1)):
        if value is not None and value < least:
            raise UsageError(f"--{name} is {value}: it must be at least {least}")
    clips = next((shape for shape in model.shapes if len(shape) == 4), None)
    images = next((shape for shape in model.shapes if len(shape) == 3), None)
    if clips is None and (frames or window):
        kind, flag = "images" if images else model.shape, "frames" if frames else "window"
        raise UsageError(f"the model makes {kind}, not clips: leave out --{flag}")
    if frames == 0 and images is None:
        raise UsageError("the model makes clips only: --frames 0 is for one that makes images (tokenizer=tube+image)")
    shape = images if images and (frames == 0 or clips is None) else clips or model.shape
    assert shape is not None
    if size:
        if len(shape) < 3:
            raise UsageError("--size is for images and clips")
        height_width = parse_size(size)
        H, W = height_width if isinstance(height_width, list) else (height_width, height_width)
        shape = (*shape[:-2], H, W)
    if len(shape) != 4:
        return Pass(shape, 0)
    frames = frames or shape[1]
    if window is None:
        window = shape[1] if frames > shape[1] and model.known_mask else frames
    return Pass((shape[0], min(window, frames), *shape[2:]), frames)


def refuse_extension(options: Namespace, pass_: Pass) -> None:
    """Raises `UsageError` for options of several passes where one makes it all."""
    for flag in ("overlap", "carry_latents", "key_frames"):
        if getattr(options, flag):
            raise UsageError(
                f"--{flag.replace('_', '-')} is for clips longer than a window: {counted(pass_.frames, 'frame')} "
                "fit into one pass"
            )


def extend_parts(
    diffusion: GaussianDiffusion, wanted: SampleConfig, options: Namespace, pass_: Pass, common: dict[str, Any]
) -> Iterator[Tensor]:
    """The samples in parts (B, C, f, H, W), with a progress bar. `common` are arguments of `sample`."""
    merged, gather = rank_part(diffusion, wanted, common)
    parts = diffusion.rollout(
        pass_.frames,
        wanted,
        overlap=options.overlap,
        carry_latents=options.carry_latents,
        key_frames=options.key_frames,
        **merged,
    )
    with progress_bar(pass_.frames, "sampling", "frame", disable=not is_first()) as bar:
        for part in parts:
            bar.update(part.shape[2])
            yield gather(part)
