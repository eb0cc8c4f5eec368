"""Position codes for token grids with any number of axes."""

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
    """Return the sin-cos code of `position` (any shape) at `dim / 2` frequencies from 1 down to 1/10000: (..., dim).

    The sines come first, then the cosines. Raises `UsageError` if `dim` is odd. Source: Vaswani et al. 2017, not
    interleaved.
    """
    if dim % 2:
        raise UsageError(f"a sin-cos code needs an even width, not {dim}: choose a multiple of 2 per axis")
    frequency = 1 / 10000 ** (2 * torch.arange(dim // 2, device=position.device, dtype=position.dtype) / dim)
    angle = position[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def coded_axes(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of a grid that are longer than one token, which a sin-cos code must encode; at least axis 0."""
    return tuple(axis for axis, size in enumerate(grid) if size > 1) or (0,)


def grid_sincos(
    grid: tuple[int, ...],
    dim: int,
    coordinate_range: float | None = 1000.0,
    axes: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the sin-cos code of a grid with unit amplitude, in row-major order: (N, dim), float32.

    Each of `axes` (default: those longer than one token) gets an equal, even share of `dim`, in their order; the first
    axis also gets the remainder. Positions range from 0 to `coordinate_range` along every axis, as in the authors'
    release (1000). If it is None, they are token indices (0, 1, 2, ...).
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
    """A learned table with one row per token of one grid, initialised from a truncated normal with std 0.02.

    If `interpolate` is set, the table is interpolated linearly for other grids with the same number of axes, up to
    three.
    """

    def __init__(self, grid: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.grid, self.interpolate = tuple(grid), False
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(math.prod(grid), dim), std=0.02))

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """Return the codes of a token grid, (N, dim); raise `UsageError` if the table does not fit the grid."""
        if tuple(grid) == self.grid:
            return self.table
        if not self.interpolate:
            raise UsageError(
                f"learned positions were made for {_by(self.grid)} tokens and do not fit {_by(grid)}: interpolate "
                "them (--interpolate-positions), or train with position=sincos or position=coordinate"
            )
        if len(grid) != len(self.grid) or len(grid) > 3:
            raise UsageError(f"learned positions of {_by(self.grid)} tokens cannot be interpolated to {_by(grid)}")
        maps = self.table.T.reshape(1, -1, *self.grid)
        maps = F.interpolate(maps, size=tuple(grid), mode=("linear", "bilinear", "trilinear")[len(grid) - 1])
        return maps.flatten(2)[0].T


class SinCosPosition(nn.Module):
    """The sin-cos code of `grid_sincos`.

    `learned` adds a zero-initialised table, which restricts it to one grid. The grid at construction determines which
    axes get a share of the width. Other grids use the same shares, even if they have a single token along such an axis.
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
        """Return the codes of a token grid, (N, dim).

        Raises `UsageError` if the grid has more than one token along an axis that has no share of the width.
        """
        code = self.code
        if tuple(grid) != self.grid:
            if any(size > 1 and axis not in self.axes for axis, size in enumerate(grid)):
                raise UsageError(
                    f"sin-cos positions were made for {_by(self.grid)} tokens and cannot distinguish {_by(grid)} "
                    "tokens: train with more than one token along each axis that is to grow"
                )
            code = grid_sincos(tuple(grid), self.dim, self.coordinate_range, self.axes).to(code)
        return code if self.residual is None else code + self.residual(grid)


class CoordinatePosition(nn.Module):
    """The sum of one small network per axis, which maps a coordinate to a code, for any grid with that many axes.

    Coordinates are token centres in [-1, 1], encoded as sines and cosines of 8 octaves. Grid sizes that were not seen
    in training interpolate between the positions that were.
    """

    OCTAVES = 8

    def __init__(self, num_axes: int, dim: int) -> None:
        super().__init__()
        self.axes = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * self.OCTAVES + 1, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(num_axes)
        )

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """Return the codes of a token grid, (N, dim)."""
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
    """Build the position code `name` (one of `POSITIONS`) for a token grid; the module maps a grid to (N, dim).

    Raises `UsageError` if the name is unknown.
    """
    if name not in POSITIONS:
        raise UsageError(f"unknown position {name!r}: use one of {', '.join(POSITIONS)}")
    return POSITIONS[name](grid, dim, coordinate_range)


def _by(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))
