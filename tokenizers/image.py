"""The tokenizer of images: square or rectangular patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rin_video.tokenizers.patch import PatchTokenizer

if TYPE_CHECKING:
    from rin_video.config import ModelConfig


class ImageTokenizer(PatchTokenizer):
    """Tokenizes images (B, C, H, W) of any H and W that are multiples of the patch size."""

    axes = ("height", "width")

    @classmethod
    def grid_of(cls, config: ModelConfig) -> tuple[int, ...]:
        """Return (H, W) of a model's images."""
        return config.height_width
