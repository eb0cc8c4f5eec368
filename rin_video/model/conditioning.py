"""What the network is told beside its input: the noise level and the class."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rin_video.config import ConditioningName, ModelConfig
from rin_video.errors import UsageError
from rin_video.layers import init_linears
from rin_video.tokenizers.positions import LearnedPosition, sincos


class Condition(NamedTuple):
    """The condition as the core takes it, each part possibly empty.

    `latents` (B, n, dim_latent) take the last of the latent slots; `interface` (B, r, dim) are read and never written;
    `modulation` (B, dim_latent) moves the norms of every unit (adaln).
    """

    latents: Tensor
    interface: Tensor
    modulation: Tensor | None


class TimeEmbedding(nn.Module):
    """gamma (B,) to (B, dim): sin-cos code of width dim/4, standardised, Linear, SiLU, Linear."""

    def __init__(self, dim: int, time_scaling: float) -> None:
        super().__init__()
        if dim % 8:
            raise UsageError(f"the time embedding needs a width that 8 divides, not {dim}: change dim or dim_latent")
        self.time_scaling = time_scaling
        self.dim_code = dim // 4
        self.mlp = nn.Sequential(nn.Linear(self.dim_code, dim), nn.SiLU(), nn.Linear(dim, dim))
        init_linears(self.mlp)

    def forward(self, gamma: Tensor) -> Tensor:
        code = sincos(self.time_scaling * gamma.float(), self.dim_code)
        code = (code - code.mean(dim=-1, keepdim=True)) / code.std(dim=-1, correction=0, keepdim=True)
        return self.mlp(code.to(next(self.mlp.parameters()).dtype))


class ClassEmbedding(nn.Module):
    """label to (B, dim): one-hot times a matrix, plus a bias. A missing label is the zero vector, so only the bias.

    `label` is (B,) integers below num_classes, where a negative one means missing; or (B, num_classes) weights. Any
    other shape is a `UsageError`.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.projection = nn.Linear(num_classes, dim)
        init_linears(self.projection)

    def forward(self, label: Tensor | None, batch: int) -> Tensor:
        weight = self.projection.weight
        if label is None:
            label = weight.new_zeros(batch, self.num_classes)
        elif label.shape not in ((batch,), (batch, self.num_classes)):
            wanted = f"({batch},) classes or ({batch}, {self.num_classes}) weights"
            raise UsageError(f"label has the shape {tuple(label.shape)}: give {wanted}")
        elif label.ndim == 1:
            known = torch.arange(self.num_classes, device=label.device)
            label = (label[:, None] == known).to(weight.dtype)
        return self.projection(label.to(weight.dtype))


class EmbeddingTokens(nn.Module):
    """Vectors that come with a sample, (B, n, dim_embedding) with n up to `num_tokens`, to (B, num_tokens, dim).

    As with a class, a missing vector is the zero vector: what is left is the bias, and its place in the sequence.
    """

    def __init__(self, dim_embedding: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.dim_embedding, self.num_tokens = dim_embedding, num_tokens
        self.projection = nn.Linear(dim_embedding, dim)
        self.position = LearnedPosition((num_tokens,), dim)
        init_linears(self.projection)

    def forward(self, embedding: Tensor | None, batch: int) -> Tensor:
        weight = self.projection.weight
        if embedding is None:
            embedding = weight.new_zeros(batch, self.num_tokens, self.dim_embedding)
        _, count, width = embedding.shape if embedding.ndim == 3 else (0, 0, 0)
        if width != self.dim_embedding or not 1 <= count <= self.num_tokens:
            raise UsageError(
                f"embedding has the shape {tuple(embedding.shape)}: give ({batch}, 1 to {self.num_tokens}, "
                f"{self.dim_embedding}), as model.embedding_tokens and model.embedding_dim say"
            )
        embedding = F.pad(embedding.to(weight.dtype), (0, 0, 0, self.num_tokens - count))
        return self.projection(embedding) + self.position((self.num_tokens,))


def condition_places(config: ModelConfig) -> dict[str, tuple[ConditioningName, int]]:
    """The conditions that a model takes: where each enters the core, and how many vectors it is."""
    found: dict[str, tuple[ConditioningName, int]] = {"time": (config.time_conditioning, 1)}
    if config.num_classes:
        found["class"] = (config.class_conditioning, 1)
    if config.embedding_dim:
        found["embedding"] = (config.embedding_conditioning, config.embedding_tokens)
    return found


def num_condition_latents(config: ModelConfig) -> int:
    """The number of latent slots that hold conditions."""
    return sum(count for place, count in condition_places(config).values() if place == "latent")


def modulation_width(config: ModelConfig) -> int | None:
    """The width of the vector that modulates the norms (adaLN); None if no condition does."""
    return config.latent_width if any(place == "adaln" for place, _ in condition_places(config).values()) else None


class Conditioner(nn.Module):
    """Embeds gamma, label and embedding, and sends each to its place: latent slots, interface tokens or adaLN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.places = {name: place for name, (place, _) in condition_places(config).items()}
        self.width = {"latent": config.latent_width, "interface": config.dim, "adaln": config.latent_width}
        self.modulates = modulation_width(config) is not None
        self.time = TimeEmbedding(self.width[config.time_conditioning], config.time_scaling)
        self.label = self.embedding = None
        if config.num_classes:
            self.label = ClassEmbedding(config.num_classes, self.width[config.class_conditioning])
        if config.embedding_dim:
            width = self.width[config.embedding_conditioning]
            self.embedding = EmbeddingTokens(config.embedding_dim, config.embedding_tokens, width)

    def forward(self, gamma: Tensor, label: Tensor | None = None, embedding: Tensor | None = None) -> Condition:
        tokens = {"time": self.time(gamma).unsqueeze(1)}
        if self.label is not None:
            tokens["class"] = self.label(label, len(gamma)).unsqueeze(1)
        elif label is not None and (label >= 0).any():
            raise UsageError("labels were given to a model without classes: build it with num_classes")
        if self.embedding is not None:
            tokens["embedding"] = self.embedding(embedding, len(gamma))
        elif embedding is not None:
            raise UsageError("embeddings were given to a model that takes none: build it with embedding_dim")

        def at(place: str) -> Tensor:
            there = [tokens[name] for name, where in self.places.items() if where == place]
            return torch.cat(there, dim=1) if there else gamma.new_zeros(len(gamma), 0, self.width[place])

        return Condition(at("latent"), at("interface"), at("adaln").sum(1) if self.modulates else None)
