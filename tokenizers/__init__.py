"""Data to interface tokens and back: pluggable by name.

A tokenizer is an `nn.Module` that follows `Tokenizer` below. Add one by `@TOKENIZERS.register("name")`, or from another
distribution through the entry-point group `rin_video.tokenizers`; `ModelConfig.tokenizer` then takes the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from rin_video.errors import UsageError
from rin_video.registry import Registry
from rin_video.tokenizers.image import ImageTokenizer
from rin_video.tokenizers.patch import PatchTokenizer
from rin_video.tokenizers.sequence import SequenceTokenizer
from rin_video.tokenizers.tube import TubeTokenizer

if TYPE_CHECKING:
    from rin_video.config import ModelConfig

__all__ = [
    "TOKENIZERS",
    "ImageTokenizer",
    "PatchTokenizer",
    "SequenceTokenizer",
    "Tokenizer",
    "TubeTokenizer",
    "make_tokenizer",
    "tokenizer_names",
]


class Tokenizer(Protocol):
    """What a RIN asks of a tokenizer, which is an `nn.Module` too."""

    @classmethod
    def from_config(cls, config: ModelConfig, in_channels: int) -> nn.Module:
        """Build it for a model; `in_channels` may exceed `config.channels`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, *grid)."""

    def token_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """How many tokens lie along each axis of a data grid; a `UsageError` where it does not fit."""

    def tokenize(self, x: Tensor) -> Tensor:
        """(B, in_channels, *grid) to (B, N, dim), positions included."""

    def detokenize(self, tokens: Tensor, grid: Sequence[int], x: Tensor) -> Tensor:
        """(B, N, dim) to (B, C, *grid). `x` (B, in_channels, *grid) is what was tokenized: most have no use for it."""


TOKENIZERS: Registry[type[Tokenizer]] = Registry("tokenizer", group="rin_video.tokenizers")
TOKENIZERS.register("image")(ImageTokenizer)
TOKENIZERS.register("tube")(TubeTokenizer)
TOKENIZERS.register("sequence")(SequenceTokenizer)


def tokenizer_names(config: ModelConfig) -> list[str]:
    """The tokenizers of a model, joined by + in its configuration; `auto` goes by what the data is."""
    if config.tokenizer == "auto":
        return ["tube" if config.frames else "sequence" if config.sequence_length else "image"]
    return config.tokenizer.split("+")


def make_tokenizer(config: ModelConfig, in_channels: int, name: str | None = None) -> nn.Module:
    """The tokenizer called `name`, or the first one that a configuration names."""
    name = name or tokenizer_names(config)[0]
    tokenizer = TOKENIZERS.get(name).from_config(config, in_channels)
    if config.conv_width and getattr(tokenizer, "conv_in", None) is None:
        raise UsageError(f"model.conv_width is {config.conv_width}, but the tokenizer {name} convolves nothing: use 0")
    return tokenizer
