"""Several processes: the accelerator, what they decide and do together, sharded tensors read from full ones."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rin_video.config import PrecisionName, TrainConfig
from rin_video.errors import ReportedError, UsageError
from rin_video.ranks import num_started, several_processes

log = logging.getLogger("rin_video")

USE_FSDP = "ACCELERATE_USE_FSDP"
LAUNCHED_WITH_FSDP = os.environ.get(USE_FSDP, "false").lower() == "true"  # by accelerate launch
# The others wait while the first process looks into the files, which may be very many, encodes captions and writes.
TIMEOUT = timedelta(days=2)


def make_accelerator(options: TrainConfig, folder: Path, *, partial: bool = False) -> Accelerator:
    """An `Accelerator`; fp16 without a GPU, or FSDP of the first version, is a `UsageError`.

    With `partial`, a step may leave some parameters without a gradient, the same in all processes.
    """
    heed_launcher(options)
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("train.mixed_precision=fp16 needs a CUDA GPU: use bf16, or no")
    plugin = None
    if options.sharding == "fsdp2" and several_processes():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    # Otherwise accelerate refuses a second Trainer of another precision in this process. It has no public way for it.
    AcceleratorState._reset_state()
    if not LAUNCHED_WITH_FSDP:
        os.environ.pop(USE_FSDP, None)  # left by accelerate for an earlier Trainer that shards
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
    check_met(accelerator.num_processes)
    if (plugin or LAUNCHED_WITH_FSDP) and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on GPUs and their like alone, and drops the plug-in on CPUs in silence. gloo can do it too.
        accelerator.state.fsdp_plugin = plugin = plugin or FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        atexit.register(leave)
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise UsageError("FSDP of the first version is not supported: use train.sharding=fsdp2, or --fsdp_version 2")
    return accelerator


def heed_launcher(options: TrainConfig) -> None:
    """Take the precision that `accelerate launch --mixed_precision` asks for, or say that another one is used.

    Raises `UsageError` for one that is not supported.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("no", options.mixed_precision):
        return
    if options.mixed_precision != "no":
        log.warning(
            "train.mixed_precision=%s is used, not %s as accelerate launch asks for: leave one out",
            options.mixed_precision,
            asked,
        )
        return
    heeded = next((name for name in get_args(PrecisionName) if name == asked), None)
    if heeded is None:
        raise UsageError(f"accelerate launch asks for --mixed_precision {asked}: use bf16 or fp16, or no")
    log.info("mixed precision %s, as accelerate launch asks for (train.mixed_precision)", asked)
    options.mixed_precision = heeded


def no_accelerator() -> bool:
    """Whether there are CPUs only. accelerate has to be told, or processes that torchrun starts there never meet."""
    return not torch.accelerator.is_available()


def per_process_batch(batch_size: int, num_processes: int) -> int:
    """How many samples of a batch each process takes. `UsageError` where they cannot be shared out evenly."""
    if batch_size % num_processes:
        near = max(batch_size // num_processes, 1) * num_processes
        raise UsageError(
            f"train.train_batch_size is {batch_size}, to be shared out among {num_processes} processes: use {near}, "
            f"or {near + num_processes}"
        )
    return batch_size // num_processes


def any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())


T = TypeVar("T")


def meet() -> PartialState:
    """Join the process group, if that has not happened yet."""
    state = PartialState(cpu=no_accelerator(), timeout=TIMEOUT)
    check_met(state.num_processes)
    return state


def leave() -> None:
    """Destroy the process group. After sharding with gloo, a process that exits without doing so is aborted."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_met(num_processes: int) -> None:
    """Raises `UsageError` where this process found fewer others than were started: each would train for itself."""
    expected = num_started()
    if num_processes != expected:
        raise UsageError(
            f"WORLD_SIZE is {expected}, but this process found {num_processes} of them: start all with one launcher "
            "(torchrun, accelerate launch, srun), or unset WORLD_SIZE"
        )


def in_all(work: Callable[[], T]) -> list[T]:
    """The results of `work` in all processes, by rank. Must be called by every process; a failure in one ends all.

    Raises its error in the process where it failed, and `ReportedError` in the others.
    """
    result: Any = None
    failed: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failed = error
    said = None if failed is None else str(failed) if isinstance(failed, UsageError) else repr(failed)
    outcomes = gather_object([(result, said)])
    if failed is not None:
        raise failed
    for _, message in outcomes:
        if message is not None:
            raise ReportedError(message)
    return [one for one, _ in outcomes]


def first_then_others(work: Callable[[], T]) -> T:
    """Run `work` in the first process, then in the others, which can read what the first one wrote to disk."""
    if not several_processes():
        return work()
    first, results = meet().is_main_process, []

    def once() -> None:
        results.append(work())

    in_all(once if first else lambda: None)
    in_all((lambda: None) if first else once)
    return results[0]


def rows_of(count: int, rank: int, num_ranks: int) -> range:
    """The rows of a batch of `count` samples that a process draws: consecutive ones, in the order of ranks."""
    each = -(-count // num_ranks)
    return range(min(rank * each, count), min((rank + 1) * each, count))


def gather_rows(samples: Tensor, rows: range) -> Tensor:
    """The samples (B, ...) of all processes on the CPU, in order; those beyond a process's `rows` are left out."""
    return torch.cat(gather_object([samples[: len(rows)].cpu()]))


# ---- sharded tensors
#
# torch.distributed.checkpoint.state_dict would gather a full state at once, where write_tensors gathers one tensor at a
# time. With full states its set_model_state_dict accepts missing weights in silence, and its functions for optimizers
# take a hidden step, which LAMB counts, and restore the hyperparameters too, which are those of the configuration here.


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters are sharded. (accelerate's own flag is lost when it prepares an optimizer.)"""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextmanager
def no_sync(module: Any, accelerator: Accelerator) -> Iterator[None]:
    """Within the block gradients stay in this process: they are added up, and sent with those of the last batch."""
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
    """A whole tensor, sharded as `like` is. To be called by all processes."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` with whole tensors, into a module that may be sharded."""
    now = module.state_dict()
    module.load_state_dict({name: shard_like(value, now.get(name, value)) for name, value in state.items()})


def optimizer_state(optimizer: Any, module: nn.Module) -> dict[str, Any]:
    """Moments by parameter name, and the counters of groups (LAMB counts steps there).

    Hyperparameters are not included: they come from the configuration.
    """
    known = {*optimizer.defaults, "params", "initial_lr"}
    return {
        "moments": {name: dict(optimizer.state[p]) for name, p in module.named_parameters() if optimizer.state.get(p)},
        "counters": {name: value for name, value in optimizer.param_groups[0].items() if name not in known},
    }


def load_optimizer_state(optimizer: Any, module: nn.Module, state: dict[str, Any]) -> None:
    """Take up what `optimizer_state` gave, of full tensors; a moment is sharded as its parameter is.

    Hyperparameters stay those that the optimizer was made with.
    """
    groups = [group | deepcopy(state.get("counters", {})) for group in optimizer.state_dict()["param_groups"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if "moments" in state:
        found = state["moments"]
    else:  # of an earlier version: by the places of the parameters
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
    """Make the parameters of a copy sharded as those of `like` are. The copy holds numbers then; it does not run."""
    for name, parameter in like.named_parameters():
        if isinstance(parameter, DTensor):
            parent, _, leaf = name.rpartition(".")
            shard = parameter.detach().clone()
            setattr(module.get_submodule(parent), leaf, nn.Parameter(shard, requires_grad=False))
