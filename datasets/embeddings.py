"""Embeddings that condition on samples: files next to the samples, or captions encoded by a text encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rin_video.config import DataConfig
from rin_video.datasets.array_files import ArrayInfo, probe_array, read_array
from rin_video.datasets.index import Entry
from rin_video.datasets.shards import companion, companions, members_of
from rin_video.datasets.sources import Member, Source, shown
from rin_video.errors import UsageError
from rin_video.files import ARRAY_SUFFIXES, atomic_write
from rin_video.wording import counted

CACHE = ".captions.safetensors"  # replaces the suffix of the index file


class Embeddings(Protocol):
    """The embeddings of a dataset, by the number of the file."""

    shape: tuple[int, int]  # (most vectors of a sample, width)

    def __getitem__(self, file: int) -> Tensor:
        """Return the embedding of a file, (vectors, width) float32, zero-padded; all zeros if it has none."""

    def select(self, files: Sequence[int]) -> Embeddings:
        """Return the embeddings of some of the files, by number, in the same shape."""

    def describe(self) -> str:
        """Return a summary in one line."""


def open_embeddings(entries: Sequence[Entry], options: DataConfig, index: Path | None) -> Embeddings | None:
    """Open the embeddings that the options request, or return None.

    Embeddings of captions are cached next to `index` between runs. Raises `UsageError` if no file has an embedding.
    """
    if options.embeddings:
        return EmbeddingFiles([entry.source for entry in entries])
    if options.text_encoder is not None:
        captions = [entry.caption for entry in entries]
        return CaptionEmbeddings(captions, options.text_encoder, options.caption_tokens, index)
    return None


def embedding_shape(dataset: Any) -> tuple[int, int] | None:
    """Return (most vectors, width) of the embeddings of a dataset; None if it has none.

    Raises `UsageError` if the widths of clips and images differ.
    """
    parts = [getattr(part, "embeddings", None) for part in getattr(dataset, "parts", (dataset,))]
    shapes = [part.shape for part in parts if part is not None]
    if len({width for _, width in shapes}) > 1:
        raise UsageError(
            f"the embeddings of clips have width {shapes[0][1]}, those of images {shapes[1][1]}: use the same encoder"
        )
    return (max(count for count, _ in shapes), shapes[0][1]) if shapes else None


class EmbeddingFiles:
    """Embeddings from `clip.npy` or `clip.safetensors` next to `clip.mp4`, (width) or (vectors, width).

    In shards, the file must have the same key. Raises `UsageError` if no file has one, or if the widths differ.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        shards = sorted({source.shard for source in sources if isinstance(source, Member)})
        by_key = companions([member for shard in shards for member in members_of(shard)[0]])
        self.files = [_companion_of(source, by_key) for source in sources]
        self.infos = [None if file is None else probe_array(file) for file in self.files]
        first = next((i for i, info in enumerate(self.infos) if info is not None), None)
        if first is None:
            raise UsageError(
                f"none of {len(sources)} files has an embedding: save them as NAME{ARRAY_SUFFIXES[0]} or "
                f"NAME{ARRAY_SUFFIXES[1]} next to the files (for example next to {shown(sources[0])})"
            )
        shapes = {self._shape(i): file for i, file in enumerate(self.files) if file is not None}
        width = self._shape(first)[1]
        for shape, file in shapes.items():
            if shape[1] != width:
                raise UsageError(
                    f"{shown(file)} has vectors of width {shape[1]}, but {shown(self.files[first] or '')} of {width}"
                )
        self.shape = (max(shape[0] for shape in shapes), width)

    def select(self, files: Sequence[int]) -> EmbeddingFiles:
        """Return the embeddings of some of the files, by number, in the same shape."""
        part = copy.copy(self)
        part.files, part.infos = [self.files[file] for file in files], [self.infos[file] for file in files]
        return part

    def _shape(self, file: int) -> tuple[int, int]:
        info = self.infos[file]
        assert info is not None
        return check_embedding(self.files[file], info.shape)

    def __getitem__(self, file: int) -> Tensor:
        source, info = self.files[file], self.infos[file]
        if source is None or info is None:
            return torch.zeros(self.shape)
        values = read_embedding(source, info)
        return F.pad(values, (0, 0, 0, self.shape[0] - len(values)))

    def describe(self) -> str:
        """Return a summary in one line."""
        there = sum(file is not None for file in self.files)
        return f"embeddings: {_vectors(self.shape)}, for {_of(there, len(self.files))}"


class CaptionEmbeddings:
    """Embeddings of captions (`clip.txt` next to `clip.mp4`); each distinct caption is encoded once.

    Raises `UsageError` if no file has a caption, or the text encoder cannot be used.
    """

    def __init__(self, captions: Sequence[str | None], source: str, num_tokens: int, index: Path | None = None) -> None:
        from rin_video.datasets.captions import TextEncoder, fingerprint

        unique = sorted({caption for caption in captions if caption})
        if not unique:
            raise UsageError(f"none of {len(captions)} files has a caption: write it to NAME.txt next to the file")
        self.source, self.cut = source, 0
        key = fingerprint(source, num_tokens, unique)
        cache = index.with_suffix(CACHE) if index else None
        rows = _read_cache(cache, key)
        if rows is None:
            rows, self.cut = TextEncoder(source).encode(unique, num_tokens, progress=True)
            _write_cache(cache, key, rows)
        self.rows = rows
        self.shape = (num_tokens, rows.shape[-1])
        number = {caption: i for i, caption in enumerate(unique)}
        self.row_of = [number[caption] if caption else -1 for caption in captions]

    def __getitem__(self, file: int) -> Tensor:
        row = self.row_of[file]
        return torch.zeros(self.shape) if row < 0 else self.rows[row].clone()

    def select(self, files: Sequence[int]) -> CaptionEmbeddings:
        """Return the embeddings of some of the files, by number, in the same shape."""
        part = copy.copy(self)
        part.row_of = [self.row_of[file] for file in files]
        return part

    def describe(self) -> str:
        """Return a summary in one line."""
        there = sum(row >= 0 for row in self.row_of)
        line = f"captions: {_vectors(self.shape)} by {self.source}, for {_of(there, len(self.row_of))}"
        return line + (f"; {self.cut} are too long and truncated: raise data.caption_tokens" if self.cut else "")


def check_embedding(source: Source | str | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape (width) or (vectors, width) as (vectors, width). Raises `UsageError` for other ranks."""
    if len(shape) not in (1, 2):
        raise UsageError(f"{shown(source or '')} has shape {shape}: an embedding must be (width) or (vectors, width)")
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def read_embedding(source: Source, info: ArrayInfo | None = None) -> Tensor:
    """Read an embedding file as (vectors, width) float32. Raises `UsageError` if it is not one, or not finite."""
    info = probe_array(source) if info is None else info
    values = read_array(source, info).float().reshape(check_embedding(source, info.shape))
    if not values.isfinite().all():
        raise UsageError(f"{shown(source)} contains numbers that are not finite: create it again")
    return values


def _companion_of(source: Source, by_key: dict[tuple[Path, str], dict[str, Member]]) -> Source | None:
    """Return the array file with the same name, in the same folder or shard, or None."""
    if isinstance(source, Member):
        found = (companion(by_key, source, suffix) for suffix in ARRAY_SUFFIXES)
        return next((member for member in found if member is not None), None)
    if not isinstance(source, Path):
        return None
    return next((file for suffix in ARRAY_SUFFIXES if (file := source.with_suffix(suffix)).is_file()), None)


def _read_cache(cache: Path | None, key: str) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    if cache is None or not cache.is_file():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return file.get_tensor("captions")
    except (SafetensorError, OSError):
        return None


def _write_cache(cache: Path | None, key: str, rows: Tensor) -> None:
    from safetensors.torch import save_file

    if cache is None:
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cache, unique=True, durable=False) as temporary:
        save_file({"captions": rows}, temporary, metadata={"key": key})


def _vectors(shape: tuple[int, int]) -> str:
    return f"{shape[0]} vector{'s' * (shape[0] > 1)} of width {shape[1]}"


def _of(there: int, count: int) -> str:
    return f"{there} of {counted(count, 'file')}" + ("; the others get a null embedding" if there < count else "")
