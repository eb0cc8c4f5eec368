"""Mixing of the interface tokens before they are read: convolutions and attention that see neighbours, or all tokens.

Each layer is residual and is the identity at initialisation. Its cost is linear in the number of tokens (of windows
that cover all frames, in their number). It maps tokens (B, N, dim) on a token grid, outermost axis first, to (B, N,
dim). A grid with fewer axes than a layer was built for gets outer axes of size 1 (an image is a clip of one frame).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rin_video.config import MixingName, ModelConfig
from rin_video.layers import Conv3d, FeedForward, LayerNorm, attend, conv3d

Grid = tuple[int, ...]
ROTARY_BASE = 100.0  # as for vision transformers, because windows are short (Heo et al. 2024, arXiv 2403.13298)


class LinearAttention(nn.Module):
    """Self-attention of all tokens with linear cost.

    Source: Shen et al. 2021, "Efficient attention" (softmax over features for q, over tokens for k).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = dim // num_heads * num_heads
        self.norm = LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        nn.init.xavier_uniform_(self.to_qkv.weight)
        _zero(self.to_out)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Mix `x` (B, N, dim); `grid` is ignored."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        context = k.softmax(dim=-2).transpose(-1, -2) @ v
        out = q.softmax(dim=-1) @ context
        mixed: Tensor = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        return x + mixed


class DepthwiseConv(nn.Module):
    """Depth-wise convolution of size 3 over the token grid. Source: Chu et al. 2021, "PEG"."""

    def __init__(self, dim: int, num_axes: int) -> None:
        super().__init__()
        self.norm, self.num_axes = LayerNorm(dim), num_axes
        conv = (nn.Conv1d, nn.Conv2d, Conv3d)[num_axes - 1]
        self.conv = conv(dim, dim, 3, padding=1, groups=dim)
        _zero(self.conv)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Mix `x` (B, N, dim) on the token grid."""
        maps = self.norm(x).transpose(1, 2).unflatten(-1, _padded(grid, self.num_axes))
        mixed: Tensor = self.conv(maps)
        return x + mixed.flatten(2).transpose(1, 2)


class DenseConv(nn.Module):
    """Convolution of size 3 over the token grid with all pairs of channels, then GELU and a linear layer.

    `grid` is the token grid to build for: the kernel has size 1 along its axes with a single token (tubes as long as
    the clip), or along all but the last if there is only one token.
    """

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.kernel = tuple(3 if size > 1 else 1 for size in grid)
        if max(self.kernel) == 1:
            self.kernel = (*self.kernel[:-1], 3)
        self.weight = nn.Parameter(torch.empty(dim, dim, *self.kernel))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.to_out = nn.Linear(dim, dim)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as in torch's convolutions
        _zero(self.to_out)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Mix `x` (B, N, dim) on the token grid."""
        weight: Tensor = self.weight
        grid, kernel = _padded(grid, len(self.kernel)), self.kernel
        # Along an axis of size 1 only the middle of the kernel meets data, so that the axis can be left out.
        for axis in (axis for axis in reversed(range(len(grid))) if grid[axis] == 1 and weight.ndim > 3):
            weight = weight.select(axis + 2, kernel[axis] // 2)
            grid, kernel = grid[:axis] + grid[axis + 1 :], kernel[:axis] + kernel[axis + 1 :]
        maps = self.norm(x).reshape(len(x), *grid, -1).movedim(-1, 1)  # in memory, channels stay last: the fast format
        if len(grid) == 3:
            mixed = conv3d(maps, weight, self.bias)
        else:
            mixed = (F.conv1d, F.conv2d)[len(grid) - 1](maps, weight, self.bias, padding=[k // 2 for k in kernel])
        out: Tensor = self.to_out(F.gelu(mixed.movedim(1, -1).flatten(1, -2)))
        return x + out


class LocalAttention(nn.Module):
    """A transformer layer of the tokens of each window of the token grid, with rotary positions.

    `window` has the number of tokens along each axis, or 0 for all. If `shifted`, windows begin half a window earlier
    along the axes that have several, so that tokens on both sides of a border meet. Windows at the border of the grid
    may be incomplete; what is not there is masked. Source: windows of Liu et al. 2021 (arXiv 2103.14030), groups of
    Chen & Li 2023, "FIT" (arXiv 2305.12689), rotary positions of Su et al. 2021 (arXiv 2104.09864) with a share of each
    head per axis.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Sequence[int],
        *,
        shifted: bool = False,
        mlp_ratio: float = 4,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        head = dim // num_heads
        self.num_heads, self.window, self.shifted = num_heads, tuple(window), shifted
        self.norm = LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * head * num_heads)
        self.q_norm = LayerNorm(head) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(head) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(head * num_heads, dim)
        self.feed_forward = FeedForward(dim, mlp_ratio)
        nn.init.xavier_uniform_(self.to_qkv.weight)
        nn.init.zeros_(self.to_qkv.bias)
        _zero(self.to_out)
        _zero(self.feed_forward.mlp.fc2)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Mix `x` (B, N, dim) within windows of the token grid."""
        cut = Windows(_padded(grid, len(self.window)), self.window, self.shifted)
        q, k, v = cut.split(self.to_qkv(self.norm(x)), parts=3, heads=self.num_heads)
        angle = rotary_angles(cut.size, q.shape[-1], x.device)
        q, k = rotate(self.q_norm(q), angle), rotate(self.k_norm(k), angle)
        x = x + self.to_out(cut.join(attend(q, k, v, cut.mask(x.device))))
        result: Tensor = self.feed_forward(x)
        return result

    def extra_repr(self) -> str:
        """Describe the windows for `repr`."""
        return f"window={self.window}, shifted={self.shifted}"


class Windows:
    """The windows of a token grid: how many there are, how long each is, and which of its tokens exist."""

    def __init__(self, grid: Grid, window: Sequence[int], shifted: bool) -> None:
        self.grid = grid
        self.size = tuple(min(w or n, n) for n, w in zip(grid, window, strict=True))
        self.before = tuple(w // 2 if shifted and w < n else 0 for n, w in zip(grid, self.size, strict=True))
        self.counts = tuple(-(-(n + b) // w) for n, b, w in zip(grid, self.before, self.size, strict=True))
        padding = [(b, c * w - n - b) for n, b, c, w in zip(grid, self.before, self.counts, self.size, strict=True)]
        self.padding = [amount for pair in reversed(padding) for amount in pair]

    def split(self, x: Tensor, *, parts: int, heads: int) -> Tensor:
        """Cut (B, N, parts * heads * d) into windows: (parts, B * windows, heads, tokens per window, d)."""
        axes = range(len(self.grid))
        x = x.reshape(len(x), *self.grid, -1)
        if any(self.padding):
            x = F.pad(x, (0, 0, *self.padding))
        inside = " ".join(f"w{i}" for i in axes)
        counts = " ".join(f"n{i}" for i in axes)
        both = " ".join(f"(n{i} w{i})" for i in axes)
        pattern = f"b {both} (parts h d) -> parts (b {counts}) h ({inside}) d"
        return rearrange(x, pattern, parts=parts, h=heads, **{f"w{i}": self.size[i] for i in axes})

    def join(self, x: Tensor) -> Tensor:
        """Undo `split` for one part: (B * windows, heads, tokens per window, d) to (B, N, heads * d)."""
        axes = range(len(self.grid))
        inside = " ".join(f"w{i}" for i in axes)
        counts = " ".join(f"n{i}" for i in axes)
        both = " ".join(f"(n{i} w{i})" for i in axes)
        sizes = {f"w{i}": self.size[i] for i in axes} | {f"n{i}": self.counts[i] for i in axes}
        x = rearrange(x, f"(b {counts}) h ({inside}) d -> b {both} (h d)", **sizes)
        for axis, (start, size) in enumerate(zip(self.before, self.grid, strict=True)):
            x = x.narrow(axis + 1, start, size)
        return x.flatten(1, -2)

    def mask(self, device: torch.device) -> Tensor | None:
        """Return which tokens of each window exist, (windows, 1, 1, tokens per window), or None if all do."""
        if not any(self.padding):
            return None
        exists = F.pad(torch.ones(self.grid, dtype=torch.bool, device=device), self.padding)
        axes = len(self.grid)
        exists = exists.reshape([n for pair in zip(self.counts, self.size, strict=True) for n in pair])
        order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
        return exists.permute(order).reshape(math.prod(self.counts), 1, 1, -1)


def rotary_angles(size: Grid, dim_head: int, device: torch.device) -> Tensor:
    """Return the angles of rotary positions in a window, (tokens per window, pairs of a head), float32.

    Each axis that is longer than 1 gets an equal share of the `dim_head // 2` pairs; pairs that are left do not rotate.
    """
    axes = [axis for axis, length in enumerate(size) if length > 1]
    pairs = dim_head // 2
    angles = torch.zeros(*size, pairs, device=device)
    share = pairs // max(len(axes), 1)
    frequency = ROTARY_BASE ** (-torch.arange(share, device=device) / max(share, 1))
    for place, axis in enumerate(axes):
        position = torch.arange(size[axis], device=device, dtype=torch.float32)
        shape = [-1 if i == axis else 1 for i in range(len(size))]
        angles[..., place * share : (place + 1) * share] = position.view(*shape, 1) * frequency
    return angles.flatten(0, -2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dim / 2) of `x` (..., tokens, dim) by `angles` (tokens, dim // 2); keeps the dtype."""
    pairs = angles.shape[-1]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


# Each function builds a layer from the configuration, the token grid, and the number of the layer among its kind.
MIXERS: dict[MixingName, Callable[[ModelConfig, Grid, int], nn.Module]] = {
    "linear_attention": lambda config, grid, index: LinearAttention(config.dim, config.num_heads),
    "conv": lambda config, grid, index: DepthwiseConv(config.dim, len(grid)),
    "dense_conv": lambda config, grid, index: DenseConv(config.dim, grid),
    "local_attention": lambda config, grid, index: _local(config, grid, shifted=index % 2 == 1),
    "group": lambda config, grid, index: _local(config, grid, shifted=False),
}


def make_mixers(config: ModelConfig, grid: Grid, block: int) -> nn.ModuleList:
    """Return the mixing layers of block number `block`, in the order of `MIXERS`, `interface_layers` times.

    `grid` is the token grid of the tokenizer with the most axes.
    """
    kinds = [name for name in MIXERS if name in config.interface_mixing.split("+")]
    count = config.interface_layers
    return nn.ModuleList(
        MIXERS[name](config, grid, block * count + layer) for layer, name in product(range(count), kinds)
    )


def _local(config: ModelConfig, grid: Grid, *, shifted: bool) -> LocalAttention:
    return LocalAttention(
        config.dim,
        config.num_heads,
        config.interface_window_sizes(len(grid)),
        shifted=shifted,
        mlp_ratio=config.mlp_ratio,
        qk_norm=config.qk_norm,
    )


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _padded(grid: Grid, num_axes: int) -> Grid:
    return (1,) * (num_axes - len(grid)) + tuple(grid)
