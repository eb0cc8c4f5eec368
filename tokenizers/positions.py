"""Position codes for a grid of tokens of any number of axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rin_video.config import PositionName
from rin_video.errors import UsageError


def sincos(position: Tensor, dim: int) -> Tensor:
    """Sines then cosines of `position` (any shape) at `dim / 2` frequencies from 1 down to 1/10000: (..., dim).

    Raises `UsageError` for an odd `dim`. Source: Vaswani et al. 2017, not interleaved.
    """
    if dim % 2:
        raise UsageError(f"a sin-cos code needs an even width, not {dim}: choose a multiple of 2 per axis")
    frequency = 1 / 10000 ** (2 * torch.arange(dim // 2, device=position.device, dtype=position.dtype) / dim)
    angle = position[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def coded_axes(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a grid that are longer than one token: those that a sin-cos code has to tell apart."""
    return tuple(axis for axis, size in enumerate(grid) if size > 1) or (0,)


def grid_sincos(
    grid: tuple[int, ...],
    dim: int,
    coordinate_range: float | None = 1000.0,
    axes: tuple[int, ...] | None = None,
) -> Tensor:
    """Unit-amplitude sin-cos code of a grid, row-major: (N, dim) in float32.

    Each of `axes` (default: those longer than one token) gets an equal, even share of `dim`, first axis first (the
    first takes what is left over). Positions run from 0 to `coordinate_range` along every axis, as in the authors'
    release (1000); None counts tokens instead (0, 1, 2, ...).
    """
    axes = coded_axes(grid) if axes is None else axes
    share = 2 * (dim // (2 * len(axes)))
    codes = []
    for i, axis in enumerate(axes):
        size = grid[axis]
        position = torch.arange(size, dtype=torch.float32)
        if coordinate_range is not None:
            position = coordinate_range * position / max(size - 1, 1)
        code = sincos(position, share if i else dim - share * (len(axes) - 1))
        shape = [1] * len(grid)
        shape[axis] = size
        codes.append(code.view(*shape, -1).expand(*grid, -1))
    return torch.cat(codes, dim=-1).reshape(math.prod(grid), dim)


class LearnedPosition(nn.Module):
    """A table, truncated normal 0.02: one row a token, for one grid only.

    With `interpolate` set, another grid of as many axes (up to three) reads the table in between, linearly.
    """

    def __init__(self, grid: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.grid, self.interpolate = tuple(grid), False
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(math.prod(grid), dim), std=0.02))

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        if tuple(grid) == self.grid:
            return self.table
        if not self.interpolate:
            raise UsageError(
                f"learned positions were made for {_by(self.grid)} tokens and cannot serve {_by(grid)}: interpolate "
                "them (--interpolate-positions), or train with position=sincos or position=coordinate"
            )
        if len(grid) != len(self.grid) or len(grid) > 3:
            raise UsageError(f"learned positions of {_by(self.grid)} tokens cannot be interpolated to {_by(grid)}")
        maps = self.table.T.reshape(1, -1, *self.grid)
        maps = F.interpolate(maps, size=tuple(grid), mode=("linear", "bilinear", "trilinear")[len(grid) - 1])
        return maps.flatten(2)[0].T


class SinCosPosition(nn.Module):
    """`grid_sincos`; with `learned`, plus a table that starts at zero (and ties it to one grid).

    The grid at construction decides which axes get a share of the width. Other grids keep that layout, even with a
    single token along such an axis. A grid with more than one token along an axis without a share is refused.
    """

    code: Tensor

    def __init__(
        self, grid: tuple[int, ...], dim: int, coordinate_range: float | None = 1000.0, *, learned: bool = False
    ) -> None:
        super().__init__()
        self.grid, self.dim, self.coordinate_range = tuple(grid), dim, coordinate_range
        self.axes = coded_axes(self.grid)
        self.register_buffer("code", grid_sincos(grid, dim, coordinate_range), persistent=False)
        self.residual = LearnedPosition(grid, dim) if learned else None
        if self.residual is not None:
            nn.init.zeros_(self.residual.table)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        code = self.code
        if tuple(grid) != self.grid:
            if any(size > 1 and axis not in self.axes for axis, size in enumerate(grid)):
                raise UsageError(
                    f"sin-cos positions were made for {_by(self.grid)} tokens and cannot tell those of {_by(grid)} "
                    "apart: train with more than one token along each axis that is to grow"
                )
            code = grid_sincos(tuple(grid), self.dim, self.coordinate_range, self.axes).to(code)
        return code if self.residual is None else code + self.residual(grid)


class CoordinatePosition(nn.Module):
    """A small network of the coordinate for each axis, summed over axes: works for any grid of that many axes.

    Coordinates are the centres of the tokens in [-1, 1]; each is seen through sines of 8 octaves. A size never seen in
    training is read in between (or more finely than) the positions that were.
    """

    OCTAVES = 8

    def __init__(self, num_axes: int, dim: int) -> None:
        super().__init__()
        self.axes = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * self.OCTAVES + 1, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(num_axes)
        )

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        total: Tensor | float = 0.0
        for axis, (size, network) in enumerate(zip(grid, self.axes, strict=True)):
            weight = next(network.parameters())
            u = (2 * torch.arange(size, device=weight.device, dtype=weight.dtype) + 1) / size - 1
            angle = math.pi / 2 * u[:, None] * 2.0 ** torch.arange(self.OCTAVES, device=u.device)
            code = network(torch.cat([u[:, None], angle.sin(), angle.cos()], dim=-1))
            shape = [1] * len(grid)
            shape[axis] = size
            total = total + code.view(*shape, -1)
        assert isinstance(total, Tensor)
        return total.expand(*grid, -1).reshape(math.prod(grid), -1)


POSITIONS: dict[PositionName, Callable[[tuple[int, ...], int, float | None], nn.Module]] = {
    "learned": lambda grid, dim, coordinate_range: LearnedPosition(grid, dim),
    "sincos": SinCosPosition,
    "sincos_learned": partial(SinCosPosition, learned=True),
    "coordinate": lambda grid, dim, coordinate_range: CoordinatePosition(len(grid), dim),
}


def make_position(
    name: PositionName, grid: tuple[int, ...], dim: int, coordinate_range: float | None = 1000.0
) -> nn.Module:
    """The position code called `name` (one of `POSITIONS`) for a grid of tokens: maps a grid to (N, dim)."""
    if name not in POSITIONS:
        raise UsageError(f"unknown position {name!r}: known are {', '.join(POSITIONS)}")
    return POSITIONS[name](grid, dim, coordinate_range)


def _by(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))
