"""Sequences to tokens: stretches of one axis (audio, sensors, motion)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rin_video.errors import UsageError
from rin_video.tokenizers.patch import PatchTokenizer

if TYPE_CHECKING:
    from rin_video.config import ModelConfig


class SequenceTokenizer(PatchTokenizer):
    """Sequences (B, C, L), any L that the patch divides."""

    axes = ("length",)

    @classmethod
    def grid_of(cls, config: ModelConfig) -> tuple[int, ...]:
        if not config.sequence_length:
            raise UsageError("the sequence tokenizer needs a length: set model.sequence_length")
        return (config.sequence_length,)
