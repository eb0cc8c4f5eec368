"""The core of the Recurrent Interface Network: latents that read from interface tokens, compute, and write back.

Source: Jabri, Fleet & Chen 2022, "Scalable Adaptive Computation for Iterative Generation" (arXiv 2212.11972).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rin_video.config import ModelConfig
from rin_video.errors import UsageError
from rin_video.layers import FeedForward, LayerNorm, TransformerLayer
from rin_video.model.conditioning import Condition
from rin_video.model.mixing import make_mixers
from rin_video.tokenizers.positions import make_position


class SelfConditioning(nn.Module):
    """Self-conditioning: LN(FFN(previous)), which is added to the initial state of the next pass.

    The LayerNorm scale is zero-initialised, so this is a no-op at first.
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.feed_forward = FeedForward(dim, mlp_ratio)
        self.norm = LayerNorm(dim)
        nn.init.zeros_(self.norm.weight)

    def forward(self, previous: Tensor | None) -> Tensor:
        """Map the state of the previous pass (B, N, dim) to (B, N, dim).

        Zeros mean that there was no previous pass. A trained layer maps them to a constant. If `previous` is None, only
        this constant is computed: (1, 1, dim).
        """
        if previous is None:
            previous = self.norm.weight.new_zeros(1, 1, len(self.norm.weight))
        update: Tensor = self.norm(self.feed_forward(previous))
        return update


class Block(nn.Module):
    """One block: optional mixing of the interface tokens, then read, compute and write.

    `num_layers` is the number of compute layers. A block without compute layers only reads. `grid` is the token
    grid, for which the mixing layers are built, and `index` the number of the block.
    """

    def __init__(self, config: ModelConfig, num_layers: int, grid: tuple[int, ...], index: int = 0) -> None:
        super().__init__()
        dim, dim_latent = config.dim, config.latent_width
        both: dict[str, Any] = {"qk_norm": config.qk_norm, "dim_cond": config.modulation_width}
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
        self.mixers = make_mixers(config, grid, index)
        self.read = TransformerLayer(dim_latent, dim, mlp_ratio=config.latent_mlp_ratio, **cross)
        self.compute = nn.ModuleList(TransformerLayer(dim_latent, None, **compute) for _ in range(num_layers))
        self.write = TransformerLayer(dim, dim_latent, mlp_ratio=config.mlp_ratio, **cross) if num_layers else None

    def forward(self, tokens: Tensor, latents: Tensor, cond: Condition, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Update `tokens` (B, N, dim) and `latents` (B, num_latents, dim_latent).

        `cond` holds the embedded conditions. `grid` is the token grid, which only the mixing layers use.
        """
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
    """The latents and blocks of a RIN, shared by all kinds of data: `core(tokens, latents, cond) -> (tokens, latents)`.

    The latent slots that hold conditions are among the `num_latents`. `grid` is the token grid, for which the mixing
    layers are built (with several tokenizers, of the one with the most axes). Raises `UsageError` if an attention has
    more heads than its width, or if the conditions leave no latent to learn.
    """

    def __init__(self, config: ModelConfig, grid: tuple[int, ...] = (2, 2)) -> None:
        super().__init__()
        dim, dim_latent = config.dim, config.latent_width
        num_conditions = config.num_conditions("latent")
        learned = config.num_latents - num_conditions
        if learned < 1:
            raise UsageError(
                f"num_latents is {config.num_latents}, of which conditions take {num_conditions}: use more latents"
            )
        for name, heads, width in (
            ("num_heads", config.num_heads, min(dim, dim_latent)),
            ("latent_num_heads", config.latent_num_heads, dim_latent),
        ):
            if heads > width:
                raise UsageError(f"{name} is {heads}, but the attention has a width of {width}: use fewer heads")
        self.num_latents, self.dim_latent = config.num_latents, dim_latent
        self.gradient_checkpointing = False  # recompute the activations of each block in the backward pass
        self.latents = make_position(config.latent_position, (learned,), dim_latent)
        parts = config.self_conditioning.split("+")
        self.latent_self_cond = SelfConditioning(dim_latent, config.latent_mlp_ratio) if "latent" in parts else None
        self.interface_self_cond = SelfConditioning(dim, config.mlp_ratio) if "interface" in parts else None
        self.blocks = nn.ModuleList(
            Block(config, num_layers, grid, index) for index, num_layers in enumerate(config.compute_layers)
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
        """Run one forward pass and return the new tokens and latents.

        `tokens` (B, N, dim) come from a tokenizer, and `cond` from `Conditioner`. `latents` (B, num_latents,
        dim_latent) and `previous_tokens` (B, N, dim) are those of the previous pass, or None. Only interface
        self-conditioning uses `previous_tokens`. Only the mixing layers use `grid`, the token grid.
        """
        slots = self.latents((self.num_latents - cond.latents.shape[1],)).to(tokens.dtype)
        slots = torch.cat([slots.expand(len(tokens), -1, -1), cond.latents.to(tokens.dtype)], dim=1)
        if self.latent_self_cond is not None:
            slots = slots + self.latent_self_cond(latents)
        if self.interface_self_cond is not None:
            tokens = tokens + self.interface_self_cond(previous_tokens)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                tokens, slots = checkpoint(block, tokens, slots, cond, grid, use_reentrant=False)
            else:
                tokens, slots = block(tokens, slots, cond, grid)
        return tokens, slots
