"""Images to tokens: square or rectangular patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rin_video.tokenizers.patch import PatchTokenizer

if TYPE_CHECKING:
    from rin_video.config import ModelConfig


class ImageTokenizer(PatchTokenizer):
    """Images (B, C, H, W), any H and W that the patch divides."""

    axes = ("height", "width")

    @classmethod
    def grid_of(cls, config: ModelConfig) -> tuple[int, ...]:
        return config.height_width
