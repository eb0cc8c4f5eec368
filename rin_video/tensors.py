"""Ranges and shapes of tensors, and tensors inside opaque values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.errors import UsageError


def append_dims(value: Tensor, x: Tensor) -> Tensor:
    """One value per sample, (B,) or (B, 1, ...), shaped to multiply `x` (B, ...)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def as_data(x: Tensor | np.ndarray, like: Tensor | None) -> Tensor:
    """Data of a caller's as a tensor: uint8, or floats as wide as the weights `like`; an array goes to their device.

    Raises `UsageError` for other whole numbers, which may mean 0 to 1 or 0 to 255.
    """
    x = x if isinstance(x, Tensor) else torch.as_tensor(x).to("cpu" if like is None else like.device)
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise UsageError(f"the data are {x.dtype}: give uint8 (0 to 255), or floats in [0, 1]")
    return x.to(like.dtype) if x.dtype == torch.float64 and like is not None else x


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
