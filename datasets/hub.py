"""Data sets of the Hugging Face package `datasets`: `hf:NAME[:SPLIT]` from the hub, or a folder of `save_to_disk`."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from rin_video.config import DataConfig
from rin_video.datasets.decoding import open_video, probe_video
from rin_video.datasets.framing import Chance, class_list
from rin_video.datasets.images import make_framing
from rin_video.datasets.reading import read_image
from rin_video.datasets.sources import Buffer
from rin_video.datasets.windows import Windows
from rin_video.errors import UsageError

PREFIX = "hf:"


def is_hub(path: str | os.PathLike[str]) -> bool:
    """`hf:...`, or a folder that the Hugging Face package saved."""
    name = os.fspath(path)
    return name.startswith(PREFIX) or any(
        os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
    )


class HubDataset(Dataset[dict[str, Tensor | int]]):
    """Images or clips of one column; item: `{"x": uint8 (C, H, W) or (C, F, H, W), "label": class or -1}`.

    The first column of type Image or Video is taken, and the first of type ClassLabel. Only `hf:` reaches the network.
    """

    def __init__(
        self, path: str | os.PathLike[str], shape: tuple[int, ...], options: DataConfig, *, seed: int = 0
    ) -> None:
        hub = import_hub()
        table = _load(hub, os.fspath(path))
        self.path, self.shape, self.config, self.chance = path, tuple(shape), options, Chance(seed)
        kind = "Image" if len(shape) == 3 else "Video"
        columns = [name for name, feature in table.features.items() if type(feature).__name__ == kind]
        if len(shape) not in (3, 4) or not columns:
            raise UsageError(
                f"{os.fspath(path)} has no column of type {kind}, the model takes {shape}; it has "
                + ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())
            )
        self.column = columns[0]
        labels = [name for name, feature in table.features.items() if type(feature).__name__ == "ClassLabel"]
        self.label = labels[0] if labels else None
        self.classes = list(table.features[self.label].names) if self.label else []
        # The bytes, not what that package would decode: ours are turned, converted and cut as files are.
        self.table = table.cast_column(self.column, type(table.features[self.column])(decode=False))
        self.framing = make_framing(shape[-2:], options)
        self.windows = Windows(shape[1], options) if len(shape) == 4 else None
        self.skipped: list[tuple[Any, str]] = []

    def set_epoch(self, epoch: int) -> None:
        self.chance.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.draw(index, self.chance.epoch)

    def draw(self, index: int, epoch: int) -> dict[str, Tensor | int]:
        """The item as a given epoch draws it."""
        from torchvision.transforms.v2 import functional as transforms

        index = range(len(self))[index]
        row, chance = self.table[index], self.chance.draw(index, epoch)
        cell = row[self.column]
        content = cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()
        source = Buffer(self.name_of(index) + Path(cell.get("path") or "").suffix, io.BytesIO(content).getvalue())
        label = row[self.label] if self.label else None
        label = -1 if label is None else int(label)
        if self.windows is None:
            image = read_image(source, self.shape[0], at_least=self.framing.size, max_pixels=self.config.max_pixels)
            return {"x": self.framing(image, chance), "label": label}
        info = probe_video(source, max_pixels=self.config.max_pixels)
        self.windows.check(source, info)
        indices = self.windows.draw(info, 0, 1, chance)
        frame = self.framing.plan(info.size, chance)
        with open_video(source, self.config.decoder, info) as video:
            frames = self.framing.cut(video.read(indices, frame.size), frame)
        if self.shape[0] == 1:
            frames = transforms.rgb_to_grayscale(frames)
        return {"x": frames.transpose(0, 1).contiguous(), "label": label}

    def name_of(self, index: int) -> str:
        return f"{os.fspath(self.path)}[{index}]"

    def describe(self) -> str:
        return f"{len(self)} rows of column {self.column}{class_list(self.classes)}"


def import_hub() -> Any:
    """The Hugging Face package, not a folder of that name. UsageError where it is not there, or not it."""
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


def _load(hub: Any, name: str) -> Any:
    try:
        if not name.startswith(PREFIX):
            table = hub.load_from_disk(name)
        else:
            name, _, split = name[len(PREFIX) :].partition(":")
            table = hub.load_dataset(name, split=split or None, trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"{name} cannot be loaded: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if isinstance(table, dict):
        split = "train" if "train" in table else next(iter(table))
        return table[split]
    return table
