"""Classifier-free guidance: two predictions, with and without conditions, mixed."""

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

# (x, level, conditions, self-conditioning state) -> (prediction, latents)
Predict = Callable[[Tensor, NoiseLevel, Conditions, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Guidance:
    """Options of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    The prediction becomes (1 + scale) * conditional - scale * unconditional. The unconditional one does without `drop`:
    "label" (and the embedding), "known", or "label+known".
    """

    scale: float = 0.0  # 0: no guidance
    drop: str = "label"
    interval: tuple[float, float] = (0.0, 1.0)  # the gammas that are guided (Kynkaanniemi et al. 2024, 2404.07724)
    rescale: float = 0.0  # 0 to 1: brings the std back to that of the conditional prediction
    batched: bool = True  # one forward pass for both predictions; False: two passes, which need less memory

    @classmethod
    def from_config(cls, config: SampleConfig) -> Guidance:
        """The guidance that a configuration describes."""
        low, high = config.guidance_interval
        return cls(config.guidance, config.guidance_drop, (low, high), config.guidance_rescale, config.batched_guidance)

    def check(self, conditions: Conditions) -> None:
        """Raise `UsageError` if there is guidance but nothing to drop."""
        there: dict[GuidanceDropName, bool] = {
            "label": conditions.label is not None or conditions.embedding is not None,
            "known": conditions.known is not None,
        }
        parts: list[Any] = self.drop.split("+")
        if unknown := set(parts) - set(there):
            raise UsageError(
                f"guidance_drop is {self.drop}: {', '.join(sorted(unknown))} is unknown, it takes {', '.join(there)}"
            )
        if self.scale and (missing := [part for part in parts if not there[part]]):
            raise UsageError(
                f"guidance is {self.scale:g}, but the samples have no {' and no '.join(missing)} to be guided by: give "
                f"one{', or guidance_drop=known' if there['known'] else ''}"
            )

    def applied_to(self, predict: Predict) -> Predict:
        """`predict` with guidance. Both predictions see the same self-conditioning state.

        The latents of the conditional one are passed on. `rescale` is eq. 15 and 16 of Lin et al. 2023 (2305.08891).
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
