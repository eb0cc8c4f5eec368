"""Several processes: the accelerator, random numbers that do not depend on their number, sharded tensors made whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from rin_video.config import PrecisionName, TrainConfig
from rin_video.errors import UsageError
from rin_video.noise import PART, spread_seed
from rin_video.tensors import map_tensors
from rin_video.tracking import check_trackers

log = logging.getLogger("rin_video")

# The others wait while the first process samples and writes.
TIMEOUT = timedelta(hours=2)


def make_accelerator(options: TrainConfig, folder: Path, *, partial: bool = False) -> Accelerator:
    """An `Accelerator`; fp16 without a GPU, or FSDP of the first version, is a `UsageError`.

    With `partial`, a step may leave some parameters without a gradient, the same in all processes.
    """
    heed_launcher(options)
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("train.mixed_precision=fp16 needs a CUDA GPU: use bf16, or no")
    check_trackers(options.trackers)
    plugin = None
    if options.sharding == "fsdp2" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    AcceleratorState._reset_state()  # accelerate keeps the precision of the first Trainer of a process otherwise
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
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UsageError(
            f"WORLD_SIZE is {expected}, but this process found {accelerator.num_processes} of them: start all with one "
            "launcher (torchrun, accelerate launch, srun), or unset WORLD_SIZE"
        )
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


def share(batch_size: int, num_processes: int) -> int:
    """How many samples of a batch each process takes. `UsageError` where they cannot be shared out evenly."""
    if batch_size % num_processes:
        near = max(batch_size // num_processes, 1) * num_processes
        raise UsageError(
            f"train.train_batch_size is {batch_size}, to be shared out among {num_processes} processes: use {near}, "
            f"or {near + num_processes}"
        )
    return batch_size // num_processes


class SharedDraws(TorchFunctionMode):
    """Random numbers of a batch that are the same whatever the number of processes.

    Every process draws those of the whole batch, from one seed, and keeps the rows of its own samples; draws of other
    shapes are the same everywhere. Dropout draws elsewhere, from the process's own generator.
    """

    def __init__(self, seed: int, batch_size: int, rank: int, num_ranks: int) -> None:
        super().__init__()
        self.seed, self.batch_size, self.rank, self.num_ranks = seed, batch_size, rank, num_ranks
        self.generators: dict[torch.device, torch.Generator] = {}

    def __enter__(self) -> Any:
        self.part = PART.set((self.rank, self.num_ranks))
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        PART.reset(self.part)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if function not in DRAWS or options.get("generator") is not None:
            return function(*args, **options)
        draw, like = DRAWS[function]
        if like:
            shape, given = args[0].shape, {"dtype": args[0].dtype, "device": args[0].device}
            options = given | {name: value for name, value in options.items() if name != "memory_format"}
        else:
            shape = options.pop("size", args[0] if args and not isinstance(args[0], int) else args)
        device = torch.empty(0, device=options.get("device")).device
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        options["generator"] = self.generators[device]
        if len(shape) == 0 or shape[0] != self.batch_size:
            return draw(tuple(shape), **options)
        whole = draw((self.batch_size * self.num_ranks, *shape[1:]), **options)
        return whole[self.rank * self.batch_size :][: self.batch_size].contiguous()


DRAWS: dict[Callable[..., Any], tuple[Callable[..., Tensor], bool]] = {
    torch.rand: (torch.rand, False),
    torch.randn: (torch.randn, False),
    torch.rand_like: (torch.rand, True),
    torch.randn_like: (torch.randn, True),
}


def shared_draws(
    seed: int, step: int, batch_size: int, accelerator: Accelerator
) -> AbstractContextManager[TorchFunctionMode | None]:
    """Within the block, a step's noise and times are those that one process would draw. `batch_size` is per process."""
    if accelerator.num_processes == 1:
        return nullcontext()
    return SharedDraws(
        spread_seed(seed, step, 0), batch_size, accelerator.process_index, num_ranks=accelerator.num_processes
    )


def agree(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())


# ---- sharded tensors


def whole(state: Any) -> Any:
    """A nested state with every sharded tensor put together. To be called by all processes."""
    return map_tensors(lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, state)


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is. To be called by all processes."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` with whole tensors, into a module that may be sharded."""
    now = module.state_dict()
    module.load_state_dict({name: shard_like(value, now.get(name, value)) for name, value in state.items()})


def load_whole_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """The same for an optimizer: a moment is sharded as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: shard_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def shard_module_like(module: nn.Module, like: nn.Module) -> None:
    """Make the parameters of a copy sharded as those of `like` are. The copy holds numbers then; it does not run."""
    for name, parameter in like.named_parameters():
        if isinstance(parameter, DTensor):
            parent, _, leaf = name.rpartition(".")
            shard = parameter.detach().clone()
            setattr(module.get_submodule(parent), leaf, nn.Parameter(shard, requires_grad=False))
