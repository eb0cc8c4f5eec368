"""Conditioning: embeddings of the noise level, the class label and other vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rin_video.config import ModelConfig
from rin_video.errors import UsageError
from rin_video.layers import init_linears
from rin_video.tokenizers.positions import LearnedPosition, sincos


class Condition(NamedTuple):
    """The embedded conditions, grouped by where they enter the core; each group may be empty.

    `latents` (B, n, dim_latent) fill the last n latent slots. `interface` (B, r, dim) are tokens that are read but
    never written. `modulation` (B, dim_latent) sets the scale and shift of the adaptive norms (adaLN).
    """

    latents: Tensor
    interface: Tensor
    modulation: Tensor | None


class TimeEmbedding(nn.Module):
    """Embeds the noise level: a sin-cos code of width dim / 4, standardised, then Linear, SiLU, Linear.

    The noise level is multiplied by `time_scaling` before it is encoded. Raises `UsageError` if `dim` is not a multiple
    of 8.
    """

    def __init__(self, dim: int, time_scaling: float) -> None:
        super().__init__()
        if dim % 8:
            raise UsageError(
                f"the time embedding needs a width that is a multiple of 8, not {dim}: change dim or dim_latent"
            )
        self.time_scaling = time_scaling
        self.dim_code = dim // 4
        self.mlp = nn.Sequential(nn.Linear(self.dim_code, dim), nn.SiLU(), nn.Linear(dim, dim))
        init_linears(self.mlp)

    def forward(self, gamma: Tensor) -> Tensor:
        """Map `gamma` (B,) in (0, 1] to (B, dim)."""
        code = sincos(self.time_scaling * gamma.float(), self.dim_code)
        code = (code - code.mean(dim=-1, keepdim=True)) / code.std(dim=-1, correction=0, keepdim=True)
        embedded: Tensor = self.mlp(code.to(next(self.mlp.parameters()).dtype))
        return embedded


class ClassEmbedding(nn.Module):
    """Embeds class labels: the one-hot vector times a matrix, plus a bias.

    A missing label is the zero vector, so its embedding is the bias.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.projection = nn.Linear(num_classes, dim)
        init_linears(self.projection)

    def forward(self, label: Tensor | None, batch: int) -> Tensor:
        """Map the labels of `batch` samples to (B, dim).

        `label` is (B,) integers below `num_classes`, or (B, num_classes) weights. A negative integer means no class,
        and None means no class for all samples. Raises `UsageError` for any other shape.
        """
        weight = self.projection.weight
        if label is None:
            label = weight.new_zeros(batch, self.num_classes)
        elif label.shape not in ((batch,), (batch, self.num_classes)):
            expected = f"({batch},) class numbers or ({batch}, {self.num_classes}) weights"
            raise UsageError(f"label has shape {tuple(label.shape)}: pass {expected}")
        elif label.ndim == 1:
            classes = torch.arange(self.num_classes, device=label.device)
            label = (label[:, None] == classes).to(weight.dtype)
        embedded: Tensor = self.projection(label.to(weight.dtype))
        return embedded


class EmbeddingTokens(nn.Module):
    """Projects the vectors of a sample, such as a text encoding, to tokens and adds a learned position to each.

    A missing vector is the zero vector, so its token is the bias plus its position.
    """

    def __init__(self, dim_embedding: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.dim_embedding, self.num_tokens = dim_embedding, num_tokens
        self.projection = nn.Linear(dim_embedding, dim)
        self.position = LearnedPosition((num_tokens,), dim)
        init_linears(self.projection)

    def forward(self, embedding: Tensor | None, batch: int) -> Tensor:
        """Map the vectors of `batch` samples to (B, num_tokens, dim).

        `embedding` is (B, n, dim_embedding) with 1 <= n <= num_tokens. The vectors after the n-th are missing; None
        means that all are missing. Raises `UsageError` for any other shape.
        """
        weight = self.projection.weight
        if embedding is None:
            embedding = weight.new_zeros(batch, self.num_tokens, self.dim_embedding)
        _, count, width = embedding.shape if embedding.ndim == 3 else (0, 0, 0)
        if width != self.dim_embedding or not 1 <= count <= self.num_tokens:
            raise UsageError(
                f"embedding has shape {tuple(embedding.shape)}: pass ({batch}, 1 to {self.num_tokens}, "
                f"{self.dim_embedding}), as set by model.embedding_tokens and model.embedding_dim"
            )
        embedding = F.pad(embedding.to(weight.dtype), (0, 0, 0, self.num_tokens - count))
        tokens: Tensor = self.projection(embedding) + self.position((self.num_tokens,))
        return tokens


class Conditioner(nn.Module):
    """Embeds the noise level, the label and the embedding, and groups them by where they enter the core."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.places = {name: place for name, (place, _) in config.conditions.items()}
        self.width = {"latent": config.latent_width, "interface": config.dim, "adaln": config.latent_width}
        self.modulates = config.modulation_width is not None
        self.time = TimeEmbedding(self.width[config.time_conditioning], config.time_scaling)
        self.label = self.embedding = None
        if config.num_classes:
            self.label = ClassEmbedding(config.num_classes, self.width[config.class_conditioning])
        if config.embedding_dim:
            width = self.width[config.embedding_conditioning]
            self.embedding = EmbeddingTokens(config.embedding_dim, config.embedding_tokens, width)

    def forward(self, gamma: Tensor, label: Tensor | None = None, embedding: Tensor | None = None) -> Condition:
        """Embed the conditions of a batch.

        `gamma` (B,) in (0, 1] is the fraction of signal power. `label` is (B,) integers or (B, num_classes) weights,
        `embedding` (B, n, embedding_dim); each may be None. Raises `UsageError` for a condition that the model does not
        take.
        """
        tokens = {"time": self.time(gamma).unsqueeze(1)}
        if self.label is not None:
            tokens["class"] = self.label(label, len(gamma)).unsqueeze(1)
        elif label is not None and (label >= 0).any():
            raise UsageError("labels were passed to a model without classes: build it with num_classes")
        if self.embedding is not None:
            tokens["embedding"] = self.embedding(embedding, len(gamma))
        elif embedding is not None:
            raise UsageError("embeddings were passed to a model without embeddings: build it with embedding_dim")

        def at(place: str) -> Tensor:
            found = [tokens[name] for name, where in self.places.items() if where == place]
            return torch.cat(found, dim=1) if found else gamma.new_zeros(len(gamma), 0, self.width[place])

        return Condition(at("latent"), at("interface"), at("adaln").sum(1) if self.modulates else None)
