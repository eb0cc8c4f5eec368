"""Gaussian diffusion for tensors of any shape and any denoiser that follows RIN's contract: the loss, and sampling."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rin_video.config import DiffusionConfig
from rin_video.errors import UsageError
from rin_video.samplers import Step, get_sampler, noise_levels, uniform_times
from rin_video.schedules import NoiseLevel, make_schedule

OBJECTIVES = ("eps", "x0", "v")


class LossTerms(NamedTuple):
    """Loss of every sample (B,), and the time t (B,) it was drawn at."""

    loss: Tensor
    t: Tensor


class GaussianDiffusion(nn.Module):
    """Trains and samples a denoiser `model(x_t, gamma, *, latents=None, ...) -> (prediction, latents)`.

    `diffusion(x)` is the loss of data (B, C, *grid) in [0, 1] (or uint8); `diffusion.sample(batch_size=4)` draws data
    in [0, 1]. `label` is handed to the model where it is given, and `x0` (the previous estimate) where the model has
    `x0_self_conditioning`; whatever the model returns as latents is carried unopened.

    The options are those of `DiffusionConfig`. `scale` b multiplies the data; the noisy input is then divided by its
    standard deviation per sample, in training and sampling alike (arXiv 2301.10972). Raises `UsageError` for unknown
    names and values out of range.
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
        label_dropout: float = 0.0,
        clip_x0: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise UsageError(f"unknown objective {objective!r}: known are {', '.join(OBJECTIVES)}")
        for name, value in (("train_prob_self_cond", train_prob_self_cond), ("label_dropout", label_dropout)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}: a probability lies in [0, 1]")
        if scale <= 0:
            raise UsageError(f"scale is {scale}: it must be above 0")
        self.model = model
        self.config = DiffusionConfig(
            timesteps=timesteps,
            noise_schedule=noise_schedule,
            schedule_kwargs=dict(schedule_kwargs or {}),
            objective=objective,
            train_prob_self_cond=train_prob_self_cond,
            scale=scale,
            label_dropout=label_dropout,
            clip_x0=clip_x0,
        )
        self.schedule = make_schedule(noise_schedule, schedule_kwargs)
        self.timesteps = timesteps
        self.objective = objective
        self.train_prob_self_cond = train_prob_self_cond
        self.scale = scale
        self.label_dropout = label_dropout
        self.clip_x0 = clip_x0
        self.shape: tuple[int, ...] | None = shape or getattr(model, "shape", None)

    # ---- training

    def forward(self, x: Tensor, label: Tensor | None = None, *, per_sample: bool = False) -> Tensor | LossTerms:
        """The loss of data `x` (B, C, *grid) in [0, 1] or uint8, at a random time for each sample.

        A scalar; or, `per_sample`, the loss of each with its time.
        """
        x0 = self.scale * to_diffusion_range(x)
        t = torch.rand(len(x0), device=x0.device)
        eps = torch.randn_like(x0)
        level = NoiseLevel(*(append_dims(v, x0) for v in self.schedule(t)))
        x_t = level.alpha * x0 + level.sigma * eps
        if label is not None and self.label_dropout:
            label = torch.where(torch.rand(len(label), device=label.device) < self.label_dropout, -1, label)
        hidden = self.first_pass(x_t, level, label) if self.train_prob_self_cond else None
        prediction, _ = self.predict(x_t, level, label, hidden)
        loss = (prediction - target(self.objective, x0, eps, level)) ** 2
        loss = loss.flatten(1).mean(1)
        return LossTerms(loss, t) if per_sample else loss.mean()

    @torch.no_grad()
    def first_pass(self, x_t: Tensor, level: NoiseLevel, label: Tensor | None) -> Any:
        """What a pass without memory hands on, zeroed for a share 1 - train_prob_self_cond of the samples."""
        prediction, latents = self.predict(x_t, level, label, None)
        torch.clear_autocast_cache()  # its weight casts carry no gradient: the main pass must make its own
        hidden = self.carry(latents, to_x0_eps(self.objective, prediction, x_t, level)[0])
        keep = torch.rand(len(x_t), device=x_t.device) < self.train_prob_self_cond
        return map_tensors(lambda h: h * append_dims(keep, h), hidden)

    # ---- the model, as the loss and every sampler see it

    def predict(self, x_t: Tensor, level: NoiseLevel, label: Tensor | None, hidden: Any) -> tuple[Tensor, Any]:
        """The model's prediction (B, C, *grid) in the terms of `objective`, and its latents."""
        inputs: dict[str, Any] = dict(hidden or {})
        if label is not None:
            inputs["label"] = label
        if self.scale != 1:
            x_t = x_t / append_dims(x_t.flatten(1).std(1), x_t)
        gamma = torch.as_tensor(level.gamma, dtype=torch.float32, device=x_t.device)
        return self.model(x_t, gamma.flatten().expand(len(x_t)), **inputs)

    def carry(self, latents: Any, x0: Tensor) -> dict[str, Any]:
        """What goes from one pass to the next."""
        return {"latents": latents} | ({"x0": x0} if getattr(self.model, "x0_self_conditioning", False) else {})

    def denoiser(
        self, label: Tensor | None = None, guidance: float = 0.0
    ) -> Callable[[Tensor, NoiseLevel, Any], tuple[Tensor, Tensor, Any]]:
        """`denoise(x, level, hidden) -> (x0, eps, hidden)` for samplers: x0 clipped, eps re-derived from it.

        `guidance` w mixes (1 + w) * labelled - w * unlabelled predictions (Ho & Salimans 2022); both see the same
        hidden state and only the labelled one's is carried.
        """

        def denoise(x: Tensor, level: NoiseLevel, hidden: Any) -> tuple[Tensor, Tensor, Any]:
            prediction, latents = self.predict(x, level, label, hidden)
            if guidance and label is not None:
                unlabelled, _ = self.predict(x, level, torch.full_like(label, -1), hidden)
                prediction = (1 + guidance) * prediction - guidance * unlabelled
            x0, _ = to_x0_eps(self.objective, prediction, x, level)
            if self.clip_x0:
                x0 = x0.clamp(-self.scale, self.scale)
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
        noise_schedule: str | None = None,
        schedule_kwargs: Mapping[str, float] | None = None,
        label: Tensor | int | None = None,
        guidance: float = 0.0,
        seed: int | None = None,
        max_batch: int | None = None,
        progress: bool = False,
        callback: Callable[[int, Step], None] | None = None,
    ) -> Tensor:
        """Draw `batch_size` samples (B, C, *grid) in [0, 1], at most `max_batch` of them at a time.

        `shape` (C, *grid) is the model's where it is not given; `steps` is `timesteps`; the schedule is that of
        training; `label` is one class for all or (B,). With a `seed`, sample i is the same whatever the batch, the
        chunks and the device: each has its own generator, on the CPU. `callback(i, step)` sees every `Step`.
        """
        shape = shape or self.shape
        if shape is None:
            raise UsageError("the model does not say its shape: give sample(shape=(C, *grid))")
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        schedule = self.schedule if noise_schedule is None else make_schedule(noise_schedule, schedule_kwargs)
        levels = noise_levels(schedule, uniform_times(steps or self.timesteps))
        draw = get_sampler(sampler)
        labels = torch.full((batch_size,), label) if isinstance(label, int) else label
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        max_batch = max_batch or batch_size
        chunks = torch.arange(batch_size).split(max_batch)
        bar = tqdm(total=len(levels) * len(chunks), desc="sampling", unit="step", disable=not progress)
        samples = []
        was_training = self.training
        self.eval()
        try:
            for chunk in chunks:
                noise = NoiseSource(seed, chunk.tolist(), shape, device)
                denoise = self.denoiser(None if labels is None else labels[chunk].to(device), guidance)
                for i, step in enumerate(draw(denoise, noise(), levels, noise, None)):
                    bar.update()
                    if callback is not None:
                        callback(i, step)
                samples.append(from_diffusion_range(step.x0 / self.scale))
        finally:
            self.train(was_training)
            bar.close()
        return torch.cat(samples)

    def with_model(self, model: nn.Module) -> GaussianDiffusion:
        """The same diffusion around another model."""
        return GaussianDiffusion(model, **vars(self.config), shape=self.shape)

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


def append_dims(value: Tensor, x: Tensor) -> Tensor:
    """One value per sample, (B,) or (B, 1, ...), shaped to multiply `x` (B, ...)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def target(objective: str, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """What the model should have said. v: Salimans & Ho 2022 (arXiv 2202.00512), sec. 4."""
    if objective == "eps":
        return eps
    if objective == "x0":
        return x0
    return level.alpha * eps - level.sigma * x0


def to_x0_eps(objective: str, prediction: Tensor, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The one place where a prediction becomes estimates of the data and the noise; neither is clipped."""
    if objective == "eps":
        return (x_t - level.sigma * prediction) / level.alpha, prediction
    if objective == "x0":
        return prediction, eps_from_x0(prediction, x_t, level)
    power = level.alpha**2 + level.sigma**2  # 1 where variance is preserved
    return (level.alpha * x_t - level.sigma * prediction) / power, (
        level.sigma * x_t + level.alpha * prediction
    ) / power


def eps_from_x0(x0: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """The noise that makes `x_t` of `x0`."""
    return (x_t - level.alpha * x0) / level.sigma


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
