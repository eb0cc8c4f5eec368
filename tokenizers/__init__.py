"""Tokenizers convert data to interface tokens and back; they are registered by name.

A tokenizer is an `nn.Module` that implements the `Tokenizer` protocol. `@TOKENIZERS.register("name")` registers one;
another distribution registers it through the entry-point group `rin_video.tokenizers`. `ModelConfig.tokenizer` then
accepts the name.
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
]


class Tokenizer(Protocol):
    """The interface that a RIN expects of a tokenizer, which must also be an `nn.Module`."""

    @classmethod
    def from_config(cls, config: ModelConfig, in_channels: int) -> nn.Module:
        """Build the tokenizer of a model; `in_channels` may exceed `config.channels`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, *grid)."""

    def token_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Return the number of tokens along each axis of a data grid; raise `UsageError` if the grid does not fit."""

    def tokenize(self, x: Tensor) -> Tensor:
        """Convert data (B, in_channels, *grid) to tokens (B, N, dim) and add the position codes."""

    def detokenize(self, tokens: Tensor, grid: Sequence[int], x: Tensor) -> Tensor:
        """Convert tokens (B, N, dim) to data (B, C, *grid).

        `x` (B, in_channels, *grid) is the input of `tokenize`; most tokenizers ignore it.
        """


TOKENIZERS: Registry[type[Tokenizer]] = Registry("tokenizer", group="rin_video.tokenizers")
TOKENIZERS.register("image")(ImageTokenizer)
TOKENIZERS.register("tube")(TubeTokenizer)
TOKENIZERS.register("sequence")(SequenceTokenizer)


def make_tokenizer(config: ModelConfig, in_channels: int, name: str | None = None) -> nn.Module:
    """Build the tokenizer `name`, by default the first one that the config names.

    Raises `UsageError` if the name is unknown, or if `config.conv_width` is set and the tokenizer has no convolutions.
    """
    name = name or config.tokenizers[0]
    tokenizer = TOKENIZERS.get(name).from_config(config, in_channels)
    if config.conv_width and getattr(tokenizer, "conv_in", None) is None:
        raise UsageError(
            f"model.conv_width is {config.conv_width}, but the tokenizer {name} has no convolutions: use 0"
        )
    return tokenizer
