"""What the network is told beside its input: the noise level and the class."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Conditioner(nn.Module):
    """(gamma, label, embedding) to a `Condition`. Where each goes is chosen: latent, interface or adaln."""

    def __init__(
        self,
        dim: int,
        dim_latent: int,
        *,
        num_classes: int = 0,
        embedding_dim: int = 0,
        embedding_tokens: int = 1,
        time_conditioning: str = "latent",
        class_conditioning: str = "latent",
        embedding_conditioning: str = "interface",
        time_scaling: float = 1000.0,
    ) -> None:
        super().__init__()
        width = {"latent": dim_latent, "interface": dim, "adaln": dim_latent}
        self.dim, self.dim_latent, self.num_classes = dim, dim_latent, num_classes
        self.time = TimeEmbedding(width[time_conditioning], time_scaling)
        self.places = {"time": time_conditioning}
        self.label = self.embedding = None
        if num_classes:
            self.places["class"] = class_conditioning
            self.label = ClassEmbedding(num_classes, width[class_conditioning])
        if embedding_dim:
            self.places["embedding"] = embedding_conditioning
            self.embedding = EmbeddingTokens(embedding_dim, embedding_tokens, width[embedding_conditioning])
        self.counts = {"time": 1, "class": 1, "embedding": embedding_tokens}

    @property
    def num_latents(self) -> int:
        """How many latent slots the condition takes."""
        return sum(self.counts[name] for name, place in self.places.items() if place == "latent")

    @property
    def dim_modulation(self) -> int | None:
        """Width of the modulation, or None where nothing modulates."""
        return self.dim_latent if "adaln" in self.places.values() else None

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

        def at(place: str, dim: int) -> Tensor:
            there = [tokens[name] for name, where in self.places.items() if where == place]
            return torch.cat(there, dim=1) if there else gamma.new_zeros(len(gamma), 0, dim)

        modulation = at("adaln", self.dim_latent).sum(1) if self.dim_modulation else None
        return Condition(at("latent", self.dim_latent), at("interface", self.dim), modulation)
