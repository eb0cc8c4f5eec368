"""The Recurrent Interface Network without pixels: latents that read from an interface, compute, and write back.

Source: Jabri, Fleet & Chen 2022, "Scalable Adaptive Computation for Iterative Generation" (arXiv 2212.11972).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rin_video.config import ModelConfig
from rin_video.errors import UsageError
from rin_video.layers import DepthwiseConv, FeedForward, LayerNorm, LinearAttention, TransformerLayer
from rin_video.model.conditioning import Condition, modulation_width, num_condition_latents
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

    def __init__(self, config: ModelConfig, num_layers: int, num_axes: int) -> None:
        super().__init__()
        dim, dim_latent = config.dim, config.latent_width
        both: dict[str, Any] = {"qk_norm": config.qk_norm, "dim_cond": modulation_width(config)}
        cross: dict[str, Any] = {
            "dim_inner": min(dim, dim_latent),
            "num_heads": config.num_heads,
            "norm_context": config.norm_context,
            **both,
        }
        compute: dict[str, Any] = {
            "dim_inner": dim_latent,
            "num_heads": config.latent_num_heads,
            "mlp_ratio": config.latent_mlp_ratio,
            "dropout": config.dropout,
            "drop_path": config.drop_path,
            **both,
        }
        mixing = config.interface_mixing.split("+")
        self.mixers = nn.ModuleList()
        if "linear_attention" in mixing:
            self.mixers.append(LinearAttention(dim, config.num_heads))
        if "conv" in mixing:
            self.mixers.append(DepthwiseConv(dim, num_axes))
        self.read = TransformerLayer(dim_latent, dim, mlp_ratio=config.latent_mlp_ratio, **cross)
        self.compute = nn.ModuleList(TransformerLayer(dim_latent, None, **compute) for _ in range(num_layers))
        self.write = TransformerLayer(dim, dim_latent, mlp_ratio=config.mlp_ratio, **cross) if num_layers else None

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
    or None; `cond` is what `Conditioner` makes of noise level, class and embedding. The slots that hold conditions are
    among the `num_latents`. `num_axes` is the number of axes of the token grid: convolutions need it. Raises
    `UsageError` for more heads than width, or more conditions than latents.
    """

    def __init__(self, config: ModelConfig, num_axes: int = 2) -> None:
        super().__init__()
        dim, dim_latent = config.dim, config.latent_width
        num_conditions = num_condition_latents(config)
        learned = config.num_latents - num_conditions
        if learned < 1:
            raise UsageError(
                f"num_latents is {config.num_latents}, of which time and class take {num_conditions}: use more"
            )
        for name, heads, width in (
            ("num_heads", config.num_heads, min(dim, dim_latent)),
            ("latent_num_heads", config.latent_num_heads, dim_latent),
        ):
            if heads > width:
                raise UsageError(f"{name} is {heads}, more than the attention is wide ({width}): use fewer")
        self.num_latents, self.dim_latent = config.num_latents, dim_latent
        self.gradient_checkpointing = False  # keep no activations of a block, compute it again for the gradient
        self.latents = make_position(config.latent_position, (learned,), dim_latent)
        carried = config.self_conditioning.split("+")
        self.latent_self_cond = SelfConditioning(dim_latent, config.latent_mlp_ratio) if "latent" in carried else None
        self.interface_self_cond = SelfConditioning(dim, config.mlp_ratio) if "interface" in carried else None
        self.blocks = nn.ModuleList(Block(config, num_layers, num_axes) for num_layers in config.compute_layers)

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
