"""Gaussian diffusion for tensors of any shape and any denoiser with the interface of RIN: the loss and sampling."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rin_video.config import (
    ClippingName,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    PrecisionOption,
    SampleConfig,
    TrainConfig,
    check_names,
)
from rin_video.config_checks import complete_choices, split_parameters
from rin_video.diffusion.balance import LossBalance
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.guidance import Guidance
from rin_video.diffusion.masks import ANY_GRID, draw_known
from rin_video.diffusion.noise import RNG
from rin_video.diffusion.objectives import CLIPS, TIME_SAMPLINGS, eps_from_x0, make_loss_weight, target, to_x0_eps
from rin_video.diffusion.rollout import rollout
from rin_video.diffusion.samplers import Denoise
from rin_video.diffusion.sampling import sample
from rin_video.diffusion.schedules import NoiseLevel, make_schedule
from rin_video.errors import UsageError
from rin_video.labels import Labels, check_labels
from rin_video.model.rin import load_model
from rin_video.port import diffusion_options
from rin_video.tensors import append_dims, as_data, map_tensors, to_diffusion_range
from rin_video.weights import save_model

CHECKED_CALLS = 8  # number of first calls in which labels on a GPU are checked


class LossTerms(NamedTuple):
    """The weighted loss of each sample (B,), its time t (B,) in [0, 1], and what training minimises (B,).

    The latter is the loss, unless the loss is balanced.
    """

    loss: Tensor
    t: Tensor
    objective: Tensor


class GaussianDiffusion(nn.Module):
    """Trains and samples a denoiser `model(x_t, gamma, *, latents=None, ...) -> (prediction, latents)`.

    `diffusion(x)` returns the loss of data (B, C, *grid) in [0, 1] or uint8. `diffusion.sample(batch_size=4)` draws
    samples in [0, 1]. The options are fields of `DiffusionConfig` or options of the PyTorch port (`rin_video.port`), by
    name. `shape` (C, *grid) is that of the model by default. Raises `UsageError` for unknown names and values out of
    range.

    The model receives `label`, `embedding` and `known` if they are present, and the previous estimate `x0` if the model
    has `x0_self_conditioning`. The latents that the model returns are passed to its next call unchanged.

    The model sees known pixels clean and in [-1, 1], together with the observed mask. They have no loss, and the
    estimates of every sampler contain their values. The option `known` sets the weights of the kinds of masks in
    training (see `rin_video.diffusion.masks`), and `known_frames` [least, most] the number of known frames.

    The data is multiplied by the option `scale`. Unless it is 1, the noisy input is divided by its std per sample, in
    training and in sampling (Chen 2023, arXiv 2301.10972). With `input_scaling` "wiener", the input is instead the
    estimate E[x0 | x_t] of data with a mean of 0 and a std of 1: where there is nearly no signal, it is nearly 0, and
    noise does not hide the known pixels.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DiffusionConfig | None = None,
        /,
        *,
        shape: tuple[int, ...] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options, self.sampler = diffusion_options(options)
        check_names(options, DiffusionConfig, "GaussianDiffusion", prefix="")
        self.model = model
        self.config = config = dataclasses.replace(
            config := config or DiffusionConfig(), **complete_choices(config, options)
        )
        self.schedule = make_schedule(*split_parameters(config.noise_schedule))
        loss_weight, parameters = split_parameters(config.loss_weight)
        self.loss_weight = make_loss_weight(loss_weight, config.objective, parameters)
        self.balance = LossBalance() if loss_weight == "balanced" else None
        time_sampling, parameters = split_parameters(config.time_sampling)
        self.draw_times = partial(TIME_SAMPLINGS[time_sampling], **parameters)
        self.shape: tuple[int, ...] | None = shape or getattr(model, "shape", None)
        self.classes: list[str] = []  # class names; empty if neither training nor a configuration has set them
        self.unchecked = CHECKED_CALLS
        self.precision: PrecisionOption = "no"  # precision of training, and the default for sampling
        self._check_known()

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> GaussianDiffusion:
        """Load the model and the diffusion of a run.

        `source` is a folder with `config.yaml` and `model.safetensors`, or a hub id `user/name`. Raises `UsageError` as
        `load_model` does.
        """
        model, config = load_model(source, device=device)
        diffusion = cls(model, config.diffusion).to(device)
        diffusion.classes = list(config.data.classes)
        diffusion.precision = config.train.mixed_precision
        return diffusion

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model and the diffusion to a folder as `config.yaml` and `model.safetensors`.

        `from_pretrained` reads them. Raises `UsageError` if the model is not a `RIN`.
        """
        config = getattr(self.model, "config", None)
        if not isinstance(config, ModelConfig):
            raise UsageError(f"save_pretrained requires a RIN, but the model is a {type(self.model).__name__}")
        train = TrainConfig(mixed_precision=self.precision)
        steps = SampleConfig(steps=self.config.timesteps or SampleConfig.steps)
        data = DataConfig(classes=list(self.classes))
        save_model(folder, self.model, Config(config, self.config, data, train, steps))

    def with_model(self, model: nn.Module) -> GaussianDiffusion:
        """Return the same diffusion around another model."""
        other = GaussianDiffusion(model, self.config, shape=self.shape)
        other.classes, other.sampler, other.precision = self.classes, self.sampler, self.precision
        return other

    # ---- training

    def forward(
        self,
        x: Tensor | np.ndarray,
        label: Labels | None = None,
        *,
        embedding: Tensor | np.ndarray | None = None,
        known: Tensor | np.ndarray | None = None,
        rng: RNG | None = None,
        per_sample: bool = False,
    ) -> Tensor | LossTerms:
        """Return the loss of data `x` (B, C, *grid) in [0, 1] or uint8, at a random time for each sample.

        `label` is (B,) integers with -1 for no class, (B,) class names, or (B, num_classes) weights. `embedding`
        (B, L, D) is another condition, with or without a label. `known` (B, 1, *grid) is the observed mask; it is drawn
        by default. Arrays are accepted in place of tensors. Random numbers come from `rng`, by default from torch's
        global generators. The result is a scalar, or with `per_sample` the terms of each sample.

        Raises `UsageError` for labels that the model does not have. Labels on a GPU are checked only in the first
        calls, because reading them makes the host wait for the GPU.
        """
        x = as_data(x, next(self.parameters(), None))
        embedding, known = (None if part is None else torch.as_tensor(part).to(x.device) for part in (embedding, known))
        if not isinstance(label, Tensor) or label.device.type == "cpu" or self.unchecked:
            self.unchecked -= bool(self.unchecked)
            label = check_labels(label, len(x), getattr(self.model, "num_classes", 0), self.classes)
            label = None if label is None else label.to(x.device)
        rng = rng or RNG(len(x), x.device)
        terms = self.loss_at(x, self.draw_times(rng), label, embedding=embedding, known=known, rng=rng)
        return terms if per_sample else terms.objective.mean()

    def loss_at(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
        known: Tensor | None = None,
        rng: RNG | None = None,
    ) -> LossTerms:
        """Return the loss of each sample at times `t` (B,) in [0, 1]; the other arguments are those of `forward`."""
        rng = rng or RNG(len(x), x.device)
        x0 = self.config.scale * to_diffusion_range(x)
        eps = rng.noise(x0.shape[1:], x0.dtype)
        level = self.level(t, x0)
        x_t = level.alpha * x0 + level.sigma * eps
        if known is None and self.config.known:
            kinds, frames = self.config.known, self.config.known_frames
            known = draw_known(kinds, frames, len(x), x.shape[2:], rng.generators())
            known = (known.pin_memory() if x.is_cuda else known).to(x.device, non_blocking=True)
        conditions = Conditions(label, embedding, known, x0).drop(self.config.label_dropout, rng)
        has_first_pass = self.config.train_prob_self_cond and getattr(self.model, "self_conditioning", True)
        self_cond = self.first_pass(x0, eps, t, conditions, rng) if has_first_pass else None
        prediction, _ = self.predict(x_t, level, conditions, self_cond)
        error = conditions.masked_mean((prediction - target(self.config.objective, x0, eps, level)).square())
        weight = self.loss_weight(level)  # one number for each sample
        loss = (weight.flatten() if isinstance(weight, Tensor) else weight) * error
        return LossTerms(loss, t, loss if self.balance is None else self.balance(loss, t, conditions.known))

    @torch.no_grad()
    def first_pass(self, x0: Tensor, eps: Tensor, t: Tensor, conditions: Conditions, rng: RNG) -> Any:
        """Run a pass without self-conditioning; return its state for the main pass.

        The state is zeroed for a random fraction 1 - train_prob_self_cond of the samples. The pass uses the same noise
        `eps` as the main pass, at a time that is later by up to `self_cond_gap`. In sampling, too, the state comes from
        a noisier step.
        """
        gap = self.config.self_cond_gap
        level = self.level((t + gap * rng.uniform()).clamp(max=1) if gap else t, x0)
        x_t = level.alpha * x0 + level.sigma * eps
        prediction, latents = self.predict(x_t, level, conditions, None)
        torch.clear_autocast_cache()  # its weight casts have no gradient: the main pass must cast again
        self_cond = self.self_cond_state(latents, self.predict_x0(prediction, x_t, level, conditions))
        keep = rng.uniform() < self.config.train_prob_self_cond
        return map_tensors(lambda h: h * append_dims(keep, h), self_cond)

    def _check_known(self) -> None:
        """Raise `UsageError` if the model takes no observed mask, or if no kind of mask fits data of this shape."""
        if self.config.known and getattr(self.model, "known_mask", True) is False:
            raise UsageError("diffusion.known requires a model that takes an observed mask: set model.known_mask=true")
        kinds = {kind for kind, weight in self.config.known.items() if weight}
        if kinds and not kinds & set(ANY_GRID) and self.shape is not None and len(self.shape) == 3:
            raise UsageError(f"diffusion.known has only {', '.join(sorted(kinds))}, for clips: use boxes for images")

    # ---- the model, as the loss and every sampler see it

    def level(self, t: Tensor, x: Tensor) -> NoiseLevel:
        """Return the noise level at times `t` (B,), with values that broadcast with `x` (B, C, *grid)."""
        return self.schedule(t).map(lambda value: append_dims(value, x))

    def predict(self, x_t: Tensor, level: NoiseLevel, conditions: Conditions, self_cond: Any) -> tuple[Tensor, Any]:
        """Return the prediction of the model for its objective, (B, C, *grid), and its latents."""
        present = {"label": conditions.label, "embedding": conditions.embedding, "known": conditions.known}
        inputs: dict[str, Any] = dict(self_cond or {}) | {
            name: part for name, part in present.items() if part is not None
        }
        scale = self.config.scale
        if self.config.input_scaling == "wiener":  # the estimate of data with a mean of 0 and a std of 1
            x_t = x_t * (level.alpha * scale / ((level.alpha * scale) ** 2 + level.sigma**2))
        elif scale != 1:
            x_t = x_t / append_dims(conditions.masked_std(x_t), x_t)
        if conditions.known is not None and conditions.values is not None:
            values = conditions.values if scale == 1 else conditions.values / scale
            x_t = torch.where(conditions.known, values, x_t)
        if isinstance(level.gamma, Tensor):
            gamma = level.gamma.float().flatten().expand(len(x_t))
        else:  # filled on the device: a copy would make the host wait
            gamma = torch.full((len(x_t),), level.gamma, dtype=torch.float32, device=x_t.device)
        prediction, latents = self.model(x_t, gamma, **inputs)
        return prediction.to(x_t.dtype), latents  # half precision under autocast; samplers need the dtype of x_t

    def self_cond_state(self, latents: Any, x0: Tensor) -> dict[str, Any]:
        """Return the self-conditioning state for the next pass. An estimate in it is divided by `scale`."""
        if getattr(self.model, "x0_self_conditioning", False):
            return {"latents": latents, "x0": x0 / self.config.scale}
        return {"latents": latents}

    def predict_x0(
        self,
        prediction: Tensor,
        x_t: Tensor,
        level: NoiseLevel,
        conditions: Conditions,
        clip_x0: ClippingName | None = None,
    ) -> Tensor:
        """Return the clipped estimate of the scaled data, (B, C, *grid), with known pixels replaced by their values."""
        x0 = conditions.put(to_x0_eps(self.config.objective, prediction, x_t, level)[0])
        return conditions.put(CLIPS[clip_x0 or self.config.clip_x0](x0, self.config.scale))

    def denoiser(
        self,
        conditions: Conditions = Conditions(),  # noqa: B008 (immutable)
        guidance: Guidance = Guidance(),  # noqa: B008 (immutable)
        clip_x0: ClippingName | None = None,
    ) -> Denoise:
        """Return the function `denoise(x, level, self_cond) -> (x0, eps, self_cond)` for samplers.

        x0 is clipped, and eps is computed from the clipped x0.
        """
        predict = guidance.applied_to(self.predict)

        def denoise(x: Tensor, level: NoiseLevel, self_cond: Any) -> tuple[Tensor, Tensor, Any]:
            prediction, latents = predict(x, level, conditions, self_cond)
            x0 = self.predict_x0(prediction, x, level, conditions, clip_x0)
            return x0, eps_from_x0(x0, x, level), self.self_cond_state(latents, x0)

        return denoise

    # ---- sampling

    def sample(self, config: SampleConfig | None = None, /, **options: Any) -> Any:
        """Draw samples (B, C, *grid) in [0, 1]: `sample(batch_size=4)`, or `sample(config.sample, seed=0)`.

        `options` are fields of `SampleConfig` (steps, sampler, guidance, ...) and arguments of
        `rin_video.diffusion.sampling.sample` (batch_size, shape, label, embedding, context, known, seed, max_batch,
        progress, callback, ...), which describes them.
        """
        return sample(self, config, **options)

    def rollout(self, frames: int, config: SampleConfig | None = None, /, **options: Any) -> Iterator[Tensor]:
        """Generate clips with any number of frames; yield parts (B, C, f, H, W) in [0, 1] on the CPU.

        `options` are those of `sample` and of `rin_video.diffusion.rollout.rollout`, which describes them.
        """
        return rollout(self, frames, config, **options)
