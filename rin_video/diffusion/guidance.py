"""Classifier-free guidance: the combination of predictions with and without conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rin_video.config import GuidanceDropName, SampleConfig
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.schedules import NoiseLevel
from rin_video.errors import UsageError
from rin_video.tensors import append_dims, map_tensors

# (x_t, level, conditions, self-conditioning state) -> (prediction, latents)
Predict = Callable[[Tensor, NoiseLevel, Conditions, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Guidance:
    """Options of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    The guided prediction is (1 + scale) * conditional - scale * unconditional. The unconditional prediction omits the
    conditions in `drop`: "label" (and the embedding), "known", or "label+known".
    """

    scale: float = 0.0  # 0: no guidance
    drop: str = "label"
    interval: tuple[float, float] = (0.0, 1.0)  # range of gamma with guidance (Kynkaanniemi et al. 2024, 2404.07724)
    rescale: float = 0.0  # 0 to 1: how far to restore the std of the conditional prediction
    batched: bool = True  # both predictions in one forward pass; False: in two, which need less memory

    @classmethod
    def from_config(cls, config: SampleConfig) -> Guidance:
        """Return the guidance options of a configuration."""
        low, high = config.guidance_interval
        return cls(config.guidance, config.guidance_drop, (low, high), config.guidance_rescale, config.batched_guidance)

    def check(self, conditions: Conditions) -> None:
        """Raise `UsageError` if `drop` has an unknown name, or if there is guidance but no condition to drop."""
        present: dict[GuidanceDropName, bool] = {
            "label": conditions.label is not None or conditions.embedding is not None,
            "known": conditions.known is not None,
        }
        names = {"label": "label or embedding", "known": "context"}
        parts: list[Any] = self.drop.split("+")
        if unknown := set(parts) - set(present):
            raise UsageError(
                f"guidance_drop is {self.drop}: {', '.join(sorted(unknown))} is unknown, choose {', '.join(present)}"
            )
        if self.scale and (missing := [names[part] for part in parts if not present[part]]):
            raise UsageError(
                f"guidance is {self.scale:g} with guidance_drop={self.drop}, but the samples have no "
                f"{' and no '.join(missing)}: pass one{', or set guidance_drop=known' if present['known'] else ''}"
            )

    def applied_to(self, predict: Predict) -> Predict:
        """Return `predict` with guidance.

        Both predictions use the same self-conditioning state. The returned latents are those of the conditional
        prediction. `rescale` follows eq. 15 and 16 of Lin et al. 2023 (arXiv 2305.08891).
        """
        low, high = self.interval

        def guided(x: Tensor, level: NoiseLevel, conditions: Conditions, self_cond: Any) -> tuple[Tensor, Any]:
            if not self.scale or not low <= level.gamma <= high:
                return predict(x, level, conditions, self_cond)
            dropped = conditions.without(*self.drop.split("+"))
            if self.batched:
                both = map_tensors(lambda h: torch.cat([h, h]), self_cond)
                prediction, latents = predict(torch.cat([x, x]), level, conditions.followed_by(dropped), both)
                conditional, unconditional = prediction.chunk(2)
                latents = map_tensors(lambda h: h.chunk(2)[0], latents)
            else:
                conditional, latents = predict(x, level, conditions, self_cond)
                unconditional, _ = predict(x, level, dropped, self_cond)
            prediction = (1 + self.scale) * conditional - self.scale * unconditional
            if self.rescale:
                std = conditions.masked_std(conditional) / conditions.masked_std(prediction)
                prediction = prediction * append_dims(self.rescale * std + 1 - self.rescale, prediction)
            return prediction, latents

        return guided
