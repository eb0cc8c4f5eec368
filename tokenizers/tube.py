"""Video to tokens: tubes of (frames, height, width)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rin_video.errors import UsageError
from rin_video.tokenizers.patch import PatchTokenizer

if TYPE_CHECKING:
    from rin_video.config import ModelConfig


class TubeTokenizer(PatchTokenizer):
    """Clips (B, C, F, H, W), any F, H and W that the tube divides. The paper's tubes are (2, 4, 4)."""

    axes = ("frames", "height", "width")

    @classmethod
    def grid_of(cls, config: ModelConfig) -> tuple[int, ...]:
        if not config.frames:
            raise UsageError("the tube tokenizer needs frames: set model.frames (--frames 16)")
        return (config.frames, *config.height_width)
