"""Reading arrays (`.npy`, `.safetensors`): their shapes without their contents, and parts of them."""

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

ARRAY_SUFFIXES = (".npy", ".safetensors")
DTYPES = ("uint8", "float16", "float32", "float64")
SAFETENSORS_DTYPES = {"U8": "uint8", "F16": "float16", "F32": "float32", "F64": "float64"}
MAX_HEADER = 100_000_000  # bytes, as the library has it


@dataclass(frozen=True)
class ArrayInfo:
    """What an array file says of itself."""

    shape: tuple[int, ...]
    dtype: str
    start: int = 0  # bytes before the numbers
    byte_order: str = "="


def probe_array(source: Source) -> ArrayInfo:
    """Shape and type, from the header. UsageError where it is no plain array: nothing is ever unpickled."""
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
    """Shape (C, *grid) of the images or clips in a file, which may be one or many; None where nothing is 1 or 3.

    Of four axes, a second one of 1 or 3 means many images, else a first one of 1 or 3 means one clip.
    """
    shape = info.shape
    if len(shape) in (4, 5) and shape[1] in (1, 3):
        return shape[1:]
    return shape if len(shape) in (3, 4) and shape[0] in (1, 3) else None


def read_array(source: Source, info: ArrayInfo, place: int | None = None) -> Tensor:
    """The array, or row `place` of it; only that row is read from the disk."""
    dtype: Any = np.dtype(info.dtype).newbyteorder(cast(Any, info.byte_order))
    row = info.shape if place is None else info.shape[1:]
    size = math.prod(row) * dtype.itemsize
    with open_source(source) as file:
        file.seek(info.start + (place or 0) * size)
        content = bytearray(file.read(size))
    if len(content) < size:
        raise UsageError(f"{shown(source)} is cut off: {len(content)} of {size} bytes are there")
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(row).astype(dtype.newbyteorder("="), copy=False))


def _header(source: Source) -> ArrayInfo:
    with open_source(source) as file:
        return _npy_header(source, file) if source.suffix.lower() == ".npy" else _safetensors_header(source, file)


def _npy_header(source: Source, file: BinaryIO) -> ArrayInfo:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise UsageError(f"{shown(source)} is in Fortran order: save numpy.ascontiguousarray of it")
    return ArrayInfo(tuple(shape), dtype.newbyteorder("=").name, file.tell(), dtype.byteorder)


def _safetensors_header(source: Source, file: BinaryIO) -> ArrayInfo:
    """Eight bytes that say how long the JSON is, the JSON, the numbers: read here, since a member of a shard is no file
    that the library opens."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, size_of(source) - 8):
        raise UsageError(f"{shown(source)} is no .safetensors file: its header would be {length:,} bytes long")
    arrays = json.loads(file.read(length))
    arrays.pop("__metadata__", None)
    if len(arrays) != 1 and "samples" not in arrays:
        raise UsageError(f"{shown(source)} holds {shown(', '.join(arrays)) or 'nothing'}: name the array 'samples'")
    array = arrays["samples"] if "samples" in arrays else next(iter(arrays.values()))
    shape, (start, end) = tuple(map(int, array["shape"])), map(int, array["data_offsets"])
    dtype = SAFETENSORS_DTYPES.get(array["dtype"], array["dtype"])
    if dtype in DTYPES and (
        min(shape, default=0) < 0 or start < 0 or end - start != math.prod(shape) * np.dtype(dtype).itemsize
    ):
        raise UsageError(f"{shown(source)} is damaged: bytes {start} to {end} are no array of shape {shape}")
    return ArrayInfo(shape, dtype, 8 + length + start, "<")
