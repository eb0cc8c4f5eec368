"""Gaussian diffusion for tensors of any shape and any denoiser that follows RIN's contract: the loss, and sampling."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rin_video.config import DiffusionConfig, SampleConfig
from rin_video.errors import UsageError
from rin_video.objectives import CLIPS, TIME_SAMPLINGS, eps_from_x0, make_loss_weight, target, to_x0_eps
from rin_video.samplers import Denoise, get_sampler, make_levels
from rin_video.schedules import NoiseLevel, make_schedule


class LossTerms(NamedTuple):
    """Weighted loss of every sample (B,), and the time t (B,) it was drawn at."""

    loss: Tensor
    t: Tensor


class GaussianDiffusion(nn.Module):
    """Trains and samples a denoiser `model(x_t, gamma, *, latents=None, ...) -> (prediction, latents)`.

    `diffusion(x)` is the loss of data (B, C, *grid) in [0, 1] (or uint8); `diffusion.sample(batch_size=4)` draws data
    in [0, 1]. `label` is handed to the model where it is given, and `x0` (the previous estimate) where the model has
    `x0_self_conditioning`; whatever the model returns as latents is carried unopened.

    The options are the fields of `DiffusionConfig`, by name or as one `config`; `shape` (C, *grid) is the model's where
    it has one. `scale` b multiplies the data; unless it is 1, the noisy input is divided by its standard deviation per
    sample, in training and sampling alike (arXiv 2301.10972). Raises `UsageError` for unknown names and values out of
    range.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: int = 1000,
        noise_schedule: str = "sigmoid",
        schedule_kwargs: Mapping[str, float] | None = None,
        objective: str = "v",
        train_prob_self_cond: float = 0.9,
        scale: float = 1.0,
        *,
        self_cond_gap: float = 0.0,
        loss_weight: str = "none",
        loss_weight_kwargs: Mapping[str, float] | None = None,
        time_sampling: str = "uniform",
        time_sampling_kwargs: Mapping[str, float] | None = None,
        label_dropout: float = 0.0,
        clip_x0: str = "static",
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config = DiffusionConfig(
            timesteps=timesteps,
            noise_schedule=noise_schedule,
            schedule_kwargs=dict(schedule_kwargs or {}),
            objective=objective,
            train_prob_self_cond=train_prob_self_cond,
            scale=scale,
            self_cond_gap=self_cond_gap,
            loss_weight=loss_weight,
            loss_weight_kwargs=dict(loss_weight_kwargs or {}),
            time_sampling=time_sampling,
            time_sampling_kwargs=dict(time_sampling_kwargs or {}),
            label_dropout=label_dropout,
            clip_x0=clip_x0,
        )
        self.schedule = make_schedule(noise_schedule, config.schedule_kwargs)
        self.loss_weight = make_loss_weight(loss_weight, objective, config.loss_weight_kwargs)
        self.draw_times = partial(TIME_SAMPLINGS[time_sampling], **config.time_sampling_kwargs)
        self.shape: tuple[int, ...] | None = shape or getattr(model, "shape", None)

    @classmethod
    def from_config(cls, model: nn.Module, config: DiffusionConfig) -> GaussianDiffusion:
        """The diffusion that a configuration describes."""
        return cls(model, **vars(config))

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> GaussianDiffusion:
        """Model and diffusion of a run: a folder with `config.yaml` and `model.safetensors`, or a hub id."""
        from rin_video.checkpoint import load_model

        model, config = load_model(source, device=device)
        return cls.from_config(model, config.diffusion).to(device)

    def with_model(self, model: nn.Module) -> GaussianDiffusion:
        """The same diffusion around another model."""
        return GaussianDiffusion(model, **vars(self.config), shape=self.shape)

    # ---- training

    def forward(self, x: Tensor, label: Tensor | None = None, *, per_sample: bool = False) -> Tensor | LossTerms:
        """The loss of data `x` (B, C, *grid) in [0, 1] or uint8, at a random time for each sample.

        A scalar; or, `per_sample`, the loss of each with its time.
        """
        t = self.draw_times(len(x), x.device)
        terms = self.loss_at(x, t, label)
        return terms if per_sample else terms.loss.mean()

    def loss_at(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> LossTerms:
        """The loss of every sample at given times `t` (B,) in [0, 1]."""
        x0 = self.config.scale * to_diffusion_range(x)
        eps = torch.randn_like(x0)
        level = self.level(t, x0)
        x_t = level.alpha * x0 + level.sigma * eps
        label = drop_labels(label, self.config.label_dropout)
        hidden = self.first_pass(x0, eps, t, label) if self.config.train_prob_self_cond else None
        prediction, _ = self.predict(x_t, level, label, hidden)
        error = (prediction - target(self.config.objective, x0, eps, level)) ** 2
        return LossTerms((self.loss_weight(level) * error).flatten(1).mean(1), t)

    @torch.no_grad()
    def first_pass(self, x0: Tensor, eps: Tensor, t: Tensor, label: Tensor | None) -> Any:
        """What a pass without memory hands on, zeroed for a share 1 - train_prob_self_cond of the samples.

        It sees the same noise, later by up to `self_cond_gap`: a sampler's memory, too, comes from a noisier step.
        """
        gap = self.config.self_cond_gap
        level = self.level((t + gap * torch.rand_like(t)).clamp(max=1) if gap else t, x0)
        x_t = level.alpha * x0 + level.sigma * eps
        prediction, latents = self.predict(x_t, level, label, None)
        torch.clear_autocast_cache()  # its weight casts carry no gradient: the main pass must make its own
        hidden = self.carry(latents, self.clip(to_x0_eps(self.config.objective, prediction, x_t, level)[0]))
        keep = torch.rand(len(t), device=t.device) < self.config.train_prob_self_cond
        return map_tensors(lambda h: h * append_dims(keep, h), hidden)

    # ---- the model, as the loss and every sampler see it

    def level(self, t: Tensor, x: Tensor) -> NoiseLevel:
        """The noise level at times `t` (B,), shaped to multiply `x`."""
        return self.schedule(t).map(lambda value: append_dims(value, x))

    def predict(self, x_t: Tensor, level: NoiseLevel, label: Tensor | None, hidden: Any) -> tuple[Tensor, Any]:
        """The model's prediction (B, C, *grid) in the terms of `objective`, and its latents."""
        inputs: dict[str, Any] = dict(hidden or {})
        if label is not None:
            inputs["label"] = label
        if self.config.scale != 1:
            x_t = x_t / append_dims(x_t.flatten(1).std(1), x_t)
        gamma = torch.as_tensor(level.gamma, dtype=torch.float32, device=x_t.device)
        return self.model(x_t, gamma.flatten().expand(len(x_t)), **inputs)

    def carry(self, latents: Any, x0: Tensor) -> dict[str, Any]:
        """What goes from one pass to the next; the estimate in the data's own range, whatever the scale."""
        if getattr(self.model, "x0_self_conditioning", False):
            return {"latents": latents, "x0": x0 / self.config.scale}
        return {"latents": latents}

    def clip(self, x0: Tensor, how: str | None = None) -> Tensor:
        """An estimate of the (scaled) data, kept in its range."""
        return CLIPS[how or self.config.clip_x0](x0, self.config.scale)

    def denoiser(
        self,
        label: Tensor | None = None,
        guidance: float = 0.0,
        *,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        batched_guidance: bool = True,
        clip_x0: str | None = None,
    ) -> Denoise:
        """`denoise(x, level, hidden) -> (x0, eps, hidden)` for samplers: x0 clipped, eps re-derived from it.

        `guidance` w mixes (1 + w) * labelled - w * unlabelled predictions (Ho & Salimans 2022, arXiv 2207.12598), where
        gamma lies in `guidance_interval` (Kynkaanniemi et al. 2024, arXiv 2404.07724). Both see the same hidden state,
        only the labelled one's is carried; one forward pass of both, or two without `batched_guidance` (less memory).
        `guidance_rescale` brings the spread of the guided prediction back towards that of the labelled one (Lin et al.
        2023, arXiv 2305.08891, eq. 15 and 16).
        """
        low, high = guidance_interval

        def predict(x: Tensor, level: NoiseLevel, hidden: Any) -> tuple[Tensor, Any]:
            if not guidance or label is None or not low <= level.gamma <= high:
                return self.predict(x, level, label, hidden)
            nothing = torch.full_like(label, -1)
            if batched_guidance:
                both = map_tensors(lambda h: torch.cat([h, h]), hidden)
                prediction, latents = self.predict(torch.cat([x, x]), level, torch.cat([label, nothing]), both)
                labelled, unlabelled = prediction.chunk(2)
                latents = map_tensors(lambda h: h.chunk(2)[0], latents)
            else:
                labelled, latents = self.predict(x, level, label, hidden)
                unlabelled, _ = self.predict(x, level, nothing, hidden)
            guided = (1 + guidance) * labelled - guidance * unlabelled
            if guidance_rescale:
                spread = labelled.flatten(1).std(1) / guided.flatten(1).std(1)
                guided = guided * append_dims(guidance_rescale * spread + 1 - guidance_rescale, guided)
            return guided, latents

        def denoise(x: Tensor, level: NoiseLevel, hidden: Any) -> tuple[Tensor, Tensor, Any]:
            prediction, latents = predict(x, level, hidden)
            x0 = self.clip(to_x0_eps(self.config.objective, prediction, x, level)[0], clip_x0)
            return x0, eps_from_x0(x0, x, level), self.carry(latents, x0)

        return denoise

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        batch_size: int = 16,
        *,
        shape: tuple[int, ...] | None = None,
        steps: int | None = None,
        sampler: str = "ddim",
        sampler_kwargs: Mapping[str, float] | None = None,
        spacing: str = "uniform",
        time_difference: float = 0.0,
        noise_schedule: str | None = None,
        schedule_kwargs: Mapping[str, float] | None = None,
        label: Tensor | int | None = None,
        guidance: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        batched_guidance: bool = True,
        clip_x0: str | None = None,
        seed: int | None = None,
        max_batch: int | None = None,
        progress: bool = False,
        callback: Callable[[int, Tensor], None] | None = None,
        return_trajectory: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw `batch_size` samples (B, C, *grid) in [0, 1], at most `max_batch` of them at a time.

        `shape` (C, *grid) is the model's where it is not given; `steps` is `timesteps`; schedule and clipping are those
        of training; `label` is one class for all or (B,). The samplers, their options and the spacings are those of
        `rin_video.samplers`, guidance is that of `denoiser`.

        With a `seed`, sample i is the same whatever the batch, the chunks and the device: each has its own generator,
        on the CPU. `callback(i, x0)` sees the estimate (B', C, *grid) in [0, 1] after every step of every chunk;
        `return_trajectory` returns them all too, (B, steps, C, *grid) on the CPU.
        """
        shape = shape or self.shape
        if shape is None:
            raise UsageError("the model does not say its shape: give sample(shape=(C, *grid))")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: draw at least 1 sample")
        if guidance and label is None:
            raise UsageError(f"guidance is {guidance}, but there is no label to be guided by: give label")
        if clip_x0 not in (None, *CLIPS):
            raise UsageError(f"unknown clip_x0 {clip_x0!r}: known are {', '.join(CLIPS)}")
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        schedule = self.schedule if noise_schedule is None else make_schedule(noise_schedule, schedule_kwargs)
        levels = make_levels(
            schedule,
            self.config.timesteps if steps is None else steps,
            spacing=spacing,
            time_difference=time_difference,
            scale=self.config.scale,
        )
        draw = get_sampler(sampler, sampler_kwargs)
        labels = check_labels(label, batch_size, getattr(self.model, "num_classes", 0))
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        chunks = torch.arange(batch_size).split(max_batch or batch_size)
        bar = tqdm(total=len(levels) * len(chunks), desc="sampling", unit="step", disable=not progress)
        samples, trajectories = [], []
        was_training = self.training
        self.eval()
        try:
            for chunk in chunks:
                noise = NoiseSource(seed, chunk.tolist(), shape, device)
                denoise = self.denoiser(
                    None if labels is None else labels[chunk].to(device),
                    guidance,
                    guidance_interval=guidance_interval,
                    guidance_rescale=guidance_rescale,
                    batched_guidance=batched_guidance,
                    clip_x0=clip_x0,
                )
                estimates = []
                for i, step in enumerate(draw(denoise, noise(), levels, noise)):
                    bar.update()
                    if callback is not None:
                        callback(i, from_diffusion_range(step.x0 / self.config.scale))
                    if return_trajectory:
                        estimates.append(from_diffusion_range(step.x0 / self.config.scale).cpu())
                samples.append(from_diffusion_range(step.x0 / self.config.scale))
                trajectories += [torch.stack(estimates, dim=1)] if return_trajectory else []
        finally:
            self.train(was_training)
            bar.close()
        return (torch.cat(samples), torch.cat(trajectories)) if return_trajectory else torch.cat(samples)

    def sample_from_config(self, config: SampleConfig, **options: Any) -> Tensor:
        """`sample` with the options of a configuration; `config.label` as a number.

        Without one, each class in turn where the model has classes. `options` are further arguments of `sample`
        (seed, progress, ...).
        """
        classes = getattr(self.model, "num_classes", 0)
        in_turn = torch.arange(config.num_samples) % classes if classes else None
        samples = self.sample(
            config.num_samples,
            steps=config.steps,
            sampler=config.sampler,
            sampler_kwargs=config.sampler_kwargs,
            spacing=config.spacing,
            time_difference=config.time_difference,
            noise_schedule=config.noise_schedule,
            schedule_kwargs=config.schedule_kwargs,
            label=in_turn if config.label is None else config.label,
            guidance=config.guidance,
            guidance_interval=config.guidance_interval,
            guidance_rescale=config.guidance_rescale,
            clip_x0=config.clip_x0,
            **options,
        )
        assert isinstance(samples, Tensor)
        return samples


class NoiseSource:
    """Standard normal noise (B, *shape) that does not depend on the batch: each sample has a CPU generator of its own.

    Sample `i` of seed `s` draws the same numbers in whatever batch it stands.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(spread_seed(seed, index)) for index in indices]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def spread_seed(*numbers: int) -> int:
    """One seed from several numbers, so that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def check_labels(label: Tensor | int | None, batch_size: int, num_classes: int) -> Tensor | None:
    """Labels for a batch. Raises `UsageError` for a class that the model does not have."""
    labels = torch.full((batch_size,), label) if isinstance(label, int) else label
    if labels is None or not num_classes or labels.ndim > 1:
        return labels
    if len(labels) != batch_size or labels.max() >= num_classes:
        raise UsageError(
            f"{len(labels)} labels up to {int(labels.max())} do not suit {batch_size} samples, {num_classes} classes: "
            f"give one for each sample, from 0 to {num_classes - 1}, or -1 for none"
        )
    return labels


def drop_labels(label: Tensor | None, probability: float) -> Tensor | None:
    """Labels (B,), each replaced by -1 (no label) with the given probability."""
    if label is None or not probability:
        return label
    return torch.where(torch.rand(len(label), device=label.device) < probability, -1, label)


def append_dims(value: Tensor, x: Tensor) -> Tensor:
    """One value per sample, (B,) or (B, 1, ...), shaped to multiply `x` (B, ...)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def to_diffusion_range(x: Tensor) -> Tensor:
    """[0, 1] floats or uint8 to [-1, 1]."""
    if x.dtype == torch.uint8:
        return x.float() / 127.5 - 1
    return x * 2 - 1


def from_diffusion_range(x: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped."""
    return ((x + 1) / 2).clamp(0, 1)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` on every tensor of an opaque value made of dicts, tuples and lists; other leaves stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    return value
