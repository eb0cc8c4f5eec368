"""Writes safetensors files one tensor at a time, so that at most one sharded tensor is gathered at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

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
DIGEST = "sha256"  # the metadata key of the checksum


def full_tensor(tensor: Any) -> Any:
    """Gather a sharded tensor (DTensor), which all processes must do together; return other tensors unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_tensors(
    path: Path | None,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    digest: bool = False,
) -> None:
    """Write a safetensors file, holding at most one full tensor at a time; the library's own writer needs all at once.

    If tensors are sharded, every process must call this; a process without a `path` only contributes its shards.
    `dtype` converts the tensors. `digest` adds the `tensors_digest` to the metadata. The write is not atomic. Errors of
    opening and writing are raised after all shards have been contributed.
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
    total, failed = hashlib.sha256(), None
    with ExitStack() as stack:
        file: BinaryIO | None = None
        parts: list[str | None] = [None, *names]  # None: the header
        for part in parts:
            tensor = None if part is None else full_tensor(tensors[part].detach())
            if path is not None and failed is None:  # otherwise only contribute shards to the other processes
                try:
                    if file is None:
                        file = stack.enter_context(path.open("wb"))
                        file.write(len(text).to_bytes(8, "little") + text)
                    if tensor is not None and part is not None:
                        tensor = tensor.cpu() if dtype is None else tensor.cpu().to(dtype)
                        _update(total, part, tensor)
                        file.write(_bytes(tensor))
                except OSError as error:
                    failed = error
            del tensor  # before the next one is gathered
        if failed is not None:
            raise failed
        if digest and file is not None:
            file.seek(8 + text.index(b"0" * 64))
            file.write(total.hexdigest().encode())


@contextmanager
def contributing(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A context manager for preparations of `write_tensors`: if they fail, this process still contributes shards."""
    try:
        yield
    except OSError:
        write_tensors(None, tensors)
        raise


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of CPU tensors, in the order of a file."""
    total = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: _order(name, tensors[name].dtype)):
        _update(total, name, tensors[name])
    return total.hexdigest()


def _order(name: str, dtype: torch.dtype) -> tuple[int, str]:
    """Return the sort key of a tensor: wide dtypes come first, so that every tensor is aligned."""
    return -dtype.itemsize, name


def _update(total: Any, name: str, tensor: Tensor) -> None:
    total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    total.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
