"""Sampling: resolves the options, draws the batch in chunks, and keeps the known pixels."""

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
    PrecisionOption,
    SampleConfig,
    SamplerName,
    ScheduleName,
    check_names,
)
from rin_video.config_checks import complete_choices, split_parameters
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.guidance import Guidance
from rin_video.diffusion.masks import place_context
from rin_video.diffusion.noise import NoiseSource
from rin_video.diffusion.precision import fastest_precision, running_in
from rin_video.diffusion.samplers import KARRAS, Denoise, Levels, Sampler, get_sampler, initial_state, make_levels
from rin_video.diffusion.schedules import Schedule, make_schedule
from rin_video.errors import UsageError
from rin_video.labels import Labels, check_labels, class_index
from rin_video.progress import progress_bar
from rin_video.tensors import from_diffusion_range, join_tensors, map_tensors, to_diffusion_range, to_unit_range


class Diffusion(Protocol):
    """The part of `GaussianDiffusion` that sampling uses."""

    model: Any
    config: DiffusionConfig
    shape: tuple[int, ...] | None
    classes: list[str]
    sampler: SamplerName | None
    precision: PrecisionOption
    training: bool

    def denoiser(self, conditions: Conditions, guidance: Guidance, clip_x0: ClippingName | None) -> Denoise:
        """Return the model as samplers see it."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights of the model."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode or, if `mode` is False, eval mode."""


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
    """Draw `batch_size` samples (B, C, *grid) in [0, 1], at most `max_batch` at a time.

    `config` holds the sampling options, and `overrides` are fields of it: steps, sampler, spacing, guidance, ... (see
    `SampleConfig`; `rin_video.diffusion.samplers` describes samplers and spacings, and `Guidance` the guidance). Raises
    `UsageError` for options that do not fit. The defaults are:

    - `steps`, `sampler`: without a `config`, `timesteps` of the diffusion or 50, and "dpmpp_2m_sde".
    - `shape` (C, *grid): that of the model.
    - `batch_size`: that of `context`, `embedding` or `label`, or else `config.num_samples`.
    - `spacing`: "karras" for DPM-Solver++ and Heun, "uniform" for other samplers and with a `schedule` or a
      `time_difference`.
    - `precision`: that of training if the diffusion comes from a run or a `Trainer`; on a CPU, float32 if bf16 is not
      faster.

    `label` is one class for all samples or one per sample, by number or name; -1 means no class. Without labels, a
    model with classes draws each class in turn. `embedding` is (L, D) or (B, L, D). `context` (C, *grid) or (B, C,
    *grid), in [0, 1] or uint8, is kept bit for bit where the observed mask `known`, booleans (*grid) or (B, *grid), is
    true. A context with fewer frames needs no mask: it is the beginning of the clip. Arrays are accepted in place of
    tensors.

    With a `seed`, sample i does not depend on the batch, the chunks or the device, because each sample has its own CPU
    generator. `first_index` is the number of the first sample, so that a batch can be drawn in parts. `progress` shows
    a progress bar. `callback(i, x0)` receives the estimate (B', C, *grid) in [0, 1] after step i of each chunk. With
    `return_trajectory`, these estimates are returned too, (B, steps, C, *grid) on the CPU. With `return_self_cond`, the
    last self-conditioning state is returned too; another call takes it as `self_cond`.
    """
    config = resolve_config(diffusion, config, overrides)
    embedding, context, known = (None if x is None else torch.as_tensor(x) for x in (embedding, context, known))
    shape = tuple(shape) if shape else diffusion.shape
    if shape is None:
        raise UsageError("the model has no shape: pass it as in sample(shape=(C, *grid))")
    batch_size = count_samples(config, batch_size, context, embedding, label, rank=len(shape))
    for name, value, least in (("seed", seed, 0), ("max_batch", max_batch, 1), ("first_index", first_index, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}: it must be at least {least}")
    numbers = torch.arange(first_index, first_index + batch_size)
    device = next((p.device for p in diffusion.parameters()), torch.device("cpu"))
    levels, draw = plan_steps(diffusion.config, config)
    precision = sampling_precision(config.precision, diffusion.precision, device)
    if label is None and config.label is not None:
        label = class_index(config.label, diffusion.classes, getattr(diffusion.model, "num_classes", 0))
    label = choose_labels(diffusion, label, numbers)
    conditions, data = make_conditions(diffusion, batch_size, shape, label, embedding, context, known)
    guidance = Guidance.from_config(config)
    guidance.check(conditions)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    chunks = torch.split(torch.arange(batch_size), max_batch or batch_size)
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


def resolve_config(diffusion: Diffusion, config: SampleConfig | None, overrides: Mapping[str, Any]) -> SampleConfig:
    """Return the options of a call of `sample`. Raises `UsageError` for unknown options and invalid values."""
    if config is None:
        config = SampleConfig(
            steps=diffusion.config.timesteps or SampleConfig.steps, sampler=diffusion.sampler or SampleConfig.sampler
        )
    if not isinstance(config, SampleConfig) or "config" in overrides:
        given = overrides.get("config", config)
        raise UsageError(f"sample({given!r}): pass a SampleConfig first, or options by name as in sample(batch_size=4)")
    check_names(overrides, SampleConfig, "sample", prefix="")
    return dataclasses.replace(config, **complete_choices(config, overrides))


def count_samples(
    config: SampleConfig,
    batch_size: int | None,
    context: Tensor | np.ndarray | None = None,
    embedding: Tensor | np.ndarray | None = None,
    label: Labels | None = None,
    *,
    rank: int,
) -> int:
    """Return the number of samples: `batch_size`, or the length of a batched argument, or `config.num_samples`.

    `rank` is the number of axes of one sample. Raises `UsageError` for a number below 1.
    """
    if batch_size is None:
        ranks = ((context, rank), (embedding, 2), (None if isinstance(label, str) else label, 0))
        batched = (len(x) for x, single in ranks if x is not None and np.ndim(x) > single)  # type: ignore[arg-type]
        batch_size = next(batched, config.num_samples)
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: it must be at least 1")
    return batch_size


@contextmanager
def evaluating(diffusion: Diffusion) -> Iterator[None]:
    """Set the model to eval mode within the block."""
    was_training = diffusion.training
    diffusion.train(False)
    try:
        yield
    finally:
        diffusion.train(was_training)


def plan_steps(diffusion: DiffusionConfig, config: SampleConfig) -> tuple[Levels, Sampler]:
    """Return the noise levels of the steps, and the sampler. Raises `UsageError` for options that do not fit."""
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
    """Return the labels (B,) of the samples `numbers` (B,): `label`, or by default each class of the model in turn."""
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
    """Return the conditions of a batch, and the context in [0, 1], from which samples copy the known pixels."""
    if embedding is not None:
        embedding = embedding.expand(batch, *embedding.shape[-2:])
    if context is None:
        if known is not None:
            raise UsageError("known is a mask without values: pass context too")
        return Conditions(label, embedding), None
    if getattr(diffusion.model, "known_mask", True) is False:
        raise UsageError(
            "the model was trained without an observed mask and takes no context: train with "
            "model.known_mask=true diffusion.known.none=1 diffusion.known.first=1"
        )
    data, mask = place_context(context, known, shape, batch)
    data = to_unit_range(data)
    return Conditions(label, embedding, mask, diffusion.config.scale * to_diffusion_range(data)), data


def _at(part: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    return part[indices.to(part.device)].to(device)


def sampling_precision(
    requested: PrecisionName | None, trained: PrecisionOption, device: torch.device
) -> PrecisionName:
    """Return the requested precision; by default that of training, or float32 on a CPU for which bf16 is not faster."""
    if requested is not None:
        return requested
    if trained == "auto" or (trained == "bf16" and device.type == "cpu"):
        return fastest_precision(device)
    return "no" if device.type == "cpu" else trained


def sampling_schedule(config: DiffusionConfig, choice: ScheduleName | Mapping[str, Any] | None = None) -> Schedule:
    """Return the schedule for sampling: another one by name, or that of training with other parameters.

    Raises `UsageError` for a schedule on another path, on which the network was not trained.
    """
    own_name, own = split_parameters(config.noise_schedule)
    name, parameters = split_parameters(choice)
    schedule = make_schedule(own_name, own | parameters) if name is None else make_schedule(name, parameters)
    if schedule(torch.tensor(0.5)).power != make_schedule(own_name, own)(torch.tensor(0.5)).power:
        raise UsageError(
            f"schedule {name} is on another path than {own_name}, the schedule of training: choose one on the same path"
        )
    return schedule
