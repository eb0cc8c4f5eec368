"""What is given with a sample: its label, an embedding, and those of its cells that are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rin_video.diffusion.noise import RNG
from rin_video.tensors import append_dims


class Conditions(NamedTuple):
    """Every condition of a batch, each part possibly absent; in training and in sampling alike.

    `known` (B, 1, *grid) is true where a cell is known; there `values` (B, C, *grid) holds the clean data, in the range
    of diffusion (scale included). Nothing is what a dropped part becomes: label -1, embedding 0, no cell known.
    """

    label: Tensor | None = None  # (B,) integers, or (B, num_classes) weights
    embedding: Tensor | None = None  # (B, L, D)
    known: Tensor | None = None
    values: Tensor | None = None

    def at(self, indices: Tensor, device: torch.device) -> Conditions:
        """Some samples of the batch, on a device."""
        return Conditions(*(None if part is None else part[indices.to(part.device)].to(device) for part in self))

    def put(self, x0: Tensor) -> Tensor:
        """`x0` with the known cells in their place, bit for bit."""
        if self.known is None or self.values is None:
            return x0
        return torch.where(self.known, self.values.to(x0.dtype), x0)

    def without(self, *parts: str) -> Conditions:
        """The same with nothing in place of `parts`: "label" (the embedding too), "known"."""
        label, embedding, known, values = self
        if "label" in parts:
            label = None if label is None else torch.full_like(label, -1 if label.ndim == 1 else 0)
            embedding = None if embedding is None else torch.zeros_like(embedding)
        if "known" in parts and known is not None:
            known = torch.zeros_like(known)
        return Conditions(label, embedding, known, values)

    def drop(self, probability: float, rng: RNG) -> Conditions:
        """Label and embedding replaced by nothing, for each sample with the given probability."""
        told = next((part for part in (self.label, self.embedding) if part is not None), None)
        if told is None or not probability:
            return self
        dropped = rng.uniform().to(told.device) < probability

        def choose(nothing: Tensor | None, part: Tensor | None) -> Tensor | None:
            if nothing is None or part is None:
                return None
            return torch.where(append_dims(dropped, part), nothing, part)

        less = self.without("label")
        return self._replace(label=choose(less.label, self.label), embedding=choose(less.embedding, self.embedding))

    def followed_by(self, other: Conditions) -> Conditions:
        """Both batches as one; they have the same parts."""
        pairs = zip(self, other, strict=True)
        return Conditions(*(None if one is None or two is None else torch.cat([one, two]) for one, two in pairs))

    def masked_mean(self, error: Tensor) -> Tensor:
        """Mean of `error` (B, C, *grid) over the cells of each sample that are not known: (B,). 0 where all are."""
        if self.known is None:
            return error.flatten(1).mean(1)
        unknown = ~self.known.expand_as(error)
        return torch.where(unknown, error, 0).flatten(1).sum(1) / unknown.flatten(1).sum(1).clamp(min=1)

    def masked_std(self, x: Tensor) -> Tensor:
        """Standard deviation of `x` (B, C, *grid) over the cells of each sample that are not known: (B,)."""
        if self.known is None:
            return x.flatten(1).std(1)
        unknown = (~self.known).expand_as(x).flatten(1).to(x.dtype)
        count = unknown.sum(1)
        offset = x.flatten(1) - ((x.flatten(1) * unknown).sum(1) / count.clamp(min=1))[:, None]
        variance = (offset.square() * unknown).sum(1) / (count - 1).clamp(min=1)
        return torch.where(count > 1, variance.sqrt(), 1)
