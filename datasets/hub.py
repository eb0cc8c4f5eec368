"""Datasets of the Hugging Face package `datasets`: hf:NAME[[:CONFIGURATION]:SPLIT], or a saved folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from rin_video.config import DataConfig
from rin_video.datasets.clip_sampler import ClipSampler
from rin_video.datasets.decoding import VideoInfo, open_video, probe_video
from rin_video.datasets.epochs import SampleDataset
from rin_video.datasets.extensions import CLIP_EXTENSIONS
from rin_video.datasets.folders import relabel, sort_classes
from rin_video.datasets.images import make_resize_crop
from rin_video.datasets.reading import read_image
from rin_video.datasets.resize_crop import SampleRNG, class_list, unaugmented
from rin_video.datasets.sources import Buffer, shown
from rin_video.errors import UsageError, first_line
from rin_video.files import HUB
from rin_video.wording import counted


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is `hf:...` or a folder that the Hugging Face package saved."""
    name = os.fspath(path)
    return name.startswith(HUB) or any(
        os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
    )


class HubDataset(SampleDataset):
    """A dataset of the images or clips in one column of a table.

    Items are `{"x": uint8 (C, H, W) or (C, F, H, W), "label": class or -1}`. The column is `image_column`, by default
    the first one of type Image or Video. Labels come from `label_column` (numbers or text), by default from the first
    column of type ClassLabel. A row without a readable picture raises `UsageError` when it is drawn. Only `hf:` uses
    the network. Raises `UsageError` if the table has no such column or no rows.
    """

    def __init__(
        self, path: str | os.PathLike[str], shape: tuple[int, ...], options: DataConfig, *, seed: int = 0
    ) -> None:
        hub = import_hub()
        table = load_table(os.fspath(path))
        self.path, self.shape, self.config, self.rng = path, tuple(shape), options, SampleRNG(seed)
        _refuse_unsupported(path, options)
        kind = "Image" if len(shape) == 3 else "Video"
        columns = columns_of(table, kind)
        if options.image_column is not None:
            columns = [_existing(table, options.image_column, path)]
        if len(shape) not in (3, 4) or not columns:
            raise UsageError(
                f"{os.fspath(path)} has no column of type {kind} for a model of shape {shape}; it has {_types(table)}: "
                "name one with data.image_column=NAME"
            )
        if not len(table):
            raise UsageError(f"{os.fspath(path)} is empty: use a split with at least one row")
        self.column = columns[0]
        # Get the bytes and decode them here, so that they are oriented, converted and cropped like files.
        feature = table.features[self.column]
        feature = type(feature) if type(feature).__name__ == kind else getattr(hub, kind)
        try:
            self.table = table.select_columns([self.column]).cast_column(self.column, feature(decode=False))
        except Exception as error:
            raise UsageError(
                f"{os.fspath(path)}: column {self.column} contains no {kind.lower()}s ({first_line(error)}): name "
                "another with data.image_column=NAME"
            ) from error
        self.label, self.classes, self.labels = self._read_labels(table)
        self.rows: Sequence[int] = range(len(self.table))  # the numbers of the rows in the complete table
        self.whole_numbers = [n for n, feature in table.features.items() if "int" in str(getattr(feature, "dtype", ""))]
        self.resize_crop = make_resize_crop(shape[-2:], options)
        self.clip_sampler = ClipSampler(shape[1], options) if len(shape) == 4 else None
        self.frames = shape[1]
        self.parts_of_row = options.windows if self.clip_sampler else 1
        self.skipped: list[tuple[Any, str]] = []
        self.infos = self._first_info()  # of one clip, for the frame rate

    def _first_info(self) -> list[VideoInfo]:
        if self.clip_sampler is None:
            return []
        for row in range(min(len(self.rows), 8)):
            with suppress(UsageError):
                return [probe_video(self._source(row, row * self.parts_of_row), max_pixels=self.config.max_pixels)]
        return []

    def _read_labels(self, table: Any) -> tuple[str | None, list[str], list[int]]:
        """Return the label column, the names of its classes, and the class of every row (-1: none)."""
        wanted = self.config.label_column
        labels = columns_of(table, "ClassLabel") if wanted is None else [_existing(table, wanted, self.path)]
        if not labels:
            return None, [], []
        values = table.select_columns(labels[:1])[labels[0]]
        if hasattr(table.features[labels[0]], "names"):
            names = list(table.features[labels[0]].names)
            return labels[0], names, [-1 if value is None else int(value) for value in values]
        if not all(value is None or isinstance(value, str | int) for value in values):
            raise UsageError(
                f"{os.fspath(self.path)}: column {wanted} contains {table.features[wanted]}, not class labels"
            )
        names = sort_classes({str(value) for value in values if value is not None and value != -1})
        number = {name: i for i, name in enumerate(names)}
        return labels[0], names, [number.get(str(value), -1) for value in values]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of `dataset[index]`, in all workers."""
        self.rng.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows) * self.parts_of_row

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.draw(index, self.rng.epoch)

    def draw(self, index: int, epoch: int) -> dict[str, Tensor | int]:
        """Return item `index` of an epoch. Raises `UsageError` if the row has no readable picture."""
        index = range(len(self))[index]
        row, part = divmod(index, self.parts_of_row)
        rng = self.rng.draw(index, epoch)
        source = self._source(row, index)
        label = self.labels[row] if self.label else -1
        if self.clip_sampler is None:
            can_reduce = self.resize_crop.scales == (1.0, 1.0)  # a small crop needs the full resolution
            size = self.resize_crop.size if can_reduce else None
            image = read_image(source, self.shape[0], at_least=size, max_pixels=self.config.max_pixels)
            return {"x": self.resize_crop(image, rng), "label": label}
        info = probe_video(source, max_pixels=self.config.max_pixels)
        self.clip_sampler.check(source, info)
        indices = self.clip_sampler.draw(info, part, self.parts_of_row, rng)
        with open_video(source, self.config.decoder, info) as video:
            x = self.resize_crop.read_clip(video, indices, info.size, rng, self.shape[0])
        return {"x": x, "label": label}

    def _source(self, row: int, index: int) -> Buffer:
        """Return the bytes of a row's picture. Raises `UsageError` if there are none."""
        cell, name = self.table[self.rows[row]][self.column] or {}, self.name_of(index)
        content, path = cell.get("bytes"), str(cell.get("path") or "")
        if content is None and not path:
            raise UsageError(f"{name} has no value in column {self.column}")
        if content is None:
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                raise UsageError(f"{name}: {shown(path)} cannot be read ({error.strerror})") from error
        return Buffer(name + Path(path).suffix, bytes(content))

    def name_of(self, index: int) -> str:
        """Return the name of the item's row, PATH[ROW]."""
        return f"{os.fspath(self.path)}[{self.rows[index // self.parts_of_row]}]"

    def group_of(self, index: int) -> int:
        """Return the number of the item's row."""
        return range(len(self))[index] // self.parts_of_row

    def keys(self) -> list[str]:
        """Return the name of each row by which its side is chosen: its number in the table."""
        return [str(row) for row in self.rows]

    @property
    def class_names(self) -> list[str | None]:
        """The class of each row."""
        if not self.label:
            return [None] * len(self.rows)
        return [self.classes[number] if number >= 0 else None for number in self.labels]

    def select(self, rows: Sequence[int]) -> HubDataset:
        """Return the dataset of some of the rows, by number, with the classes of the complete one."""
        part = copy.copy(self)
        part.rng, part.rows = SampleRNG(self.rng.seed), [self.rows[i] for i in rows]
        part.labels = [self.labels[i] for i in rows] if self.label else []
        return part

    def without_augmentation(self) -> HubDataset:
        """Return the dataset with centre crops and without random changes; the windows of clips stay random."""
        part = copy.copy(self)
        part.rng, part.config = SampleRNG(self.rng.seed), unaugmented(self.config)
        part.resize_crop = make_resize_crop(self.shape[-2:], part.config)
        part.clip_sampler = ClipSampler(self.shape[1], part.config) if self.clip_sampler else None
        return part

    def use_classes(self, classes: list[str]) -> None:
        """Number the classes as in other data, `classes`; rows without class get label -1."""
        labels = relabel(self.class_names, classes)
        self.classes, self.labels = classes, labels

    def describe(self) -> str:
        """Return a summary in a few lines: rows, classes, clips per epoch."""
        lines = [f"{len(self.rows)} rows of column {self.column}{class_list(self.classes)}"]
        if self.parts_of_row > 1:
            lines.append(f"{counted(len(self), 'clip')} per epoch")
        if not self.label and (numbers := self.whole_numbers):
            lines.append(f"no labels; integer columns: {', '.join(numbers)}; --label-column {numbers[0]} uses one")
        return "\n".join(lines)


def kind_of_hub(path: str | os.PathLike[str], options: DataConfig) -> str:
    """Return "image" or "video", depending on the types of the columns. Raises `UsageError` if there are both."""
    table = load_table(os.fspath(path))
    if options.image_column is not None:
        feature = table.features[_existing(table, options.image_column, path)]
        if type(feature).__name__ in ("Image", "Video"):
            return "image" if type(feature).__name__ == "Image" else "video"
        paths = (value for value in table[options.image_column] if isinstance(value, str))
        return "video" if next(paths, "").lower().endswith(CLIP_EXTENSIONS) else "image"
    images, videos = columns_of(table, "Image"), columns_of(table, "Video")
    if images and videos:
        raise UsageError(
            f"{os.fspath(path)} has images ({images[0]}) and clips ({videos[0]}): choose the clips (--frames 16) or "
            "the images (--frames 0)"
        )
    return "video" if videos else "image"


def columns_of(table: Any, kind: str) -> list[str]:
    """Return the names of the columns of a type."""
    return [name for name, feature in table.features.items() if type(feature).__name__ == kind]


def _existing(table: Any, name: str, path: str | os.PathLike[str]) -> str:
    if name not in table.features:
        raise UsageError(f"{os.fspath(path)} has no column {name}: it has {_types(table)}")
    return name


def _types(table: Any) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())


def _refuse_unsupported(path: str | os.PathLike[str], options: DataConfig) -> None:
    """Raise `UsageError` for options that require every clip to be indexed before the first is drawn."""
    default = DataConfig()
    for name in ("buckets", "avoid_cuts", "sampling"):
        if (value := getattr(options, name)) != getattr(default, name):
            raise UsageError(
                f"{os.fspath(path)}: data.{name}={value} requires folders or shards, whose files are indexed first: "
                "leave it out"
            )


def import_hub() -> Any:
    """Import and return the package `datasets`; raise `UsageError` if it is missing, or shadowed by a folder."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"this needs the Hugging Face package: pip install 'rin-video[hub]' ({error})") from error
    if not hasattr(datasets, "load_dataset"):
        raise UsageError(
            f"`datasets` is {getattr(datasets, '__path__', datasets)}, not the Hugging Face package: "
            "run rin-video from another folder"
        )
    return datasets


def load_table(name: str) -> Any:
    """Load the table `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME:CONFIGURATION:SPLIT` or a saved folder.

    If there are several splits, train is used, or the first one. Raises `UsageError` if it cannot be loaded.
    """
    found = _load_any(name)
    if isinstance(found, dict):
        return found["train" if "train" in found else next(iter(found))]
    return found


def split_names(name: str) -> list[str]:
    """Return the names of the splits of `hf:NAME` or a saved folder; empty if it is, or names, a single one."""
    found = _load_any(name)
    return list(found) if isinstance(found, dict) else []


def _load_any(name: str) -> Any:
    import_hub()
    files = [Path(name, file) for file in ("state.json", "dataset_dict.json")]
    return _load(name, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=4)
def _load(name: str, modified: tuple[int, ...]) -> Any:
    hub = import_hub()
    try:
        if not name.startswith(HUB):
            return hub.load_from_disk(name)
        repo, *rest = name[len(HUB) :].split(":")
        *configurations, split = rest or [""]
        if len(configurations) > 1:
            raise ValueError("write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT")
        return hub.load_dataset(repo, *configurations, split=split or None, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or repr(error)
        advice = f": write {name.split(':')[0]}:{name.split(':')[1]}:NAME:train" if "onfig name" in reason else ""
        raise UsageError(f"{name} cannot be loaded: {reason}{advice}") from error
