"""Drawing samples: the options resolved, the batch in chunks, what is given in its place. Methods of the diffusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rin_video.config import (
    ClippingName,
    DiffusionConfig,
    PrecisionName,
    SampleConfig,
    SamplerName,
    ScheduleName,
    SpacingName,
)
from rin_video.config_files import PARAMETERS
from rin_video.diffusion.conditions import Conditions, check_guidance
from rin_video.diffusion.masks import place_context
from rin_video.diffusion.noise import NoiseSource
from rin_video.diffusion.objectives import CLIPS
from rin_video.diffusion.precision import running_in
from rin_video.diffusion.samplers import KARRAS, Denoise, get_sampler, initial_state, make_levels
from rin_video.diffusion.schedules import Schedule, make_schedule
from rin_video.errors import UsageError
from rin_video.labels import Labels, check_labels
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

    def denoiser(self, conditions: Conditions, guidance: float, **options: Any) -> Denoise: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def train(self, mode: bool = True) -> Any: ...


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    batch_size: int | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    steps: int | None = None,
    sampler: SamplerName | None = None,
    sampler_kwargs: Mapping[str, float] | None = None,
    spacing: SpacingName | None = None,
    time_difference: float = 0.0,
    schedule: ScheduleName | None = None,
    schedule_kwargs: Mapping[str, float] | None = None,
    label: Labels | None = None,
    embedding: Tensor | np.ndarray | None = None,
    context: Tensor | np.ndarray | None = None,
    known: Tensor | np.ndarray | None = None,
    guidance: float = 0.0,
    guidance_drop: str = "label",
    guidance_interval: Sequence[float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    batched_guidance: bool = True,
    clip_x0: ClippingName | None = None,
    precision: PrecisionName | None = None,
    seed: int | None = None,
    first_index: int = 0,
    max_batch: int | None = None,
    self_cond: Any = None,
    progress: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
    return_trajectory: bool = False,
    return_self_cond: bool = False,
) -> Any:
    """Draw `batch_size` samples (B, C, *grid) in [0, 1], at most `max_batch` of them at a time.

    By default `shape` (C, *grid) is the model's, `steps` is `timesteps` or 50, `sampler` is `dpmpp_2m_sde` (or that of
    the diffusion's `use_ddim`), and `schedule` and clipping are those of training. `spacing` defaults to "karras" for
    DPM-Solver++ and Heun, and to "uniform" for the others and with a `schedule`, its parameters or a `time_difference`.
    See `rin_video.diffusion.samplers` for the samplers, their options and the spacings, and `denoiser` for guidance.
    `label` is one class for all samples or one for each, by number or name; `embedding` is (L, D) or (B, L, D). Arrays
    are accepted in place of tensors.

    `context` (C, *grid) or (B, C, *grid), in [0, 1] or uint8, is kept bit for bit where `known`, booleans over the
    grid or (B, *grid), is true. A context of fewer frames needs no mask: it is the start.

    `precision` is "no" (float32, or the caller's autocast), "tf32", "bf16" or "fp16". The default is the precision of
    training if the diffusion comes from a run or a `Trainer`, and float32 on a CPU.

    With a `seed`, sample i is the same whatever the batch, the chunks and the device: each has its own generator,
    on the CPU. The first sample has the number `first_index`, so that a batch can be drawn in parts.
    `callback(i, x0)` sees the estimate (B', C, *grid) in [0, 1] after every step of every chunk.
    `return_trajectory` returns them all too, (B, steps, C, *grid) on the CPU; `return_self_cond` what the model would
    hand on, for another call's `self_cond`. Raises `UsageError` for what does not fit.
    """
    embedding, context, known = (None if x is None else torch.as_tensor(x) for x in (embedding, context, known))
    shape = tuple(shape) if shape else diffusion.shape
    if shape is None:
        raise UsageError("the model does not say its shape: give sample(shape=(C, *grid))")
    if batch_size is None:
        batched = next(
            (x for x, rank in ((context, len(shape)), (embedding, 2)) if x is not None and x.ndim > rank), ()
        )
        batch_size = len(batched) or 16
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: draw at least 1 sample")
    if clip_x0 not in (None, *CLIPS):
        raise UsageError(f"unknown clip_x0 {clip_x0!r}: known are {', '.join(CLIPS)}")
    sampler_name: SamplerName = sampler or diffusion.sampler or SampleConfig.sampler
    device = next((p.device for p in diffusion.parameters()), torch.device("cpu"))
    levels = make_levels(
        sampling_schedule(diffusion.config, schedule, schedule_kwargs),
        (diffusion.config.timesteps or SampleConfig.steps) if steps is None else steps,
        spacing=spacing or suited_spacing(sampler_name, schedule, schedule_kwargs, time_difference),
        time_difference=time_difference,
        scale=diffusion.config.scale,
    )
    draw = get_sampler(sampler_name, sampler_kwargs)
    precision = sampling_precision(precision, diffusion.precision, device)
    conditions, data = _given(diffusion, batch_size, shape, label, embedding, context, known)
    if guidance:
        check_guidance(guidance, guidance_drop, conditions)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    chunks = torch.arange(batch_size).split(max_batch or batch_size)
    bar = tqdm(total=len(levels) * len(chunks), desc="sampling", unit="step", disable=not progress)
    samples, trajectories, handed_on = [], [], []
    was_training = diffusion.training
    diffusion.train(False)
    try:
        for chunk in chunks:
            noise = NoiseSource(seed, (chunk + first_index).tolist(), shape, device)
            denoise = diffusion.denoiser(
                conditions.at(chunk, device),
                guidance,
                guidance_drop=guidance_drop,
                guidance_interval=guidance_interval,
                guidance_rescale=guidance_rescale,
                batched_guidance=batched_guidance,
                clip_x0=clip_x0,
            )
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
            handed_on.append(step.self_cond)
    finally:
        diffusion.train(was_training)
        bar.close()
    result: list[Any] = [torch.cat(samples)]
    result += [torch.cat(trajectories)] if return_trajectory else []
    result += [join_tensors(handed_on)] if return_self_cond else []
    return tuple(result) if len(result) > 1 else result[0]


def _given(
    diffusion: Diffusion,
    batch: int,
    shape: tuple[int, ...],
    label: Labels | None,
    embedding: Tensor | None,
    context: Tensor | None,
    known: Tensor | None,
) -> tuple[Conditions, Tensor | None]:
    """What a batch is drawn by; and the context in [0, 1], so that it comes back bit for bit."""
    label = check_labels(label, batch, getattr(diffusion.model, "num_classes", 0), diffusion.classes)
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


def sample_from_config(diffusion: Diffusion, config: SampleConfig, **options: Any) -> Any:
    """`sample` with the options of a configuration; `config.label` as a number.

    Without one, each class in turn where the model has classes. `options` are further arguments of `sample`
    (seed, progress, ...), and go before the configuration's; another sampler or schedule leaves its parameters out.
    """
    return sample(diffusion, **merged_options(diffusion, config, **options))


def merged_options(diffusion: Diffusion, config: SampleConfig, **options: Any) -> dict[str, Any]:
    """The arguments that `sample_from_config` gives to `sample`."""
    chosen = sample_options(diffusion, config)
    for name, parameters in PARAMETERS["sample"].items():
        if options.get(name, chosen[name]) != chosen[name]:
            chosen[parameters] = None
    return chosen | options


def sample_options(diffusion: Diffusion, config: SampleConfig) -> dict[str, Any]:
    """The arguments of `sample` that a configuration sets."""
    classes = getattr(diffusion.model, "num_classes", 0)
    in_turn = torch.arange(config.num_samples) % classes if classes else None
    return {
        "batch_size": config.num_samples,
        "steps": config.steps,
        "sampler": config.sampler,
        "sampler_kwargs": config.sampler_kwargs,
        "spacing": config.spacing,
        "time_difference": config.time_difference,
        "schedule": config.schedule,
        "schedule_kwargs": config.schedule_kwargs,
        "label": in_turn if config.label is None else config.label,
        "guidance": config.guidance,
        "guidance_drop": config.guidance_drop,
        "guidance_interval": config.guidance_interval,
        "batched_guidance": config.batched_guidance,
        "guidance_rescale": config.guidance_rescale,
        "clip_x0": config.clip_x0,
        "precision": config.precision,
    }


def _at(part: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    return part[indices.to(part.device)].to(device)


def suited_spacing(sampler: SamplerName, *in_time: Any) -> SpacingName:
    """ "karras" for DPM-Solver++ and Heun; "uniform" for the rest, and with any option that is about time."""
    return "karras" if sampler in KARRAS and not any(in_time) else "uniform"


def sampling_precision(asked: PrecisionName | None, trained: PrecisionName, device: torch.device) -> PrecisionName:
    """The requested precision; by default that of training, or float32 on a CPU, where others gain nothing."""
    if asked is None:
        return "no" if device.type == "cpu" else trained
    if asked not in (known := get_args(PrecisionName)):
        raise UsageError(f"unknown precision {asked!r}: known are {', '.join(known)}")
    return asked


def sampling_schedule(
    config: DiffusionConfig, name: ScheduleName | None = None, schedule_kwargs: Mapping[str, float] | None = None
) -> Schedule:
    """The schedule to sample with: another one by name, or that of training with other parameters.

    Raises `UsageError` for one on another path, whose inputs the network never saw.
    """
    if name is None:
        name, schedule_kwargs = config.noise_schedule, {**config.schedule_kwargs, **(schedule_kwargs or {})}
    schedule = make_schedule(name, schedule_kwargs)
    trained = make_schedule(config.noise_schedule, config.schedule_kwargs)
    if schedule(torch.tensor(0.5)).power != trained(torch.tensor(0.5)).power:
        raise UsageError(f"schedule {name} is on another path than {config.noise_schedule}, which the model learnt")
    return schedule
