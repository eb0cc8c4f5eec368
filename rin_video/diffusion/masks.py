"""Observed masks: random masks for training, one kind per task, and masks for sampling.

A mask is boolean over the grid, true where a pixel is known. It need not align with tubes or patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rin_video.config import KnownKind
from rin_video.errors import UsageError

Grid = Sequence[int]


class Draw(NamedTuple):
    """Parameters of a random mask: least and most known frames, and a CPU generator (None: torch's global one)."""

    least: int
    most: int
    generator: torch.Generator | None = None

    def num_frames(self) -> int:
        """Draw a number of known frames from `least` to `most`, both included."""
        return self.integer(self.least, self.most)

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))


def first(grid: Grid, draw: Draw) -> Tensor:
    """Mark the first frames as known, to predict what follows."""
    return _along_frames(grid, torch.arange(grid[0]) < draw.num_frames())


def last(grid: Grid, draw: Draw) -> Tensor:
    """Mark the last frames as known, to predict what came before."""
    return _along_frames(grid, torch.arange(grid[0]) >= grid[0] - draw.num_frames())


def ends(grid: Grid, draw: Draw) -> Tensor:
    """Mark frames at both ends as known, to interpolate between them."""
    frames, before, after = torch.arange(grid[0]), draw.num_frames(), draw.num_frames()
    between = (frames >= min(before, grid[0] - 2)) & (frames < grid[0] - after)
    return _along_frames(grid, ~between if between.any() else frames != grid[0] // 2)


def frames(grid: Grid, draw: Draw) -> Tensor:
    """Mark frames at random positions as known."""
    known = torch.zeros(grid[0], dtype=torch.bool)
    known[torch.randperm(grid[0], generator=draw.generator)[: draw.num_frames()]] = True
    return _along_frames(grid, known)


def boxes(grid: Grid, draw: Draw) -> Tensor:
    """Mark a random box in space and time, or everything outside it, as known: outpainting and inpainting."""
    box = torch.ones(*grid, dtype=torch.bool)
    for axis, size in enumerate(grid):
        extent = draw.integer(1, size)
        start = draw.integer(0, size - extent)
        inside = torch.arange(size)
        box &= ((inside >= start) & (inside < start + extent)).view(-1, *[1] * (len(grid) - axis - 1))
    return box if draw.integer(0, 1) and not box.all() else ~box


KNOWN_MASKS: dict[KnownKind, Callable[[Grid, Draw], Tensor]] = {
    "none": lambda grid, draw: torch.zeros(*grid, dtype=torch.bool),
    "first": first,
    "last": last,
    "ends": ends,
    "frames": frames,
    "boxes": boxes,
}
ANY_GRID: tuple[KnownKind, ...] = ("none", "boxes")  # the others need a frame axis (or that of a sequence)


def draw_known(
    kinds: Mapping[KnownKind, float],
    known_frames: Sequence[int],
    batch: int,
    grid: Grid,
    generators: Sequence[torch.Generator | None] | None = None,
) -> Tensor:
    """Draw an observed mask for each sample, (batch, 1, *grid), on the CPU; every mask leaves some pixels unknown.

    `kinds` maps kinds of masks to their weights. `known_frames` [least, most] is the range of the number of known
    frames; if it is empty, the range is 1 to half of the frames. `generators` has a CPU generator for each sample; None
    stands for torch's global one. Images take only the kinds in `ANY_GRID`; if there is none of these, no pixel is
    known.
    """
    weights = {kind: weight for kind, weight in kinds.items() if len(grid) != 2 or kind in ANY_GRID}
    if not sum(weights.values()):
        return torch.zeros(batch, 1, *grid, dtype=torch.bool)
    low, high = known_frames or (1, max(grid[0] // 2, 1))
    most = max(grid[0] - 1, 0)
    names, probabilities = list(weights), torch.tensor(list(weights.values()), dtype=torch.float64)
    masks = []
    for generator in generators or [None] * batch:
        kind = names[int(torch.multinomial(probabilities, 1, generator=generator))]
        masks.append(KNOWN_MASKS[kind](grid, Draw(min(low, most), min(high, most), generator)))
    return torch.stack(masks).unsqueeze(1)


def known_frames_mask(grid: Grid, unknown: range) -> Tensor:
    """Return a mask (*grid) in which all frames are known except those in `unknown`."""
    indices = torch.arange(grid[0])
    return _along_frames(grid, (indices < unknown.start) | (indices >= unknown.stop))


def place_context(context: Tensor, known: Tensor | None, shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    """Return the values of the known pixels, (batch, C, *grid), and the observed mask, (batch, 1, *grid).

    `shape` is (C, *grid), and `context` is (C, *grid) or (batch, C, *grid). Without a mask, `context` must have fewer
    frames than `shape` and is the beginning of the clip. `known` is boolean: (*grid), (batch, *grid) or (batch, 1,
    *grid). Raises `UsageError` if the shapes do not fit, or if no pixel is unknown.
    """
    grid = shape[1:]
    if context.ndim == len(shape):
        context = context.expand(batch, *context.shape)
    if context.ndim != len(shape) + 1 or len(context) != batch:
        raise UsageError(f"context has shape {tuple(context.shape)}: pass {shape} or {(batch, *shape)}")
    if context.shape[1] != shape[0]:
        raise UsageError(f"context has {context.shape[1]} channels, but the model has {shape[0]}")
    num_frames = context.shape[2]
    if num_frames > grid[0]:
        raise UsageError(f"context has {num_frames} frames, but the window has {grid[0]}: pass at most {grid[0] - 1}")
    if context.shape[3:] != grid[1:]:
        raise UsageError(f"context is {_by(context.shape[3:])}, but the model generates {_by(grid[1:])}: resize it")
    if known is None:
        if num_frames == grid[0] or len(grid) == 2:
            raise UsageError(
                f"context fills the complete grid {_by(grid)}: mark the known pixels in `known`, or pass fewer frames"
            )
        known = known_frames_mask(grid, range(num_frames, grid[0]))
    elif num_frames < grid[0]:
        raise UsageError(
            f"context has {num_frames} frames, but `known` covers {grid[0]}: pad context (unknown pixels may be 0)"
        )
    if num_frames < grid[0]:
        context = torch.cat([context, context.new_zeros(*context.shape[:2], grid[0] - num_frames, *grid[1:])], dim=2)
    if known.dtype != torch.bool:
        raise UsageError(f"known is {known.dtype}: pass booleans, true where the context is kept")
    if tuple(known.shape) not in (tuple(grid), (batch, *grid), (batch, 1, *grid)):
        raise UsageError(f"known has shape {tuple(known.shape)}: pass {tuple(grid)} or {(batch, *grid)}")
    known = known.reshape(-1, 1, *grid).expand(batch, 1, *grid)
    if known.all():
        raise UsageError("every pixel is known: leave some pixels to generate")
    return context, known


def _along_frames(grid: Grid, known: Tensor) -> Tensor:
    return known.view(-1, *[1] * (len(grid) - 1)).expand(*grid)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
