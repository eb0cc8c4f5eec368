"""Distributed training: the accelerator, collective operations, and conversion of full tensors to sharded ones."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rin_video.config import PrecisionName, TrainConfig
from rin_video.diffusion.precision import fastest_precision
from rin_video.errors import ReportedError, UsageError
from rin_video.ranks import num_started, several_processes

log = logging.getLogger("rin_video")

USE_FSDP = "ACCELERATE_USE_FSDP"
LAUNCHED_WITH_FSDP = os.environ.get(USE_FSDP, "false").lower() == "true"  # set by accelerate launch
# The other processes wait while the main process indexes the files, which may be many, encodes captions and writes.
TIMEOUT = timedelta(days=2)


def make_accelerator(options: TrainConfig, folder: Path, *, partial: bool = False) -> Accelerator:
    """Create the `Accelerator` of a run.

    `partial` allows steps that leave some parameters without a gradient, the same ones in all processes. The precision
    "auto" is replaced in `options`. Raises `UsageError` for fp16 without a CUDA GPU, and for FSDP version 1.
    """
    use_launcher_precision(options)
    if options.mixed_precision == "auto":
        options.mixed_precision = first_precision()
        log.info("train.mixed_precision=auto: %s is the faster one on this machine", options.mixed_precision)
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("train.mixed_precision=fp16 needs a CUDA GPU: use bf16 or no")
    plugin = None
    if options.sharding == "fsdp2" and several_processes():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    # accelerate refuses a second Trainer with another precision in this process. It has no public function to reset it.
    AcceleratorState._reset_state()
    if not LAUNCHED_WITH_FSDP:
        os.environ.pop(USE_FSDP, None)  # accelerate sets it for an earlier Trainer with sharding
    accelerator = Accelerator(
        cpu=no_accelerator(),
        mixed_precision="no" if options.mixed_precision == "tf32" else options.mixed_precision,
        log_with=list(options.trackers) or None,
        project_dir=folder,
        fsdp_plugin=plugin,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=TIMEOUT),
            DistributedDataParallelKwargs(find_unused_parameters=partial),
        ],
    )
    check_world_size(accelerator.num_processes)
    if (plugin or LAUNCHED_WITH_FSDP) and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate silently drops the plugin on CPUs, but gloo supports sharding.
        accelerator.state.fsdp_plugin = plugin = plugin or FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        atexit.register(leave_process_group)
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise UsageError("FSDP version 1 is not supported: use train.sharding=fsdp2, or --fsdp_version 2")
    return accelerator


def use_launcher_precision(options: TrainConfig) -> None:
    """Adopt the precision that `accelerate launch --mixed_precision` requests, unless `options` sets another one.

    Logs a warning if the two differ. Raises `UsageError` if the requested precision is not supported.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("no", options.mixed_precision):
        return
    if options.mixed_precision not in ("no", "auto"):
        log.warning(
            "train.mixed_precision=%s is used, although accelerate launch requests %s: remove one of the two",
            options.mixed_precision,
            asked,
        )
        return
    heeded = next((name for name in get_args(PrecisionName) if name == asked), None)
    if heeded is None:
        raise UsageError(f"accelerate launch requests --mixed_precision {asked}: use bf16 or fp16, or no")
    log.info("train.mixed_precision is set to %s, as accelerate launch requests", asked)
    options.mixed_precision = heeded


def first_precision() -> PrecisionName:
    """Return the faster precision, as the main process measures it."""
    device = torch.device("cpu") if no_accelerator() else torch.device(torch.accelerator.current_accelerator() or "cpu")
    if not several_processes():
        return fastest_precision(device)
    join_process_group()
    return in_all(lambda: fastest_precision(device))[0]


def no_accelerator() -> bool:
    """Return whether there are only CPUs. If accelerate does not know, processes of torchrun form no process group."""
    return not torch.accelerator.is_available()


def per_process_batch(batch_size: int, num_processes: int) -> int:
    """Return the batch size of each process. Raises `UsageError` if the batch cannot be divided evenly."""
    if batch_size % num_processes:
        near = max(batch_size // num_processes, 1) * num_processes
        raise UsageError(
            f"train.train_batch_size is {batch_size}, which {num_processes} processes cannot divide evenly: use {near} "
            f"or {near + num_processes}"
        )
    return batch_size // num_processes


def any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether the flag is set in any process. Must be called by all processes."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())


def from_main(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Return the values of the main process in all processes, which must all call this with as many values."""
    if accelerator.num_processes == 1:
        return list(values)
    return broadcast(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()


T = TypeVar("T")


def join_process_group() -> PartialState:
    """Join the process group if this process has not joined it yet; return its state."""
    state = PartialState(cpu=no_accelerator(), timeout=TIMEOUT)
    check_world_size(state.num_processes)
    return state


def leave_process_group() -> None:
    """Destroy the process group. Without this, a process that sharded with gloo is aborted at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_world_size(num_processes: int) -> None:
    """Raise `UsageError` if the group is smaller than the number of started processes: each would train alone."""
    expected = num_started()
    if num_processes != expected:
        raise UsageError(
            f"WORLD_SIZE is {expected}, but this process found {num_processes}: start all processes with one launcher "
            "(torchrun, accelerate launch, srun), or unset WORLD_SIZE"
        )


def in_all(work: Callable[[], T]) -> list[T]:
    """Call `work` in every process and return the results by rank; must be called by all processes.

    If it fails in one process, all of them raise: that process its own error, and the others `ReportedError`.
    """
    result: Any = None
    failed: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failed = error
    message = None if failed is None else str(failed) if isinstance(failed, UsageError) else repr(failed)
    outcomes = gather_object([(result, message)])
    if failed is not None:
        raise failed
    for _, other in outcomes:
        if other is not None:
            raise ReportedError(other)
    return [one for one, _ in outcomes]


def first_then_others(work: Callable[[], T]) -> T:
    """Run `work` in the main process, then in the others, which can read the files that the main process wrote."""
    if not several_processes():
        return work()
    first, results = join_process_group().is_main_process, []

    def once() -> None:
        results.append(work())

    in_all(once if first else lambda: None)
    in_all((lambda: None) if first else once)
    return results[0]


def rows_of(count: int, rank: int, num_ranks: int) -> range:
    """Return the consecutive rows of a batch of `count` samples that the process `rank` draws."""
    each = -(-count // num_ranks)
    return range(min(rank * each, count), min((rank + 1) * each, count))


def gather_rows(samples: Tensor, rows: range) -> Tensor:
    """Gather the samples (B, ...) of all processes on the CPU, by rank, without those beyond a process's `rows`."""
    return torch.cat(gather_object([samples[: len(rows)].cpu()]))


# ---- sharded tensors
#
# torch.distributed.checkpoint.state_dict does not fit: it gathers the full state at once, while write_tensors gathers
# one tensor at a time. Its set_model_state_dict silently accepts missing weights in a full state. Its functions for
# optimizers make a hidden step, which LAMB counts, and restore hyperparameters, which here come from the configuration.


def is_sharded(module: nn.Module) -> bool:
    """Return whether the parameters are sharded, whatever accelerate's flag says: preparing an optimizer clears it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextmanager
def no_sync(module: Any, accelerator: Accelerator) -> Iterator[None]:
    """Accumulate gradients within the block without synchronising them; a later backward pass synchronises the sum."""
    if not isinstance(module, FSDPModule):
        with accelerator.no_sync(module):
            yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as `like` is sharded. Must be called by all processes."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a full state dict into a module that may be sharded."""
    now = module.state_dict()
    module.load_state_dict({name: shard_like(value, now.get(name, value)) for name, value in state.items()})


def optimizer_state(optimizer: Any, module: nn.Module) -> dict[str, Any]:
    """Return the moments by parameter name, and the counters of the parameter groups (LAMB counts steps there).

    Hyperparameters are not included, because they come from the configuration.
    """
    known = {*optimizer.defaults, "params", "initial_lr"}
    return {
        "moments": {name: dict(optimizer.state[p]) for name, p in module.named_parameters() if optimizer.state.get(p)},
        "counters": {name: value for name, value in optimizer.param_groups[0].items() if name not in known},
    }


def load_optimizer_state(optimizer: Any, module: nn.Module, state: dict[str, Any]) -> None:
    """Load a full state that `optimizer_state` returned; moments are sharded as their parameters are.

    The hyperparameters of the optimizer do not change.
    """
    groups = [group | deepcopy(state.get("counters", {})) for group in optimizer.state_dict()["param_groups"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if "moments" in state:
        found = state["moments"]
    else:  # written by an earlier version: moments by the index of the parameter
        found = {names[id(parameters[index])]: values for index, values in state["state"].items()}
        groups = [{"step": one["step"]} | group if "step" in one else group
                  for one, group in zip(state["param_groups"], groups, strict=True)]  # fmt: skip
    moments = {
        index: {
            name: shard_like(value, parameter) if isinstance(value, Tensor) else value
            for name, value in found[names[id(parameter)]].items()
        }
        for index, parameter in enumerate(parameters)
        if names[id(parameter)] in found
    }
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def shard_module_like(module: nn.Module, like: nn.Module) -> None:
    """Shard the parameters of a copy as those of `like`. The copy then stores weights only; it cannot be called."""
    for name, parameter in like.named_parameters():
        if isinstance(parameter, DTensor):
            parent, _, leaf = name.rpartition(".")
            shard = parameter.detach().clone()
            setattr(module.get_submodule(parent), leaf, nn.Parameter(shard, requires_grad=False))
