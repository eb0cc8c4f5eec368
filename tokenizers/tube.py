"""The tokenizer of video: tubes of (frames, height, width)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rin_video.errors import UsageError
from rin_video.tokenizers.patch import PatchTokenizer

if TYPE_CHECKING:
    from rin_video.config import ModelConfig


class TubeTokenizer(PatchTokenizer):
    """Tokenizes clips (B, C, F, H, W) of any F, H and W that are multiples of the tube; the paper's is (2, 4, 4)."""

    axes = ("frames", "height", "width")

    @classmethod
    def grid_of(cls, config: ModelConfig) -> tuple[int, ...]:
        """Return (F, H, W) of a model's clips; raise `UsageError` if `model.frames` is not set."""
        if not config.frames:
            raise UsageError("the tube tokenizer needs frames: set model.frames (--frames 16)")
        return (config.frames, *config.height_width)
