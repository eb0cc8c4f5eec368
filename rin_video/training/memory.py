"""The memory that training needs, advice when memory runs out, and the largest batch that fits."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no public names for these two
from torch.utils._python_dispatch import TorchDispatchMode

from rin_video.config import Config
from rin_video.diffusion.precision import running_in
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import UsageError
from rin_video.model.rin import RIN
from rin_video.wording import in_bytes

# Memory of a process on the CPU in addition to its tensors, measured by benchmarks/memory.py.
MALLOC = 1.12  # factor on the memory of a step, because the allocator does not return free blocks between others
LIBRARIES = 32_000_000  # bytes of workspace that the matrix libraries keep

USABLE = 0.9  # fraction of the free memory to use; the rest is for fragmentation and other programs


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def checkpoint_blocks(model: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing of each block on or off. Raises `UsageError` if the model has no blocks."""
    core: Any = getattr(model, "core", None)
    if hasattr(core, "gradient_checkpointing"):
        core.gradient_checkpointing = on
    elif on:
        raise UsageError("train.gradient_checkpointing requires a RIN, which this model is not: set it to false")


def with_batch(config: Config, batch_size: int, **options: Any) -> Config:
    """Return the configuration with another batch size and, optionally, other options of `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, train_batch_size=batch_size, **options))


def largest_batch(config: Config, device: torch.device, *, num_processes: int = 1, limit: int | None = None) -> int:
    """Return the largest global batch size that fits in memory, at most `limit`.

    The size is predicted. On a CUDA GPU it is also tested with a forward and backward pass, and reduced by a tenth
    until it fits. Raises `UsageError` if not even one sample per process fits.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    free = int(USABLE * free_memory(device))

    def needed(each: int) -> int:
        return training_memory(with_batch(config, each * num_processes), device=kind, num_processes=num_processes)

    one, two, four = needed(1), needed(2), needed(4)
    if one > free:
        raise UsageError(
            f"training needs {in_bytes(one)} with a batch of 1, but {in_bytes(free)} are available: use a smaller "
            "model (model.dim, model.num_latents), larger patches, or train.gradient_checkpointing=true"
        )
    per_sample = max((four - two) / 2, 1.0)
    each = max(int(1 + (free - max(one, two - per_sample)) / per_sample), 1)
    if limit is not None:
        each = max(min(each, limit // num_processes), 1)
    while each > 1 and (too_much := needed(each) - free) > 0:  # memory may grow faster with the batch
        per_sample = max(needed(each) - needed(each - 1), 1)
        each = max(each - math.ceil(too_much / per_sample), 1)
    if device.type == "cuda":
        each = _largest_that_runs(config, device, each, num_processes)
    return each * num_processes


def _largest_that_runs(config: Config, device: torch.device, start: int, num_processes: int) -> int:
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=start)
    def attempt(batch_size: int) -> int:
        model = RIN(config.model).to(device)
        checkpoint_blocks(model, config.train.gradient_checkpointing)
        copies = 3 + len(config.train.ema_sigma_rel)  # moments and EMAs
        ballast = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
        x = torch.rand(batch_size, *model.shape, device=device)
        label = torch.zeros(batch_size, dtype=torch.long, device=device) if config.model.num_classes else None
        with running_in(config.train.mixed_precision, device):
            loss = GaussianDiffusion(model, config.diffusion)(x, label)
        loss.backward()
        del ballast
        return batch_size

    return attempt()


@contextmanager
def out_of_memory(config: Config, device: torch.device, num_processes: int = 1) -> Iterator[None]:
    """Convert an out-of-memory error within the block to a `UsageError` that lists remedies and their memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(advice(config, device, num_processes)) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that an allocation failed, by its text if it is not an error of CUDA."""
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def advice(config: Config, device: torch.device, num_processes: int = 1) -> str:
    """Return an out-of-memory message with the remedies and the memory that each of them needs."""
    kind, batch = "cuda" if device.type == "cuda" else "cpu", config.train.train_batch_size
    half = max(batch // 2 // num_processes, 1) * num_processes

    def gigabytes(batch_size: int, **options: Any) -> str:
        needs = training_memory(with_batch(config, batch_size, **options), device=kind, num_processes=num_processes)
        return in_bytes(needs)

    ways = []
    if half < batch:
        accumulate = config.train.gradient_accumulate_every * batch // half
        ways.append(
            f"train.train_batch_size={half} with train.gradient_accumulate_every={accumulate} (the same step) needs "
            f"{gigabytes(half)}"
        )
    if not config.train.gradient_checkpointing:
        ways.append(f"train.gradient_checkpointing=true needs {gigabytes(batch, gradient_checkpointing=True)}")
    if config.train.mixed_precision in ("no", "tf32"):
        ways.append(f"train.mixed_precision=bf16 needs {gigabytes(batch, mixed_precision='bf16')}")
    ways.append("`rin-video train --batch-size auto` uses the largest batch that fits")
    return (
        f"out of memory on {device}: a batch of {batch} needs about {gigabytes(batch)}, "
        f"{in_bytes(free_memory(device))} are free. {'; '.join(ways)}"
    )


def training_memory(config: Config, *, device: str = "cpu", num_processes: int = 1) -> int:
    """Estimate the bytes that training needs on each device: weights, moments, EMAs and the peak of a step.

    A step runs on fake tensors, which have shapes but no data. This counts all tensors that are alive at the same time,
    including temporary results and gradients. Sharding is not considered: FSDP2 needs less.
    """
    options, kind = config.train, torch.device(device).type
    bf16 = options.mixed_precision in ("bf16", "fp16")
    with torch.device("meta"):
        model = RIN(config.model)
    diffusion = GaussianDiffusion(model, config.diffusion)
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory, torch.device(device):
        model.to_empty(device=device)
        weights = memory.now
        if options.gradient_checkpointing:
            model.core.gradient_checkpointing = True
        x = torch.empty(max(options.train_batch_size // num_processes, 1), *model.shape)
        label = torch.zeros(len(x), dtype=torch.long) if config.model.num_classes else None
        conditions: dict[str, Any] = {}
        if config.diffusion.known:
            conditions["known"] = torch.zeros(len(x), 1, *model.shape[1:], dtype=torch.bool)
        if config.model.embedding_dim:
            conditions["embedding"] = torch.empty(len(x), config.model.embedding_tokens, config.model.embedding_dim)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            # Not `forward`, which reads the values of the labels.
            loss = diffusion.loss_at(x, torch.zeros(len(x)), label, **conditions).loss.mean()
        loss.backward()
    moments = 1 if options.optimizer == "muon" else 2
    emas = 1 + len(options.ema_sigma_rel)
    buckets = int(num_processes > 1)  # the gradient buckets of DDP
    step = max(memory.peak, 3 * weights)  # weights, gradients and a temporary copy of the optimizer
    if kind == "cpu":
        step = max(weights + int(MALLOC * (memory.peak - weights)), 3 * weights) + LIBRARIES
    return (moments + emas + buckets) * weights + step


class PeakMemory(TorchDispatchMode):
    """Count the bytes of all storages that are alive (`now`) and their maximum (`peak`) while operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor):
                self.count(part)
        return result

    def count(self, tensor: Tensor) -> None:
        """Add the storage of a tensor, unless it is already counted."""
        storage = tensor.untyped_storage()  # one object as long as the memory is allocated
        name = id(storage)
        if name not in self.alive:
            self.alive.add(name)
            weakref.finalize(storage, self.free, name, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def free(self, name: int, size: int) -> None:
        """Subtract a storage of `size` bytes that was freed."""
        self.alive.discard(name)
        self.now -= size
