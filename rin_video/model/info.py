"""The cost of a model: parameters, tokens and floating-point operations, in closed form and without torch.

If the tokenizer comes from another distribution, the model is built on the meta device and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rin_video.config import ModelConfig
from rin_video.model.costs import (
    can_be_built,
    conditioner_cost,
    core_cost,
    data_grid,
    token_grid,
    tokenizer_cost,
)
from rin_video.wording import counted, in_flops


@dataclass(frozen=True)
class ModelInfo:
    """Counts for one model.

    `shape` is the shape of one sample, (C, *grid). `gflops` are the 10^9 floating-point operations of one forward pass
    of one sample, including self-conditioning on a previous pass. A multiply-add counts as 2. Dense layers,
    convolutions and attention products are counted; norms, softmax, activations, biases and residual sums are not.
    """

    shape: tuple[int, ...]
    tokens: int
    latents: int
    params: int
    gflops: float


def model_info(config: ModelConfig) -> ModelInfo:
    """Count for a model without allocating its weights. Raises `UsageError` for a configuration that is not valid."""
    grids = [grid for name in config.tokenizers if (grid := data_grid(config, name)) is not None]
    if len(grids) < len(config.tokenizers) or not can_be_built(config, grids):
        return count_built(config)  # raises the error of an invalid configuration
    grid, *others = grids
    tokens, built = token_grid(config, grid), token_grid(config, max(grids, key=len))
    cost = tokenizer_cost(config, grid) + conditioner_cost(config) + core_cost(config, tokens, built)
    return ModelInfo(
        shape=(config.channels, *grid),
        tokens=math.prod(tokens),
        latents=config.num_latents,
        params=cost.params + sum(tokenizer_cost(config, other).params for other in others),
        gflops=cost.flops / 1e9,
    )


def count_built(config: ModelConfig) -> ModelInfo:
    """Count for a model that is built on the meta device. Raises `UsageError` for a configuration that is not valid."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from rin_video.model.rin import RIN

    with torch.device("meta"):
        model = RIN(config)
        x = torch.empty(1, *model.shape)
        label = torch.zeros(1, dtype=torch.long) if config.num_classes else None
        with torch.no_grad():
            _, latents = model(x, torch.ones(1), label=label)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(x, torch.ones(1), latents=latents, label=label)
    return ModelInfo(
        shape=model.shape,
        tokens=math.prod(model.tokenizer.token_grid(model.shape[1:])),
        latents=config.num_latents,
        params=sum(p.numel() for p in model.parameters()),
        gflops=counter.get_total_flops() / 1e9,
    )


def describe(config: ModelConfig) -> str:
    """Return a summary of a model for people, in a few lines of text."""
    info = model_info(config)
    channels, *grid = info.shape
    compute = ", ".join(map(str, config.compute_layers))
    lines = {
        "sample": f"{counted(channels, 'channel')}, {'x'.join(map(str, grid))}"
        + (f", {counted(config.num_classes, 'class')}" if config.num_classes else ""),
        "interface": f"{counted(info.tokens, 'token')} of width {config.dim}, {config.position} positions",
        "latents": f"{info.latents} of width {config.latent_width}",
        "blocks": f"{config.depth}, with {compute} compute {'layer' if compute == '1' else 'layers'}",
        "parameters": f"{info.params:,}",
        "forward": f"{in_flops(info.gflops)} a sample",
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in lines.items())
