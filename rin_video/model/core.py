"""The Recurrent Interface Network without pixels: latents that read from an interface, compute, and write back.

Source: Jabri, Fleet & Chen 2022, "Scalable Adaptive Computation for Iterative Generation" (arXiv 2212.11972).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rin_video.config import LatentPositionName
from rin_video.errors import UsageError
from rin_video.layers import DepthwiseConv, FeedForward, LayerNorm, LinearAttention, TransformerLayer
from rin_video.model.conditioning import Condition
from rin_video.tokenizers.positions import make_position


class SelfConditioning(nn.Module):
    """LN(FFN(previous)), to be added to what starts the next pass. The norm starts at zero, so training starts without.

    (B, N, dim) to the same. Zeros stand for "no previous pass"; they still give a constant once trained, which is
    computed once for all tokens and samples where there is no previous pass (None) at all: (1, 1, dim).
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.feed_forward = FeedForward(dim, mlp_ratio)
        self.norm = LayerNorm(dim)
        nn.init.zeros_(self.norm.weight)

    def forward(self, previous: Tensor | None) -> Tensor:
        if previous is None:
            previous = self.norm.weight.new_zeros(1, 1, len(self.norm.weight))
        return self.norm(self.feed_forward(previous))


class Block(nn.Module):
    """Read, compute, write. With no compute layers a block only reads."""

    def __init__(
        self,
        dim: int,
        dim_latent: int,
        num_layers: int,
        *,
        num_heads: int,
        latent_num_heads: int,
        mlp_ratio: float,
        latent_mlp_ratio: float,
        dropout: float,
        drop_path: float,
        norm_context: bool,
        qk_norm: bool,
        dim_cond: int | None,
        mixers: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        cross: dict[str, Any] = {
            "dim_inner": min(dim, dim_latent),
            "num_heads": num_heads,
            "norm_context": norm_context,
            "qk_norm": qk_norm,
            "dim_cond": dim_cond,
        }
        self.mixers = nn.ModuleList(mixers)
        self.read = TransformerLayer(dim_latent, dim, mlp_ratio=latent_mlp_ratio, **cross)
        self.compute = nn.ModuleList(
            TransformerLayer(
                dim_latent,
                None,
                dim_inner=dim_latent,
                num_heads=latent_num_heads,
                mlp_ratio=latent_mlp_ratio,
                qk_norm=qk_norm,
                dropout=dropout,
                drop_path=drop_path,
                dim_cond=dim_cond,
            )
            for _ in range(num_layers)
        )
        self.write = TransformerLayer(dim, dim_latent, mlp_ratio=mlp_ratio, **cross) if num_layers else None

    def forward(self, tokens: Tensor, latents: Tensor, cond: Condition, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        for mix in self.mixers:
            tokens = mix(tokens, grid)
        context = torch.cat([tokens, cond.interface.to(tokens)], dim=1) if cond.interface.shape[1] else tokens
        latents = self.read(latents, context, cond.modulation)
        for layer in self.compute:
            latents = layer(latents, None, cond.modulation)
        if self.write is not None:
            tokens = self.write(tokens, latents, cond.modulation)
        return tokens, latents


class RINCore(nn.Module):
    """Latents and blocks: `core(tokens, latents, cond) -> (tokens, latents)`. Images and video share it.

    `tokens` (B, N, dim) come from any tokenizer; `latents` (B, num_latents, dim_latent) are those of the previous pass,
    or None; `cond` says the noise level and the class. `num_latents` counts the slots that the condition takes.
    """

    def __init__(
        self,
        dim: int,
        dim_latent: int,
        num_latents: int,
        compute_layers: Sequence[int],
        *,
        num_cond_latents: int = 0,
        num_heads: int = 8,
        latent_num_heads: int = 16,
        mlp_ratio: float = 4,
        latent_mlp_ratio: float = 4,
        latent_position: LatentPositionName = "learned",
        self_conditioning: Sequence[str] = ("latent",),
        interface_mixing: Sequence[str] = (),
        num_axes: int = 0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_context: bool = False,
        qk_norm: bool = False,
        dim_cond: int | None = None,
    ) -> None:
        super().__init__()
        learned = num_latents - num_cond_latents
        if learned < 1:
            raise UsageError(f"num_latents is {num_latents}, of which time and class take {num_cond_latents}: use more")
        for name, heads, width in (
            ("num_heads", num_heads, min(dim, dim_latent)),
            ("latent_num_heads", latent_num_heads, dim_latent),
        ):
            if heads > width:
                raise UsageError(f"{name} is {heads}, more than the attention is wide ({width}): use fewer")
        self.num_latents, self.dim_latent = num_latents, dim_latent
        self.gradient_checkpointing = False  # keep no activations of a block, compute it again for the gradient
        self.latents = make_position(latent_position, (learned,), dim_latent)
        self.latent_self_cond = (
            SelfConditioning(dim_latent, latent_mlp_ratio) if "latent" in self_conditioning else None
        )
        self.interface_self_cond = SelfConditioning(dim, mlp_ratio) if "interface" in self_conditioning else None

        def mixers() -> list[nn.Module]:
            made: list[nn.Module] = []
            if "linear_attention" in interface_mixing:
                made.append(LinearAttention(dim, num_heads))
            if "conv" in interface_mixing:
                made.append(DepthwiseConv(dim, num_axes))
            return made

        self.blocks = nn.ModuleList(
            Block(
                dim,
                dim_latent,
                num_layers,
                num_heads=num_heads,
                latent_num_heads=latent_num_heads,
                mlp_ratio=mlp_ratio,
                latent_mlp_ratio=latent_mlp_ratio,
                dropout=dropout,
                drop_path=drop_path,
                norm_context=norm_context,
                qk_norm=qk_norm,
                dim_cond=dim_cond,
                mixers=mixers(),
            )
            for num_layers in compute_layers
        )

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor | None,
        cond: Condition,
        *,
        previous_tokens: Tensor | None = None,
        grid: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """One pass. `previous_tokens` are used with interface self-conditioning only, `grid` by convolutions only."""
        slots = self.latents((self.num_latents - cond.latents.shape[1],)).to(tokens.dtype)
        slots = torch.cat([slots.expand(len(tokens), -1, -1), cond.latents.to(tokens.dtype)], dim=1)
        if self.latent_self_cond is not None:
            slots = slots + self.latent_self_cond(latents)
        if self.interface_self_cond is not None:
            tokens = tokens + self.interface_self_cond(previous_tokens)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if again:
                tokens, slots = checkpoint(block, tokens, slots, cond, grid, use_reentrant=False)
            else:
                tokens, slots = block(tokens, slots, cond, grid)
        return tokens, slots
