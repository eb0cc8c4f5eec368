"""The conditions of a batch: class labels, embeddings, and the observed mask with its values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rin_video.diffusion.noise import RNG
from rin_video.tensors import append_dims


class Conditions(NamedTuple):
    """The conditions of a batch, in training and in sampling; each part may be None.

    `known` (B, 1, *grid) is the observed mask, true where a pixel is known. There, `values` (B, C, *grid) holds the
    clean data in the range of diffusion, multiplied by `scale`. A dropped condition is replaced by its null value:
    label -1 (or weights 0), embedding 0, empty mask.
    """

    label: Tensor | None = None  # (B,) integers, or (B, num_classes) weights
    embedding: Tensor | None = None  # (B, L, D)
    known: Tensor | None = None
    values: Tensor | None = None

    def at(self, indices: Tensor, device: torch.device) -> Conditions:
        """Return the conditions of some samples of the batch, on a device."""
        return Conditions(*(None if part is None else part[indices.to(part.device)].to(device) for part in self))

    def put(self, x0: Tensor) -> Tensor:
        """Return `x0` (B, C, *grid) with the known pixels replaced by their values, bit for bit."""
        if self.known is None or self.values is None:
            return x0
        return torch.where(self.known, self.values.to(x0.dtype), x0)

    def without(self, *parts: str) -> Conditions:
        """Return the conditions with some parts replaced by null values: "label" (and the embedding), "known"."""
        label, embedding, known, values = self
        if "label" in parts:
            label = None if label is None else torch.full_like(label, -1 if label.ndim == 1 else 0)
            embedding = None if embedding is None else torch.zeros_like(embedding)
        if "known" in parts and known is not None:
            known = torch.zeros_like(known)
        return Conditions(label, embedding, known, values)

    def drop(self, probability: float, rng: RNG) -> Conditions:
        """Replace label and embedding by their null values, for each sample with a probability in [0, 1]."""
        present = next((part for part in (self.label, self.embedding) if part is not None), None)
        if present is None or not probability:
            return self
        dropped = rng.uniform().to(present.device) < probability

        def choose(null: Tensor | None, part: Tensor | None) -> Tensor | None:
            if null is None or part is None:
                return None
            return torch.where(append_dims(dropped, part), null, part)

        nulls = self.without("label")
        return self._replace(label=choose(nulls.label, self.label), embedding=choose(nulls.embedding, self.embedding))

    def followed_by(self, other: Conditions) -> Conditions:
        """Concatenate two batches, which must have the same parts."""
        pairs = zip(self, other, strict=True)
        return Conditions(*(None if one is None or two is None else torch.cat([one, two]) for one, two in pairs))

    def masked_mean(self, error: Tensor) -> Tensor:
        """Average `error` (B, C, *grid) over the unknown pixels of each sample: (B,); 0 if all are known."""
        if self.known is None:
            return error.flatten(1).mean(1)
        count = (~self.known).flatten(1).sum(1) * error.shape[1]
        return torch.where(self.known, 0, error).flatten(1).sum(1) / count.clamp(min=1)

    def masked_std(self, x: Tensor) -> Tensor:
        """Return the std of `x` (B, C, *grid) over the unknown pixels of each sample: (B,).

        With an observed mask, the std is 1 if fewer than two values are unknown.
        """
        if self.known is None:
            return x.flatten(1).std(1)
        unknown = (~self.known).expand_as(x).flatten(1).to(x.dtype)
        count = unknown.sum(1)
        offset = x.flatten(1) - ((x.flatten(1) * unknown).sum(1) / count.clamp(min=1))[:, None]
        variance = (offset.square() * unknown).sum(1) / (count - 1).clamp(min=1)
        return torch.where(count > 1, variance.sqrt(), 1)
