"""The tokenizer of sequences: segments of one axis (audio, sensors, motion)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rin_video.errors import UsageError
from rin_video.tokenizers.patch import PatchTokenizer

if TYPE_CHECKING:
    from rin_video.config import ModelConfig


class SequenceTokenizer(PatchTokenizer):
    """Tokenizes sequences (B, C, L) of any L that is a multiple of the patch size."""

    axes = ("length",)

    @classmethod
    def grid_of(cls, config: ModelConfig) -> tuple[int, ...]:
        """Return (L,) of a model's sequences; raise `UsageError` if `model.sequence_length` is not set."""
        if not config.sequence_length:
            raise UsageError("the sequence tokenizer needs a length: set model.sequence_length")
        return (config.sequence_length,)
