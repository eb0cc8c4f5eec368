"""The layers of a RIN block: norms, attention, feed-forward, and the read, compute and write layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EPS = 1e-6


def init_linears(module: nn.Module) -> None:
    """Initialise the linear layers of `module` with Xavier-uniform weights and zero biases, as in the original code."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with eps 1e-6 that computes in float32, whatever the precision of its input."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., dim) over its last axis; the dtype is kept."""
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` with odd kernels and padding that keeps the size, with the right gradients in bfloat16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` (B, C, F, H, W)."""
        return conv3d(x, self.weight, self.bias, groups=self.groups)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int = 1) -> Tensor:
    """Convolve `x` (B, C, F, H, W) with a kernel of odd sizes and zero padding that keeps the size.

    On CPUs with AMX, oneDNN (to version 3.12 at least) computes wrong gradients of the weights of some 3D convolutions
    in bfloat16: NaN, or off by any amount, where the frames are few compared with the height and width. On CPUs, the
    frames that a kernel meets are therefore concatenated along the channels for a 2D convolution, and depth-wise
    kernels use float32.
    """
    padding = tuple(size // 2 for size in weight.shape[2:])
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not half:
        return F.conv3d(x, weight, bias, padding=padding, groups=groups)
    if groups > 1:
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return F.conv3d(x.float(), weight.float(), bias, padding=padding, groups=groups).to(x.dtype)
    (batch, _, frames, *_), taps = x.shape, weight.shape[2]
    maps = F.pad(
        x.movedim(1, -1).bfloat16(), (0, 0, 0, 0, 0, 0, padding[0], padding[0])
    )  # channels stay last in memory
    maps = torch.cat([maps[:, tap : tap + frames] for tap in range(taps)], dim=-1).flatten(0, 1).movedim(-1, 1)
    out = F.conv2d(maps, weight.movedim(2, 1).flatten(1, 2), bias, padding=padding[1:])
    return out.reshape(batch, frames, *out.shape[1:]).movedim(1, 2)


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm whose scale and shift are predicted from a condition; at initialisation it equals a plain LayerNorm.

    Source: Peebles & Xie 2023, "adaLN", with zero initialisation.
    """

    def __init__(self, dim: int, dim_cond: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.to_scale_shift = nn.Linear(dim_cond, 2 * dim)
        nn.init.zeros_(self.to_scale_shift.weight)
        nn.init.zeros_(self.to_scale_shift.bias)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Normalise `x` (B, N, dim), then scale and shift it by the condition `modulation` (B, dim_cond)."""
        scale, shift = self.to_scale_shift(F.silu(modulation)).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention with queries from one sequence and keys and values from another.

    `dim_inner` is the total width of all heads; each head has `dim_inner // num_heads`. All projections have biases, as
    published. The initial scale is that of the original code: its kernels are (in, heads, head size), so Glorot's rule
    sees larger fans. Initial q, k and v are therefore about 5 times smaller, and the output 3 times smaller, than with
    a fused matrix.
    """

    def __init__(self, dim: int, dim_context: int, dim_inner: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        head = dim_inner // num_heads
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, head * num_heads)
        self.to_kv = nn.Linear(dim_context, 2 * head * num_heads)
        self.to_out = nn.Linear(head * num_heads, dim)
        self.q_norm = LayerNorm(head) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(head) if qk_norm else nn.Identity()
        _glorot(self.to_q, fan_in=dim * num_heads, fan_out=dim * head)
        _glorot(self.to_kv, fan_in=dim_context * num_heads, fan_out=dim_context * head)
        _glorot(self.to_out, fan_in=head * num_heads, fan_out=dim * num_heads)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from `x` (B, N, dim) to `context` (B, M, dim_context); returns (B, N, dim)."""
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.to_kv(context), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of queries (B, h, n, d) on keys and values (B, h, m, d): (B, h, n, d).

    `mask` is true for the keys that exist. It has the shape (windows, 1, 1, m), and the batch consists of samples times
    windows.
    """
    if mask is not None:
        mask = mask.repeat(len(q) // len(mask), 1, 1, 1)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The backward pass of torch's fused kernel takes two to seven times as long there (benchmarks/NOTES.md).
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _glorot(linear: nn.Linear, *, fan_in: int, fan_out: int) -> None:
    bound = (6 / (fan_in + fan_out)) ** 0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


# timm has DropPath and Mlp, but importing it takes more than a second.
class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes a sample with probability `drop_prob` and scales the others up.

    Source: Huang et al. 2016 (arXiv 1603.09382).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of `x` (B, ...)."""
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if keep else mask)


class Mlp(nn.Module):
    """A network with one hidden layer: W2 dropout(GELU(W1 x))."""

    def __init__(self, dim: int, dim_hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim_hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(dim_hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., dim) to (..., dim)."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class FeedForward(nn.Module):
    """A feed-forward layer with its residual connection: x + W2 GELU(W1 LN(x))."""

    def __init__(
        self, dim: int, mlp_ratio: float, *, dropout: float = 0.0, drop_path: float = 0.0, dim_cond: int | None = None
    ) -> None:
        super().__init__()
        self.norm = _norm(dim, dim_cond)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)
        self.drop_path = DropPath(drop_path)
        init_linears(self.mlp)

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Map `x` (B, N, dim) to (B, N, dim); the adaptive norm requires the condition `modulation` (B, dim_cond)."""
        return x + self.drop_path(self.mlp(_apply_norm(self.norm, x, modulation)))


class TransformerLayer(nn.Module):
    """Attention, then a feed-forward layer, both residual: the layer for the read, compute and write steps.

    If `dim_context` is None the layer is self-attention, and keys and values use the normalised input. Otherwise only
    the queries are normalised, unless `norm_context` is set.
    """

    def __init__(
        self,
        dim: int,
        dim_context: int | None,
        *,
        dim_inner: int,
        num_heads: int,
        mlp_ratio: float,
        norm_context: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dim_cond: int | None = None,
    ) -> None:
        super().__init__()
        self.self_attention = dim_context is None
        dim_context = dim_context or dim
        self.norm = _norm(dim, dim_cond)
        self.norm_context = LayerNorm(dim_context) if norm_context and not self.self_attention else nn.Identity()
        self.attention = Attention(dim, dim_context, dim_inner, num_heads, qk_norm=qk_norm)
        self.drop_path = DropPath(drop_path)
        self.feed_forward = FeedForward(dim, mlp_ratio, dropout=dropout, drop_path=drop_path, dim_cond=dim_cond)

    def forward(self, x: Tensor, context: Tensor | None = None, modulation: Tensor | None = None) -> Tensor:
        """Attend from `x` (B, N, dim) to `context` (B, M, dim_context), or to itself; returns (B, N, dim).

        The adaptive norms require the condition `modulation` (B, dim_cond).
        """
        query = _apply_norm(self.norm, x, modulation)
        context = query if context is None else self.norm_context(context)
        x = x + self.drop_path(self.attention(query, context))
        return self.feed_forward(x, modulation)


def _norm(dim: int, dim_cond: int | None) -> nn.Module:
    return LayerNorm(dim) if dim_cond is None else AdaptiveLayerNorm(dim, dim_cond)


def _apply_norm(norm: nn.Module, x: Tensor, modulation: Tensor | None) -> Tensor:
    return norm(x, modulation) if isinstance(norm, AdaptiveLayerNorm) else norm(x)
