"""What the network is told beside its input: the noise level and the class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rin_video.errors import UsageError
from rin_video.layers import init_linears
from rin_video.tokenizers.positions import sincos


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


class Conditioner(nn.Module):
    """(gamma, label) to a `Condition`. Where time and class go is chosen for each: latent, interface or adaln."""

    def __init__(
        self,
        dim: int,
        dim_latent: int,
        *,
        num_classes: int = 0,
        time_conditioning: str = "latent",
        class_conditioning: str = "latent",
        time_scaling: float = 1000.0,
    ) -> None:
        super().__init__()
        width = {"latent": dim_latent, "interface": dim, "adaln": dim_latent}
        self.dim, self.dim_latent, self.num_classes = dim, dim_latent, num_classes
        self.places = {"time": time_conditioning} | ({"class": class_conditioning} if num_classes else {})
        self.time = TimeEmbedding(width[time_conditioning], time_scaling)
        self.label = ClassEmbedding(num_classes, width[class_conditioning]) if num_classes else None

    @property
    def num_latents(self) -> int:
        """How many latent slots the condition takes."""
        return sum(place == "latent" for place in self.places.values())

    @property
    def dim_modulation(self) -> int | None:
        """Width of the modulation, or None where nothing modulates."""
        return self.dim_latent if "adaln" in self.places.values() else None

    def forward(self, gamma: Tensor, label: Tensor | None = None) -> Condition:
        tokens = {"time": self.time(gamma)}
        if self.label is not None:
            tokens["class"] = self.label(label, len(gamma))
        elif label is not None and (label >= 0).any():
            raise UsageError("labels were given to a model without classes: build it with num_classes")

        def at(place: str) -> list[Tensor]:
            return [tokens[name] for name, where in self.places.items() if where == place]

        modulation = torch.stack(at("adaln")).sum(0) if at("adaln") else None
        return Condition(
            _stack(at("latent"), gamma, self.dim_latent), _stack(at("interface"), gamma, self.dim), modulation
        )


def _stack(tokens: list[Tensor], gamma: Tensor, dim: int) -> Tensor:
    return torch.stack(tokens, dim=1) if tokens else gamma.new_zeros(len(gamma), 0, dim)
