"""What a model costs: parameters, tokens, floating-point operations, memory. Nothing is computed: shapes only."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from rin_video.config import Config, ModelConfig
from rin_video.diffusion import GaussianDiffusion
from rin_video.rin import RIN

# What a process on the CPU holds beyond its tensors, as benchmarks/memory.py measures it.
MALLOC = 1.12  # blocks that are free between others are not given back: a share of what lives in a step
LIBRARIES = 32_000_000  # bytes that the matrix libraries keep to work in


@dataclass(frozen=True)
class ModelInfo:
    """`gflops` counts a multiply-add as 2: dense layers, convolutions and attention products of one forward pass of one
    sample that has a previous one. Norms, softmax, activations, biases and residual sums are not counted."""

    shape: tuple[int, ...]
    tokens: int
    latents: int
    params: int
    gflops: float


def model_info(config: ModelConfig) -> ModelInfo:
    """Counts for a model, without allocating its weights. Raises `UsageError` for a model that cannot be."""
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


def training_memory(config: Config, *, device: str = "cpu", num_processes: int = 1) -> int:
    """Bytes that training needs on each device, about: weights, moments, averages, and the peak of a step.

    The step is gone through with tensors that have shapes and no contents, so that what lives at the same time is
    counted, temporary results and gradients included. Sharding is not: with FSDP2 it is less.
    """
    options, kind = config.train, torch.device(device).type
    bf16 = options.mixed_precision in ("bf16", "fp16")
    with torch.device("meta"):
        model = RIN(config.model)
    diffusion = GaussianDiffusion.from_config(model, config.diffusion)
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory, torch.device(device):
        model.to_empty(device=device)
        weights = memory.now
        if options.gradient_checkpointing:
            model.core.gradient_checkpointing = True
        x = torch.empty(max(options.train_batch_size // num_processes, 1), *model.shape)
        label = torch.zeros(len(x), dtype=torch.long) if config.model.num_classes else None
        given: dict[str, Any] = {}
        if config.diffusion.known:
            given["known"] = torch.zeros(len(x), 1, *model.shape[1:], dtype=torch.bool)
        if config.model.embedding_dim:
            given["embedding"] = torch.empty(len(x), config.model.embedding_tokens, config.model.embedding_dim)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            # Past `forward`, which looks at the numbers of the labels.
            loss = diffusion.loss_at(x, torch.zeros(len(x)), label, **given).loss.mean()
        loss.backward()
    moments = 1 if options.optimizer == "muon" else 2
    averages = 1 + len(options.ema_sigma_rel)
    buckets = int(num_processes > 1)  # what DDP sends
    step = max(memory.peak, 3 * weights)  # the optimizer works in one more
    if kind == "cpu":
        step = max(weights + int(MALLOC * (memory.peak - weights)), 3 * weights) + LIBRARIES
    return (moments + averages + buckets) * weights + step


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak, while operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return tree_map_only(Tensor, self.count, function(*args, **(kwargs or {})))

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return tensor

    def free(self, name: int, size: int) -> None:
        self.alive.discard(name)
        self.now -= size


def describe(config: ModelConfig) -> str:
    """A model in a few lines for people."""
    info = model_info(config)
    channels, *grid = info.shape
    lines = {
        "sample": f"{channels} channels, {'x'.join(map(str, grid))}"
        + (f", {config.num_classes} classes" if config.num_classes else ""),
        "interface": f"{info.tokens} tokens of width {config.dim}, {config.position} positions",
        "latents": f"{info.latents} of width {config.dim_latent or config.dim}",
        "blocks": f"{config.depth}, with {', '.join(map(str, config.compute_layers))} compute layers",
        "parameters": f"{info.params:,}",
        "forward": f"{info.gflops:.2f} GFLOPs a sample",
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in lines.items())
