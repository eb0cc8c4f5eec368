"""Drawing samples: options are resolved, the batch is drawn in chunks, and known pixels are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rin_video.config import (
    ClippingName,
    DiffusionConfig,
    PrecisionName,
    SampleConfig,
    SamplerName,
    ScheduleName,
    check_names,
)
from rin_video.config_checks import split_parameters
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.guidance import Guidance
from rin_video.diffusion.masks import place_context
from rin_video.diffusion.noise import NoiseSource
from rin_video.diffusion.precision import running_in
from rin_video.diffusion.samplers import KARRAS, Denoise, Levels, Sampler, get_sampler, initial_state, make_levels
from rin_video.diffusion.schedules import Schedule, make_schedule
from rin_video.errors import UsageError
from rin_video.labels import Labels, check_labels
from rin_video.progress import progress_bar
from rin_video.tensors import from_diffusion_range, join_tensors, map_tensors, to_diffusion_range, to_unit_range


class Diffusion(Protocol):
    """What sampling asks of a `GaussianDiffusion`."""

    model: Any
    config: DiffusionConfig
    shape: tuple[int, ...] | None
    classes: list[str]
    sampler: SamplerName | None
    precision: PrecisionName
    training: bool

    def denoiser(self, conditions: Conditions, guidance: Guidance, clip_x0: ClippingName | None) -> Denoise: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def train(self, mode: bool = True) -> Any: ...


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    config: SampleConfig | None = None,
    /,
    *,
    batch_size: int | None = None,
    shape: tuple[int, ...] | None = None,
    label: Labels | None = None,
    embedding: Tensor | np.ndarray | None = None,
    context: Tensor | np.ndarray | None = None,
    known: Tensor | np.ndarray | None = None,
    seed: int | None = None,
    first_index: int = 0,
    max_batch: int | None = None,
    self_cond: Any = None,
    progress: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
    return_trajectory: bool = False,
    return_self_cond: bool = False,
    **overrides: Any,
) -> Any:
    """Draw `batch_size` samples (B, C, *grid) in [0, 1], at most `max_batch` of them at a time.

    `config` holds the options of sampling, and `overrides` are fields of it: steps, sampler, spacing, guidance, ...
    (see `SampleConfig`; `rin_video.diffusion.samplers` explains the samplers and spacings, `Guidance` the guidance).
    Without a `config`, `steps` is `timesteps` of the diffusion or 50, and `sampler` is `dpmpp_2m_sde`. By default
    `shape` (C, *grid) is that of the model, `batch_size` that of `embedding` or `context`, else `config.num_samples`;
    `spacing` is "karras" for DPM-Solver++ and Heun, and "uniform" for others and with a `schedule` or a
    `time_difference`; `precision` is that of training if the diffusion comes from a run or a `Trainer`, and float32 on
    a CPU.

    `label` is one class for all samples or one for each, by number or name; -1 is no class. Without one, a model with
    classes draws each class in turn. `embedding` is (L, D) or (B, L, D). `context` (C, *grid) or (B, C, *grid), in
    [0, 1] or uint8, is kept bit for bit where the mask `known`, booleans over the grid or (B, *grid), is true. A
    context of fewer frames needs no mask: the clip starts with it. Arrays are accepted in place of tensors.

    With a `seed`, sample i is the same whatever the batch, the chunks and the device: each sample has a generator of
    its own, on the CPU. The first sample has the number `first_index`, so that a batch can be drawn in parts.
    `callback(i, x0)` sees the estimate (B', C, *grid) in [0, 1] after every step of every chunk. With
    `return_trajectory` these are returned too, (B, steps, C, *grid) on the CPU; with `return_self_cond` the last
    self-conditioning state, for `self_cond` of another call. Raises `UsageError` for options that do not fit.
    """
    if config is None:
        config = SampleConfig(
            steps=diffusion.config.timesteps or SampleConfig.steps, sampler=diffusion.sampler or SampleConfig.sampler
        )
    if not isinstance(config, SampleConfig):
        raise UsageError(f"sample({config!r}) is no SampleConfig: give options by name, sample(batch_size=4)")
    check_names(overrides, SampleConfig, "sample", prefix="")
    config = dataclasses.replace(config, **overrides)
    embedding, context, known = (None if x is None else torch.as_tensor(x) for x in (embedding, context, known))
    shape = tuple(shape) if shape else diffusion.shape
    if shape is None:
        raise UsageError("the model does not say its shape: give sample(shape=(C, *grid))")
    if batch_size is None:
        ranks = ((context, len(shape)), (embedding, 2))
        batch_size = next((len(x) for x, rank in ranks if x is not None and x.ndim > rank), config.num_samples)
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: draw at least 1 sample")
    numbers = torch.arange(first_index, first_index + batch_size)
    device = next((p.device for p in diffusion.parameters()), torch.device("cpu"))
    levels, draw = plan_steps(diffusion.config, config)
    precision = sampling_precision(config.precision, diffusion.precision, device)
    label = choose_labels(diffusion, config.label if label is None else label, numbers)
    conditions, data = make_conditions(diffusion, batch_size, shape, label, embedding, context, known)
    guidance = Guidance.from_config(config)
    guidance.check(conditions)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    chunks = torch.arange(batch_size).split(max_batch or batch_size)
    steps = len(levels) * len(chunks)
    samples, trajectories, states = [], [], []
    with evaluating(diffusion), progress_bar(steps, "sampling", "step", disable=not progress) as bar:
        for chunk in chunks:
            noise = NoiseSource(seed, numbers[chunk].tolist(), shape, device)
            denoise = diffusion.denoiser(conditions.at(chunk, device), guidance, config.clip_x0)
            start = map_tensors(partial(_at, indices=chunk, device=device), self_cond)
            estimates = []
            with running_in(precision, device):
                for i, step in enumerate(draw(denoise, initial_state(levels, noise), levels, noise, start)):
                    bar.update()
                    if callback is not None:
                        callback(i, from_diffusion_range(step.x0 / diffusion.config.scale))
                    if return_trajectory:
                        estimates.append(from_diffusion_range(step.x0 / diffusion.config.scale).cpu())
            drawn = from_diffusion_range(step.x0 / diffusion.config.scale)
            if conditions.known is not None and data is not None:
                drawn = torch.where(conditions.known[chunk].to(device), data[chunk].to(drawn), drawn)
            samples.append(drawn)
            trajectories += [torch.stack(estimates, dim=1)] if return_trajectory else []
            states.append(step.self_cond)
    result: list[Any] = [torch.cat(samples)]
    result += [torch.cat(trajectories)] if return_trajectory else []
    result += [join_tensors(states)] if return_self_cond else []
    return tuple(result) if len(result) > 1 else result[0]


@contextmanager
def evaluating(diffusion: Diffusion) -> Iterator[None]:
    """Within the block, the model is in eval mode."""
    was_training = diffusion.training
    diffusion.train(False)
    try:
        yield
    finally:
        diffusion.train(was_training)


def plan_steps(diffusion: DiffusionConfig, config: SampleConfig) -> tuple[Levels, Sampler]:
    """The noise levels that sampling visits, and the sampler. Raises `UsageError` for options that do not fit."""
    name, parameters = split_parameters(config.sampler)
    karras = name in KARRAS and not config.schedule and not config.time_difference
    levels = make_levels(
        sampling_schedule(diffusion, config.schedule),
        config.steps,
        spacing=config.spacing or ("karras" if karras else "uniform"),
        time_difference=config.time_difference,
        scale=diffusion.scale,
    )
    return levels, get_sampler(name, parameters)


def choose_labels(diffusion: Diffusion, label: Labels | None, numbers: Tensor) -> Tensor | None:
    """The labels of the samples with these numbers (B,): those asked for, else each class of the model in turn."""
    classes = getattr(diffusion.model, "num_classes", 0)
    if label is None:
        return numbers % classes if classes else None
    return check_labels(label, len(numbers), classes, diffusion.classes)


def make_conditions(
    diffusion: Diffusion,
    batch: int,
    shape: tuple[int, ...],
    label: Tensor | None,
    embedding: Tensor | None,
    context: Tensor | None,
    known: Tensor | None,
) -> tuple[Conditions, Tensor | None]:
    """What a batch is drawn by; and the context in [0, 1], so that it comes back bit for bit."""
    if embedding is not None:
        embedding = embedding.expand(batch, *embedding.shape[-2:])
    if context is None:
        if known is not None:
            raise UsageError("known says which cells are given, but not what they hold: give context too")
        return Conditions(label, embedding), None
    if getattr(diffusion.model, "known_mask", True) is False:
        raise UsageError(
            "the model was trained without known cells and cannot take a context: train with "
            "model.known_mask=true diffusion.known.none=1 diffusion.known.first=1"
        )
    data, mask = place_context(context, known, shape, batch)
    data = to_unit_range(data)
    return Conditions(label, embedding, mask, diffusion.config.scale * to_diffusion_range(data)), data


def _at(part: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    return part[indices.to(part.device)].to(device)


def sampling_precision(asked: PrecisionName | None, trained: PrecisionName, device: torch.device) -> PrecisionName:
    """The requested precision; by default that of training, or float32 on a CPU, where others gain nothing."""
    return asked or ("no" if device.type == "cpu" else trained)


def sampling_schedule(config: DiffusionConfig, choice: ScheduleName | Mapping[str, Any] | None = None) -> Schedule:
    """The schedule to sample with: another one by name, or that of training with other parameters.

    Raises `UsageError` for one on another path, whose inputs the network never saw.
    """
    own_name, own = split_parameters(config.noise_schedule)
    name, parameters = split_parameters(choice)
    schedule = make_schedule(own_name, own | parameters) if name is None else make_schedule(name, parameters)
    if schedule(torch.tensor(0.5)).power != make_schedule(own_name, own)(torch.tensor(0.5)).power:
        raise UsageError(f"schedule {name} is on another path than {own_name}, which the model learnt")
    return schedule
