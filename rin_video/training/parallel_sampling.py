"""Distributed sampling: each process draws a part of the batch, and the parts are gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.config import SampleConfig
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.diffusion.sampling import count_samples, resolve_config
from rin_video.ranks import several_processes


def sample_distributed(diffusion: GaussianDiffusion, config: SampleConfig, **options: Any) -> Tensor:
    """Draw samples in all processes; return them on the CPU, (B, C, *grid) in [0, 1], in each process.

    `options` are those of `diffusion.sample`, with a seed. The samples are those that a single process would draw. Must
    be called by all processes.
    """
    options, gather = rank_part(diffusion, config, options)
    return gather(diffusion.sample(config, **options))


def sampling_device() -> torch.device:
    """Return the best device: CUDA, else MPS of Apple, else the CPU; with several processes, that of this process."""
    if several_processes():
        from rin_video.training.distributed import join_process_group

        return join_process_group().device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def rank_part(
    diffusion: GaussianDiffusion, config: SampleConfig, options: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    """Return the arguments of `sample` for the part of this process, and a function that gathers the parts (B', ...).

    A process without samples of its own draws the first one, so that all processes join every gather.
    """
    if not several_processes():
        return options, lambda samples: samples
    from rin_video.training.distributed import (  # imports accelerate, which takes a second
        gather_rows,
        join_process_group,
        rows_of,
    )

    state, rank = join_process_group(), len(options.get("shape") or diffusion.shape or ())
    overrides = {name: value for name, value in options.items() if name == "num_samples"}
    given = (options.get(name) for name in ("batch_size", "context", "embedding", "label"))
    count = count_samples(resolve_config(diffusion, config, overrides), *given, rank=rank)
    rows = rows_of(count, state.process_index, state.num_processes)
    part = rows or range(1)
    # The number of axes of an argument that all samples share.
    axes = {"label": 0, "embedding": 2, "context": rank, "known": rank - 1}
    chosen = {
        name: value[part.start : part.stop]
        for name, single in axes.items()
        if (value := options.get(name)) is not None and np.ndim(value) > single and len(value) == count
    }
    more = {"batch_size": len(part), "first_index": options.get("first_index", 0) + part.start}
    return options | chosen | more, lambda samples: gather_rows(samples, rows)
