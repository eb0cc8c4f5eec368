"""Reading of array files (`.npy`, `.safetensors`): their shapes without the contents, complete arrays or rows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from rin_video.datasets.sources import Source, open_source, shown, size_of
from rin_video.errors import UsageError
from rin_video.files import ARRAY_KEY

DTYPES = ("uint8", "float16", "float32", "float64")
SAFETENSORS_DTYPES = {"U8": "uint8", "F16": "float16", "F32": "float32", "F64": "float64"}
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True)
class ArrayInfo:
    """The header of an array file."""

    shape: tuple[int, ...]
    dtype: str
    start: int = 0  # offset of the data in bytes
    byte_order: str = "="


def probe_array(source: Source) -> ArrayInfo:
    """Read the header of an array file. Raises `UsageError` if it is not a plain array; nothing is ever unpickled."""
    try:
        info = _header(source)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{shown(source)} cannot be read as an array: {shown(str(error))}") from error
    if info.dtype not in DTYPES or not info.shape or not math.prod(info.shape):
        raise UsageError(
            f"{shown(source)} is {info.dtype} of shape {info.shape}: save it as one of {', '.join(DTYPES)}"
        )
    return info


def sample_shape(info: ArrayInfo) -> tuple[int, ...] | None:
    """Guess the sample shape (C, *grid) of a file with one or many images or clips; None if none has 1 or 3 channels.

    With four axes, 1 or 3 on the second axis means many images; otherwise, 1 or 3 on the first axis means one clip.
    """
    shape = info.shape
    if len(shape) in (4, 5) and shape[1] in (1, 3):
        return shape[1:]
    return shape if len(shape) in (3, 4) and shape[0] in (1, 3) else None


def read_array(source: Source, info: ArrayInfo, place: int | None = None) -> Tensor:
    """Read an array, or only its row `place`. Raises `UsageError` if the file is truncated."""
    dtype: Any = np.dtype(info.dtype).newbyteorder(cast(Any, info.byte_order))
    row = info.shape if place is None else info.shape[1:]
    size = math.prod(row) * dtype.itemsize
    with open_source(source) as file:
        file.seek(info.start + (place or 0) * size)
        content = bytearray(file.read(size))
    if len(content) < size:
        raise UsageError(f"{shown(source)} is truncated to {len(content)} of {size} bytes: write or copy it again")
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(row).astype(dtype.newbyteorder("="), copy=False))


def _header(source: Source) -> ArrayInfo:
    with open_source(source) as file:
        return _npy_header(source, file) if source.suffix.lower() == ".npy" else _safetensors_header(source, file)


def _npy_header(source: Source, file: BinaryIO) -> ArrayInfo:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise UsageError(f"{shown(source)} is in Fortran order: save numpy.ascontiguousarray(x) instead")
    return ArrayInfo(tuple(shape), dtype.newbyteorder("=").name, file.tell(), dtype.byteorder)


def _safetensors_header(source: Source, file: BinaryIO) -> ArrayInfo:
    """Parse the header: 8 bytes for the length of the JSON, the JSON, the data.

    The library cannot open a member of a shard.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, size_of(source) - 8):
        raise UsageError(f"{shown(source)} is not a .safetensors file: its header would be {length:,} bytes long")
    arrays = json.loads(file.read(length))
    arrays.pop("__metadata__", None)
    if len(arrays) != 1 and ARRAY_KEY not in arrays:
        names = ", ".join([*arrays][:3]) + (f" and {len(arrays) - 3} more" if len(arrays) > 3 else "")
        raise UsageError(f"{shown(source)} contains {shown(names) or 'no array'}: name the array {ARRAY_KEY!r}")
    array = arrays[ARRAY_KEY] if ARRAY_KEY in arrays else next(iter(arrays.values()))
    shape, (start, end) = tuple(map(int, array["shape"])), map(int, array["data_offsets"])
    dtype = SAFETENSORS_DTYPES.get(array["dtype"], array["dtype"])
    if dtype in DTYPES and (
        min(shape, default=0) < 0 or start < 0 or end - start != math.prod(shape) * np.dtype(dtype).itemsize
    ):
        raise UsageError(f"{shown(source)} is damaged: bytes {start} to {end} do not fit an array of shape {shape}")
    return ArrayInfo(shape, dtype, 8 + length + start, "<")
