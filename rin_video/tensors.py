"""Ranges and shapes of tensors, and tensors inside opaque values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def append_dims(value: Tensor, x: Tensor) -> Tensor:
    """One value per sample, (B,) or (B, 1, ...), shaped to multiply `x` (B, ...)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def to_unit_range(x: Tensor) -> Tensor:
    """uint8 to [0, 1]; floats as they are."""
    return x / 255 if x.dtype == torch.uint8 else x


def to_diffusion_range(x: Tensor) -> Tensor:
    """[0, 1] floats or uint8 to [-1, 1]."""
    if x.dtype == torch.uint8:
        return x.float() / 127.5 - 1
    return x * 2 - 1


def from_diffusion_range(x: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped."""
    return ((x + 1) / 2).clamp(0, 1)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` on every tensor of an opaque value made of dicts, tuples and lists; other leaves stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def join_tensors(values: Sequence[Any]) -> Any:
    """Opaque values of the same structure, their tensors joined along the batch."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return {key: join_tensors([value[key] for value in values]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(join_tensors(items) for items in zip(*values, strict=True))
    return first
