"""Arrays as a dataset for any modality: .npy and .safetensors files, of one sample each or of many."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rin_video.config import DataConfig, data_config
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


class ArrayFolder(Dataset[dict[str, Tensor | int]]):
    """Arrays of a folder, or of one file; item: `{"x": uint8 or float32 (C, *grid), "label": class or -1}`.

    A file holds one sample (C, *grid) or many (N, C, *grid), uint8 or floats in [0, 1]; in shards too. Only
    the sample is read of a file. Raises UsageError where no file is of that `shape`, and for values outside [0, 1] when
    they are drawn.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        shape: Sequence[int],
        *,
        index: Path | None = None,
        config: DataConfig | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        from rin_video.datasets.folders import number_classes
        from rin_video.datasets.index import make_index, refuse_skipped

        self.root, self.shape, self.seed = root, tuple(shape), seed
        config = config or data_config(**options)
        found = make_index(root, "array", config, path=index, progress=True)
        self.skipped = found.unusable
        self.files: list[Source] = []
        self.infos: list[ArrayInfo] = []
        names: list[str | None] = []
        self.places: list[tuple[int, int | None]] = []  # which file, which sample in it
        for entry in found.usable:
            count = self._num_samples(entry.info)
            if count == 0:
                self.skipped.append((entry.source, self._misfit(entry.source, entry.info)))
                continue
            self.places += [(len(self.files), None if count is None else i) for i in range(count or 1)]
            names += [entry.class_name] * (count or 1)
            self.files.append(entry.source)
            self.infos.append(entry.info)
        refuse_skipped(len(self.files), self.skipped, config.strict)
        self.classes, self.labels = number_classes(names)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        index = range(len(self))[index]
        file, place = self.places[index]
        x = read_array(self.files[file], self.infos[file], place)
        if x.dtype != torch.uint8:
            x = x.float()
            low, high = x.aminmax()
            if not (low >= 0 and high <= 1):  # false for NaN too
                raise UsageError(f"{shown(self.files[file])} has values from {low:g} to {high:g}: scale them to [0, 1]")
        return {"x": x, "label": self.labels[index]}

    def name_of(self, index: int) -> str:
        file, place = self.places[index]
        return f"{self.files[file]}" + (f" [{place}]" if place is not None else "")

    def describe(self) -> str:
        from rin_video.datasets.framing import class_list
        from rin_video.datasets.index import describe_skipped

        size = "x".join(map(str, self.shape))
        kinds = ", ".join(sorted({info.dtype for info in self.infos}))
        lines = [f"{len(self)} arrays of {size} ({kinds}) in {len(self.files)} files{class_list(self.classes)}"]
        return "\n".join(lines + describe_skipped(self.skipped))

    def _num_samples(self, info: ArrayInfo) -> int | None:
        """None: the file is one sample; 0: it does not fit."""
        if info.shape == self.shape:
            return None
        return info.shape[0] if info.shape[1:] == self.shape else 0

    def _misfit(self, source: Source, info: ArrayInfo) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"{shown(source)} has shape {info.shape}, the model takes ({shape}), or (N, {shape}) for many"


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
