"""Which cells of a sample are known: masks that training draws, one kind for each task, and masks for sampling.

A mask is boolean over the grid, true where the data are given. Nothing here knows of tubes or patches: a mask may begin
and end anywhere.
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
    """What a mask is drawn with: how many frames it may take, and a generator on the CPU (None: torch's global one)."""

    least: int
    most: int
    generator: torch.Generator | None = None

    def num_frames(self) -> int:
        return self.whole(self.least, self.most)

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))


def first(grid: Grid, draw: Draw) -> Tensor:
    """The first frames: prediction."""
    return _along_frames(grid, torch.arange(grid[0]) < draw.num_frames())


def last(grid: Grid, draw: Draw) -> Tensor:
    """The last frames: what came before."""
    return _along_frames(grid, torch.arange(grid[0]) >= grid[0] - draw.num_frames())


def ends(grid: Grid, draw: Draw) -> Tensor:
    """Frames at both ends: filling in."""
    frames, before, after = torch.arange(grid[0]), draw.num_frames(), draw.num_frames()
    between = (frames >= min(before, grid[0] - 2)) & (frames < grid[0] - after)
    return _along_frames(grid, ~between if between.any() else frames != grid[0] // 2)


def frames(grid: Grid, draw: Draw) -> Tensor:
    """Frames anywhere, as many as are drawn."""
    known = torch.zeros(grid[0], dtype=torch.bool)
    known[torch.randperm(grid[0], generator=draw.generator)[: draw.num_frames()]] = True
    return _along_frames(grid, known)


def boxes(grid: Grid, draw: Draw) -> Tensor:
    """A box in space and time, known itself or all around it: painting out and in."""
    box = torch.ones(*grid, dtype=torch.bool)
    for axis, size in enumerate(grid):
        extent = draw.whole(1, size)
        start = draw.whole(0, size - extent)
        inside = torch.arange(size)
        box &= ((inside >= start) & (inside < start + extent)).view(-1, *[1] * (len(grid) - axis - 1))
    return box if draw.whole(0, 1) and not box.all() else ~box


KNOWN_MASKS: dict[KnownKind, Callable[[Grid, Draw], Tensor]] = {
    "none": lambda grid, draw: torch.zeros(*grid, dtype=torch.bool),
    "first": first,
    "last": last,
    "ends": ends,
    "frames": frames,
    "boxes": boxes,
}
ANY_GRID: tuple[KnownKind, ...] = ("none", "boxes")  # the others need an axis of frames (or of a sequence)


def draw_known(
    kinds: Mapping[KnownKind, float],
    known_frames: Sequence[int],
    batch: int,
    grid: Grid,
    generators: Sequence[torch.Generator | None] | None = None,
) -> Tensor:
    """A mask for each sample, (batch, 1, *grid), of a kind drawn by the weights `kinds`; always something to invent.

    `known_frames` is how many frames the kinds that count them take, [least, most]; empty: 1 to half. On the CPU, from
    a generator for each sample, or torch's global one. Images only take the kinds that need no frames.
    """
    weights = {kind: weight for kind, weight in kinds.items() if len(grid) != 2 or kind in ANY_GRID}
    if not sum(weights.values()):
        return torch.zeros(batch, 1, *grid, dtype=torch.bool)
    low, high = known_frames or (1, max(grid[0] // 2, 1))
    most = max(grid[0] - 1, 0)
    names, shares = list(weights), torch.tensor(list(weights.values()), dtype=torch.float64)
    masks = []
    for generator in generators or [None] * batch:
        kind = names[int(torch.multinomial(shares, 1, generator=generator))]
        masks.append(KNOWN_MASKS[kind](grid, Draw(min(low, most), min(high, most), generator)))
    return torch.stack(masks).unsqueeze(1)


def known_frames_mask(grid: Grid, invented: range) -> Tensor:
    """A mask (*grid) with every frame known but those of `invented`."""
    indices = torch.arange(grid[0])
    return _along_frames(grid, (indices < invented.start) | (indices >= invented.stop))


def place_context(context: Tensor, known: Tensor | None, shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    """Values (batch, C, *grid), as `context` holds them, and the mask (batch, 1, *grid) of what is known.

    `context` is (C, *grid) or (batch, C, *grid). Where it has fewer frames than `shape` and no mask is given, it is the
    first frames. `known` is boolean, (*grid), (batch, *grid) or (batch, 1, *grid). Raises `UsageError` with the numbers
    where they do not fit, or nothing is left to invent.
    """
    grid = shape[1:]
    if context.ndim == len(shape):
        context = context.expand(batch, *context.shape)
    if context.ndim != len(shape) + 1 or len(context) != batch:
        raise UsageError(f"context has the shape {tuple(context.shape)}: give {shape}, or {(batch, *shape)}")
    if context.shape[1] != shape[0]:
        raise UsageError(f"context has {context.shape[1]} channels, the model {shape[0]}")
    num_given = context.shape[2]
    if num_given > grid[0]:
        raise UsageError(f"context has {num_given} frames, the window is {grid[0]}: give at most {grid[0] - 1} of them")
    if context.shape[3:] != grid[1:]:
        raise UsageError(f"context is {_by(context.shape[3:])}, the model makes {_by(grid[1:])}: resize it")
    if known is None:
        if num_given == grid[0] or len(grid) == 2:
            raise UsageError(
                f"context fills the whole {_by(grid)}: say by `known` which of it is given, or give fewer frames"
            )
        known = known_frames_mask(grid, range(num_given, grid[0]))
    elif num_given < grid[0]:
        raise UsageError(
            f"context has {num_given} frames, `known` speaks of {grid[0]}: give as many (the rest may be 0)"
        )
    if num_given < grid[0]:
        context = torch.cat([context, context.new_zeros(*context.shape[:2], grid[0] - num_given, *grid[1:])], dim=2)
    if known.dtype != torch.bool:
        raise UsageError(f"known is {known.dtype}: give booleans, true where the context is to stay")
    if tuple(known.shape) not in (tuple(grid), (batch, *grid), (batch, 1, *grid)):
        raise UsageError(f"known has the shape {tuple(known.shape)}: give {tuple(grid)}, or {(batch, *grid)}")
    known = known.reshape(-1, 1, *grid).expand(batch, 1, *grid)
    if known.all():
        raise UsageError("every cell is known: leave some to invent")
    return context, known


def _along_frames(grid: Grid, known: Tensor) -> Tensor:
    return known.view(-1, *[1] * (len(grid) - 1)).expand(*grid)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
