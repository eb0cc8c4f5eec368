"""Value ranges and shapes of tensors, and operations on nested structures of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rin_video.errors import UsageError


def append_dims(value: Tensor, x: Tensor) -> Tensor:
    """Reshape one value per sample, (B,) or (B, 1, ...), to (B, 1, ..., 1) with as many axes as `x` (B, ...)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def as_data(x: Tensor | np.ndarray, like: Tensor | None) -> Tensor:
    """Convert data of a caller to a uint8 or floating-point tensor.

    An array is moved to the device of `like`, the model's weights; float64 is converted to their dtype. Raises
    `UsageError` for other integer types, whose range is ambiguous (0 to 1 or 0 to 255).
    """
    x = x if isinstance(x, Tensor) else torch.as_tensor(x).to("cpu" if like is None else like.device)
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise UsageError(f"the data is {x.dtype}: pass uint8 (0 to 255), or floats in [0, 1]")
    return x.to(like.dtype) if x.dtype == torch.float64 and like is not None else x


def to_unit_range(x: Tensor) -> Tensor:
    """Scale uint8 to [0, 1]; floats are returned unchanged."""
    return x / 255 if x.dtype == torch.uint8 else x


def to_diffusion_range(x: Tensor) -> Tensor:
    """Scale floats in [0, 1], or uint8, to [-1, 1]."""
    if x.dtype == torch.uint8:
        return x.float() / 127.5 - 1
    return x * 2 - 1


def from_diffusion_range(x: Tensor) -> Tensor:
    """Scale [-1, 1] to [0, 1] and clamp the result."""
    return ((x + 1) / 2).clamp(0, 1)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor of a nested structure of dicts, tuples and lists; other leaves are kept."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def join_tensors(values: Sequence[Any]) -> Any:
    """Concatenate the tensors of nested structures, which must be alike, along the batch axis."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return {key: join_tensors([value[key] for value in values]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(join_tensors(items) for items in zip(*values, strict=True))
    return first
