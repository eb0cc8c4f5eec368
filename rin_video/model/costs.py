"""The costs of the parts of a model in closed form: parameters, and floating-point operations of a forward pass.

All costs are for one sample. A multiply-add counts as 2 operations. tests/test_info.py compares the sums with models
that are built. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from rin_video.config import ModelConfig

AXES = {1: "length", 2: "height, width", 3: "frames, height, width"}
OCTAVES = 8  # octaves of sines and cosines in `CoordinatePosition`
Grid: TypeAlias = tuple[int, ...]


# ---- shapes


def data_grid(config: ModelConfig, name: str) -> Grid | None:
    """Return the grid of a sample for one of our tokenizers; None for other tokenizers, or if an option is missing."""
    if name == "sequence" and config.sequence_length:
        return (config.sequence_length,)
    if name == "image" and config.image_size is not None:
        return config.height_width
    if name == "tube" and config.image_size is not None and config.frames:
        return (config.frames, *config.height_width)
    return None


def patch_of(config: ModelConfig, grid: Grid) -> Grid:
    """Return the size of a patch along each axis of a grid."""
    return config.patch_sizes(len(grid), AXES[len(grid)])


def token_grid(config: ModelConfig, grid: Grid) -> Grid:
    """Return the number of tokens along each axis of a grid."""
    return tuple(size // patch for size, patch in zip(grid, patch_of(config, grid), strict=True))


def can_be_built(config: ModelConfig, grids: list[Grid]) -> bool:
    """Whether the options are valid for a `RIN`, which raises the error itself if they are not."""
    dim, dim_latent = config.dim, config.latent_width
    fits = all(not size % patch for grid in grids for size, patch in zip(grid, patch_of(config, grid), strict=True))
    codes = [dim] if config.position.startswith("sincos") else []
    codes += [dim_latent] if config.latent_position.startswith("sincos") else []
    return (
        fits
        and len({len(grid) for grid in grids}) == len(grids)
        and not any(width % 2 for width in codes)
        and not (dim if config.time_conditioning == "interface" else dim_latent) % 8
        and config.num_latents > config.num_conditions("latent")
        and config.num_heads <= min(dim, dim_latent)
        and config.latent_num_heads <= dim_latent
    )


# ---- costs of the layers of rin_video/layers.py and rin_video/model/mixing.py, under similar names


@dataclass(frozen=True)
class Cost:
    """Number of parameters, and of floating-point operations per sample."""

    params: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.flops + other.flops)

    def __mul__(self, times: int) -> Cost:
        return Cost(times * self.params, times * self.flops)


def linear(dim_in: int, dim_out: int, vectors: int, bias: bool = True) -> Cost:
    """Return the cost of a linear layer on a number of vectors."""
    return Cost(dim_in * dim_out + bias * dim_out, 2 * vectors * dim_in * dim_out)


def convolution(dim_in: int, dim_out: int, grid: Grid, num_axes: int) -> Cost:
    """Return the cost of a convolution of size 3 along each axis."""
    weights = dim_in * dim_out * 3**num_axes
    return Cost(weights + dim_out, 2 * weights * math.prod(grid))


def norm(dim: int, dim_cond: int | None = None) -> Cost:
    """Return the cost of a LayerNorm, which is adaptive if there is a condition."""
    return Cost(2 * dim) + (linear(dim_cond, 2 * dim, 1) if dim_cond else Cost())


def feed_forward(dim: int, ratio: float, vectors: int, dim_cond: int | None = None) -> Cost:
    """Return the cost of a `FeedForward` on a number of vectors."""
    hidden = int(dim * ratio)
    return norm(dim, dim_cond) + linear(dim, hidden, vectors) + linear(hidden, dim, vectors)


def attention(dim: int, other: int, dim_inner: int, num_heads: int, queries: int, keys: int, qk_norm: bool) -> Cost:
    """Return the cost of an `Attention` of vectors of width `dim` on vectors of width `other`."""
    head = dim_inner // num_heads
    inner = head * num_heads
    projections = linear(dim, inner, queries) + linear(other, 2 * inner, keys) + linear(inner, dim, queries)
    return projections + Cost(qk_norm * 4 * head, 4 * queries * keys * inner)


def self_conditioning(dim: int, ratio: float, vectors: int) -> Cost:
    """Return the cost of a `SelfConditioning` on a number of vectors."""
    return feed_forward(dim, ratio, vectors) + norm(dim)


def dense_convolution(dim: int, grid: Grid, built: Grid) -> Cost:
    """Return the cost of a `DenseConv` that was built for a token grid `built`; it leaves out axes with one token."""
    tokens, axes = math.prod(grid), sum(size > 1 for size in built)
    convolved = sum(size > 1 and also > 1 for size, also in zip(outer(grid, len(built)), built, strict=True))
    if axes == 0:
        axes = convolved = 1
    convolved = convolved or int(built[-1] > 1)  # the last axis remains
    kernel = Cost(dim * dim * 3**axes + dim, 2 * dim * dim * 3**convolved * tokens)
    return norm(dim) + kernel + linear(dim, dim, tokens)


def outer(grid: Grid, num_axes: int) -> Grid:
    """Return a grid with outer axes of size 1, so that it has `num_axes` axes."""
    return (1,) * (num_axes - len(grid)) + tuple(grid)


def local_attention(config: ModelConfig, grid: Grid, num_axes: int, shifted: bool) -> Cost:
    """Return the cost of a `LocalAttention`; incomplete windows cost as much as complete ones."""
    dim, tokens = config.dim, math.prod(grid)
    head = dim // config.num_heads
    inner = head * config.num_heads
    windows = per_window = 1
    for n, window in zip(outer(grid, num_axes), config.interface_window_sizes(num_axes), strict=True):
        size = min(window or n, n)
        windows *= -(-(n + (size // 2 if shifted and size < n else 0)) // size)
        per_window *= size
    products = Cost(config.qk_norm * 4 * head, 4 * windows * per_window**2 * inner)
    projections = linear(dim, 3 * inner, tokens) + linear(inner, dim, tokens)
    return norm(dim) + projections + products + feed_forward(dim, config.mlp_ratio, tokens)


def linear_attention(dim: int, num_heads: int, tokens: int) -> Cost:
    """Return the cost of a `LinearAttention`."""
    head = dim // num_heads
    inner = head * num_heads
    products = Cost(0, 4 * tokens * inner * head)
    return norm(dim) + linear(dim, 3 * inner, tokens, bias=False) + products + linear(inner, dim, tokens)


def position(name: str, grid: Grid, dim: int) -> Cost:
    """Return the cost of the position code `name` of a token grid."""
    if name == "coordinate":
        networks = (linear(2 * OCTAVES + 1, dim, size) + linear(dim, dim, size) for size in grid)
        return sum(networks, Cost())
    return Cost(0 if name == "sincos" else math.prod(grid) * dim)


# ---- costs of the parts of a RIN


def tokenizer_cost(config: ModelConfig, grid: Grid) -> Cost:
    """Return the cost of a `PatchTokenizer`, from data to tokens and back."""
    dim, out_channels, axes, width = config.dim, config.channels, len(grid), config.conv_width
    in_channels = out_channels * (1 + ("x0" in config.self_conditioning.split("+"))) + config.known_mask
    width_in, width_out = width or in_channels, width or out_channels
    volume, counts = math.prod(patch_of(config, grid)), token_grid(config, grid)
    tokens = math.prod(counts)
    cost = linear(volume * width_in, dim, tokens) + norm(dim) + position(config.position, counts, dim)
    cost += norm(dim) + linear(dim, volume * width_out, tokens)
    if config.dual_patchnorm:
        cost += norm(volume * width_in)
    if width:
        for dims in ((in_channels, width), (width, width), (width + in_channels, width), (width, out_channels)):
            cost += convolution(*dims, grid, axes)
    return cost


def conditioner_cost(config: ModelConfig) -> Cost:
    """Return the cost of a `Conditioner`."""
    width = {"latent": config.latent_width, "interface": config.dim, "adaln": config.latent_width}
    time = width[config.time_conditioning]
    cost = linear(time // 4, time, 1) + linear(time, time, 1)
    for name, dim_in in (("class", config.num_classes), ("embedding", config.embedding_dim)):
        if name in config.conditions:
            place, count = config.conditions[name]
            cost += linear(dim_in, width[place], count)
    if config.embedding_dim:
        cost += Cost(config.embedding_tokens * width[config.embedding_conditioning])  # learned positions
    return cost


def core_cost(config: ModelConfig, grid: Grid, built: Grid) -> Cost:
    """Return the cost of a `RINCore` for a token grid; the mixing layers were built for the grid `built`."""
    num_axes = len(built)
    dim, dim_latent, tokens, latents = config.dim, config.latent_width, math.prod(grid), config.num_latents
    dim_cond, read_only = config.modulation_width, config.num_conditions("interface")
    states, mixing = config.self_conditioning.split("+"), config.interface_mixing.split("+")

    def layer(wide: int, other: int, ratio: float, inner: int, heads: int, queries: int, keys: int) -> Cost:
        """Return the cost of a `TransformerLayer`."""
        attending = attention(wide, other, inner, heads, queries, keys, config.qk_norm)
        return norm(wide, dim_cond) + attending + feed_forward(wide, ratio, queries, dim_cond)

    def cross(wide: int, other: int, ratio: float, queries: int, keys: int) -> Cost:
        """Return the cost of a `TransformerLayer` that attends to other vectors than its own."""
        reading = layer(wide, other, ratio, min(dim, dim_latent), config.num_heads, queries, keys)
        return reading + (norm(other) if config.norm_context else Cost())

    mixers = Cost()
    if "linear_attention" in mixing:
        mixers += linear_attention(dim, config.num_heads, tokens)
    if "conv" in mixing:
        mixers += norm(dim) + convolution(1, dim, grid, num_axes)
    if "dense_conv" in mixing:
        mixers += dense_convolution(dim, grid, built)
    if "group" in mixing:
        mixers += local_attention(config, grid, num_axes, shifted=False)
    mixers *= config.interface_layers
    read = cross(dim_latent, dim, config.latent_mlp_ratio, latents, tokens + read_only)
    compute = layer(
        dim_latent, dim_latent, config.latent_mlp_ratio, dim_latent, config.latent_num_heads, latents, latents
    )
    write = cross(dim, dim_latent, config.mlp_ratio, tokens, latents)
    cost = position(config.latent_position, (latents - config.num_conditions("latent"),), dim_latent)
    if "latent" in states:
        cost += self_conditioning(dim_latent, config.latent_mlp_ratio, latents)
    if "interface" in states:
        cost += self_conditioning(dim, config.mlp_ratio, tokens)
    if "local_attention" in mixing:
        for index in range(config.depth * config.interface_layers):
            cost += local_attention(config, grid, num_axes, shifted=index % 2 == 1)
    for num_layers in config.compute_layers:
        cost += mixers + read + compute * num_layers + (write if num_layers else Cost())
    return cost
