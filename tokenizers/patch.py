"""The patch tokenizer for grids of any rank, which the sequence, image and tube tokenizers specialise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from rin_video.config import PositionName
from rin_video.errors import UsageError
from rin_video.layers import Conv3d, LayerNorm, init_linears
from rin_video.tokenizers.positions import make_position

if TYPE_CHECKING:
    from typing_extensions import Self

    from rin_video.config import ModelConfig


class PatchTokenizer(nn.Module):
    """Converts data (B, C, *grid) to tokens (B, N, dim) and back, with non-overlapping patches.

    A token is the LayerNorm of the projected patch plus the position code, which is not normalised. Patches are
    flattened in row-major order with the channel last, tokens in row-major order with the first axis outermost. Values
    are in diffusion range, about [-1, 1].

    `grid` and `patch_size` have one number per axis. `in_channels` may exceed `out_channels` if the input contains more
    than the data (a previous prediction, a mask). `dual_patchnorm` also normalises the raw patch (Kumar et al. 2023).
    `conv_width` adds two convolutions of size 3 with that many channels before the patches are cut (Xiao et al. 2021,
    arXiv 2106.14881), and two after they are assembled, which smooth the seams between patches. The last two also
    receive the input, so that fine detail can bypass the tokens. Raises `UsageError` if a size is not a multiple of
    its patch size.
    """

    axes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        grid: Sequence[int],
        patch_size: Sequence[int],
        dim: int,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        position: PositionName = "learned",
        coordinate_range: float | None = 1000.0,
        dual_patchnorm: bool = False,
        conv_width: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels or in_channels
        self.grid, self.patch_size = tuple(grid), tuple(patch_size)
        volume, axes = math.prod(self.patch_size), len(self.patch_size)
        width_in, width_out = conv_width or in_channels, conv_width or self.out_channels
        self.conv_in = _convolutions(axes, in_channels, width_in, width_in) if conv_width else None
        self.patch_norm = LayerNorm(volume * width_in) if dual_patchnorm else nn.Identity()
        self.to_tokens = nn.Linear(volume * width_in, dim)
        self.norm = LayerNorm(dim)
        self.position = make_position(position, self.token_grid(self.grid), dim, coordinate_range)
        self.out_norm = LayerNorm(dim)
        self.to_patches = nn.Linear(dim, volume * width_out)
        self.conv_out = (
            _convolutions(axes, width_out + in_channels, width_out, self.out_channels) if conv_width else None
        )
        init_linears(self.to_tokens)
        init_linears(self.to_patches)

    @classmethod
    def grid_of(cls, config: ModelConfig) -> tuple[int, ...]:
        """Return the data grid of a model; a subclass for new axes must implement this."""
        raise NotImplementedError(f"{cls.__name__} must implement grid_of, which reads its grid from a ModelConfig")

    @classmethod
    def from_config(cls, config: ModelConfig, in_channels: int) -> Self:
        """Build the tokenizer of a model; `in_channels` counts the data and all further inputs, such as a mask."""
        grid = cls.grid_of(config)
        return cls(
            grid,
            config.patch_sizes(len(grid), ", ".join(cls.axes)),
            config.dim,
            in_channels=in_channels,
            out_channels=config.channels,
            position=config.position,
            coordinate_range=config.coordinate_range,
            dual_patchnorm=config.dual_patchnorm,
            conv_width=config.conv_width,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, *grid), for which the tokenizer was built."""
        return (self.out_channels, *self.grid)

    def token_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Return the number of tokens along each axis of a data grid.

        Raises `UsageError` if the grid has another number of axes, or a size is not a multiple of its patch size.
        """
        if len(grid) != len(self.patch_size):
            raise UsageError(
                f"{type(self).__name__} takes {len(self.patch_size)} axes {self._axes()}, not {tuple(grid)}"
            )
        for axis, size, patch in zip(self._axes(), grid, self.patch_size, strict=True):
            if size < 1 or size % patch:
                fits = sorted({max(size // patch, 1) * patch, (size // patch + 1) * patch})
                raise UsageError(
                    f"{axis} {size} is not a multiple of its patch size {patch}: "
                    f"the nearest sizes that fit are {' and '.join(map(str, fits))}"
                )
        return tuple(size // patch for size, patch in zip(grid, self.patch_size, strict=True))

    def tokenize(self, x: Tensor) -> Tensor:
        """Convert data (B, in_channels, *grid) to float32 tokens (B, N, dim), position codes included.

        Raises `UsageError` if the number of channels or the grid does not fit.
        """
        grid = self.token_grid(x.shape[2:])
        if x.shape[1] != self.in_channels:
            raise UsageError(f"the input has {x.shape[1]} channels, the tokenizer takes {self.in_channels}")
        if self.conv_in is not None:
            x = self.conv_in(x)
        patches = rearrange(
            x, f"b c {self._axis_sizes()} -> b ({self._counts()}) ({self._inside()} c)", **self._sizes()
        )
        tokens = self.norm(self.to_tokens(self.patch_norm(patches)))
        return tokens.float() + self.position(grid).float()  # the residual stream stays float32 under autocast

    def detokenize(self, tokens: Tensor, grid: Sequence[int], x: Tensor) -> Tensor:
        """Convert tokens (B, N, dim) to data (B, out_channels, *grid).

        `x` (B, in_channels, *grid) is the input of `tokenize`; only the convolutions use it.
        """
        counts = dict(zip(self._counts().split(), self.token_grid(grid), strict=True))
        patches = self.to_patches(self.out_norm(tokens))
        pattern = f"b ({self._counts()}) ({self._inside()} c) -> b c {self._axis_sizes()}"
        out = rearrange(patches, pattern, **counts, **self._sizes())
        return out if self.conv_out is None else self.conv_out(torch.cat([out, x.to(out)], dim=1))

    # In the einops patterns, axis i of the grid has n{i} patches of p{i} elements.
    def _counts(self) -> str:
        return " ".join(f"n{i}" for i in range(len(self.patch_size)))

    def _inside(self) -> str:
        return " ".join(f"p{i}" for i in range(len(self.patch_size)))

    def _axis_sizes(self) -> str:
        return " ".join(f"(n{i} p{i})" for i in range(len(self.patch_size)))

    def _sizes(self) -> dict[str, int]:
        return {f"p{i}": size for i, size in enumerate(self.patch_size)}

    def _axes(self) -> tuple[str, ...]:
        return self.axes or tuple(f"axis {i}" for i in range(len(self.patch_size)))


def _convolutions(axes: int, channels: int, width: int, out_channels: int) -> nn.Sequential:
    """Two convolutions of size 3 with a GELU between them: (B, channels, *grid) to (B, out_channels, *grid)."""
    if axes > 3:
        raise UsageError(f"model.conv_width supports 1 to 3 axes, but the data has {axes}: set it to 0")
    conv = (nn.Conv1d, nn.Conv2d, Conv3d)[axes - 1]
    return nn.Sequential(conv(channels, width, 3, padding=1), nn.GELU(), conv(width, out_channels, 3, padding=1))
