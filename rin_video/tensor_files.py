"""Writing safetensors files one tensor at a time, so that sharded tensors are never all put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DIGEST = "sha256"  # the key of the metadata


def full_tensor(tensor: Any) -> Any:
    """A sharded tensor (DTensor) put together, by all processes at once; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_tensors(
    path: Path | None,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    digest: bool = False,
) -> None:
    """Write a safetensors file; of sharded tensors all processes call this, and those without a `path` only contribute.

    Besides what is there, no more than one full tensor is held. `dtype` converts on the way; `digest` adds the
    `tensors_digest` to the metadata. Not atomic. The library's own writer takes all tensors at once.
    """
    names = sorted(tensors, key=lambda name: _order(name, dtype or tensors[name].dtype))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {}) | ({DIGEST: "0" * 64} if digest else {})}
    end = 0
    for name in names:
        kind, start = dtype or tensors[name].dtype, end
        end += tensors[name].numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if path is None:
        for name in names:
            full_tensor(tensors[name])
        return
    total = hashlib.sha256()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = full_tensor(tensors[name].detach()).cpu()
            tensor = tensor if dtype is None else tensor.to(dtype)
            _update(total, name, tensor)
            file.write(_bytes(tensor))
            del tensor  # before the next one is gathered
        if digest:
            file.seek(8 + text.index(b"0" * 64))
            file.write(total.hexdigest().encode())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, in the order of a file."""
    total = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: _order(name, tensors[name].dtype)):
        _update(total, name, tensors[name])
    return total.hexdigest()


def _order(name: str, dtype: torch.dtype) -> tuple[int, str]:
    """Wide types first, so that every tensor is aligned."""
    return -dtype.itemsize, name


def _update(total: Any, name: str, tensor: Tensor) -> None:
    total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    total.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
