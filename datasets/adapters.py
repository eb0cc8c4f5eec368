"""Data sets of any usual form as the ones that training draws from: `draw(index, epoch)` gives {"x", "label"}."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from rin_video.datasets.buckets import Buckets
from rin_video.datasets.epochs import SampleDataset, name_of
from rin_video.datasets.folders import sort_classes
from rin_video.datasets.reading import to_pixels
from rin_video.errors import DatasetError, UsageError
from rin_video.labels import check_labels

log = logging.getLogger("rin_video")

# Keys of a sample that is a dict: ours, those of Hugging Face and its processors, of WebDataset, of torchvision.
X_KEYS = (
    "x", "image", "pixel_values", "img", "images", "video", "frames", "clip", "pixels", "png", "jpg", "jpeg", "webp",
    "npy",
)  # fmt: skip
LABEL_KEYS = ("label", "labels", "class", "cls", "target", "targets")
FIRST_BATCHES = 8  # of a run, whose values are looked at
OVERSHOOT = 0.1  # of [0, 1], which bicubic resizing leaves behind
ALMOST_BLACK = 1.5 / 255


def adapt(data: Any, shapes: Sequence[tuple[int, ...]] = (), *, any_size: bool = True) -> Dataset[dict[str, Any]]:
    """A user's data set as one whose items are {"x": (C, *grid), "label": number or -1} and perhaps "embedding".

    It has a length and gives items by number: a `Dataset`, a list, a tensor or an array. An item is x alone, a tuple
    that begins with it, or a dict with one of `X_KEYS`; x is a tensor, an array or a picture of Pillow (a clip: a list
    of them), its channels first, last or, of clips, second. `shapes` are those that the model takes, and with
    `any_size` other sizes too. `Subset` and `ConcatDataset` hand epochs and classes on to the sets within. Of a
    `DataLoader` its data set is taken. Raises `UsageError` for what cannot be drawn from in any order.
    """
    if isinstance(data, SampleDataset):
        return data
    if isinstance(data, DataLoader):
        log.warning(
            "the DataLoader's data set is taken; its batch size, order and collate_fn are not: set train_batch_size"
        )
        return adapt(data.dataset, shapes, any_size=any_size)
    if isinstance(data, Mapping):
        raise UsageError(f"the data is a dict of {', '.join(map(str, data))}: give one of these, data[...]")
    length, name = _length(data), type(data).__name__
    if length is None or isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise UsageError(
            f"a {name} only gives one sample after the other, and training draws them in any order, so that a run goes "
            "on exactly where it stopped: give a Dataset with a length (list(...) where it fits into memory), a "
            "folder, shards 'x/{000..123}.tar', or hf:NAME"
        )
    if not length:
        raise UsageError(f"the {name} is empty: give at least one sample")
    if isinstance(data, Subset) and type(data).__getitem__ is Subset.__getitem__:
        return Part(adapt(data.dataset, shapes, any_size=any_size), data.indices)
    if isinstance(data, ConcatDataset) and type(data).__getitem__ is ConcatDataset.__getitem__:
        parts = [part for part in data.datasets if _length(part)]
        return Joined([adapt(part, shapes, any_size=any_size) for part in parts])
    return Adapted(data, shapes, any_size=any_size)


def adapt_for(diffusion: Any, data: Any) -> Dataset[dict[str, Any]]:
    """A data set of a user's own, for this model: see `adapt`."""
    model = diffusion.model
    shapes = getattr(model, "shapes", None) or [shape for shape in (diffusion.shape,) if shape is not None]
    position = getattr(getattr(model, "config", None), "position", "coordinate")
    return adapt(data, shapes, any_size=position in ("sincos", "coordinate"))


class Adapted(SampleDataset):
    """A data set of a user's own. Raises `DatasetError` for items of no known form, shape or type."""

    def __init__(self, dataset: Any, shapes: Sequence[tuple[int, ...]] = (), *, any_size: bool = True) -> None:
        self.dataset, self.shapes, self.any_size = dataset, [tuple(shape) for shape in shapes], any_size
        self.classes = class_names(dataset)
        self.first_shape: tuple[int, ...] | None = None
        self.epoch: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(index, 0)

    def draw(self, index: int, epoch: int) -> dict[str, Any]:
        """The item as a given epoch draws it, where the data set has `draw(index, epoch)` or `set_epoch(epoch)`."""
        index = range(len(self))[index]
        own = getattr(self.dataset, "draw", None)
        if own is None and epoch != self.epoch:
            getattr(self.dataset, "set_epoch", lambda epoch: None)(epoch)
            self.epoch = epoch
        x, label, embedding = self._parts(self.dataset[index] if own is None else own(index, epoch), index)
        item = {"x": self._fitted(self._tensor(x, index), index), "label": self._label(label, index)}
        return item if embedding is None else {**item, "embedding": torch.as_tensor(embedding)}

    def name_of(self, index: int) -> str:
        return name_of(self.dataset, index)

    def _parts(self, item: Any, index: int) -> tuple[Any, Any, Any]:
        """(x, label, embedding) of an item of any form."""
        if isinstance(item, Mapping):
            key = next((key for key in X_KEYS if key in item), None)
            if key is None:
                keys = ", ".join(map(str, item)) or "nothing"
                raise DatasetError(f"{self.name_of(index)} is a dict of {keys}: name its data x or image")
            label = next((item[key] for key in LABEL_KEYS if key in item), None)
            return item[key], label, item.get("embedding")
        if isinstance(item, list | tuple) and item and not all(map(_is_picture, item)):
            x, *rest = item
            labels = sorted(filter(_is_label, rest), key=lambda part: isinstance(part, str))  # numbers before text
            return x, labels[0] if labels else None, None
        return item, None, None

    def _tensor(self, x: Any, index: int) -> Tensor:
        """uint8, or float32."""
        channels = self.shapes[0][0] if self.shapes else 3
        if _is_picture(x):
            return to_pixels(x, channels, self.name_of(index))
        if isinstance(x, list | tuple) and x and all(map(_is_picture, x)):
            frames = [to_pixels(frame, channels, self.name_of(index)) for frame in x]
            if len({frame.shape for frame in frames}) > 1:
                raise DatasetError(f"{self.name_of(index)} has frames of several sizes: resize them in the data set")
            return torch.stack(frames, dim=1)
        if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
            x = torch.from_numpy(np.ascontiguousarray(x.astype(x.dtype.newbyteorder("="), copy=False)))
        if not isinstance(x, Tensor) or x.is_complex():
            hint = "give the Trainer the folder" if isinstance(x, str) else "decode it in the data set"
            hint = hint if isinstance(x, str | bytes) else "give a tensor (C, *grid), an array or a picture"
            raise DatasetError(f"{self.name_of(index)} is {_kind(x)}: {hint}")
        if x.dtype == torch.uint8 or x.dtype == torch.float32:
            return x
        if x.is_floating_point() or x.dtype == torch.bool:
            return x.float()
        low, high = int(x.min()), int(x.max())
        if low < 0 or high > 255:
            raise DatasetError(
                f"{self.name_of(index)} holds whole numbers from {low} to {high}: give 0 to 255, or floats in [0, 1]"
            )
        return x.to(torch.uint8)

    def _fitted(self, x: Tensor, index: int) -> Tensor:
        """Channels first, of a shape that the model takes and that goes into a batch with the others."""
        forms = _forms(x)
        exact = next((form for form in forms if tuple(form.shape) in self.shapes), None)
        alike = [f for f in forms for shape in self.shapes if f.ndim == len(shape) and f.shape[0] == shape[0]]
        if exact is None and self.shapes and not (alike and self.any_size):
            raise DatasetError(
                f"{self.name_of(index)} is {_times(x.shape)}, the model takes {' or '.join(map(_times, self.shapes))}: "
                "resize and crop it in the data set (torchvision's Resize, CenterCrop), or give the Trainer the folder"
            )
        found = exact if exact is not None else alike[0] if alike else x
        self.first_shape = self.first_shape or tuple(found.shape)
        if len(found.shape) == len(self.first_shape) and tuple(found.shape) != self.first_shape:
            raise DatasetError(
                f"{self.name_of(index)} is {_times(found.shape)}, another one {_times(self.first_shape)}: those of a "
                "batch have one size. Resize and crop them in the data set (torchvision's Resize, CenterCrop)"
            )
        return found.contiguous()

    def _label(self, label: Any, index: int) -> Any:
        """A number, weights of all classes (num_classes), or -1 for none."""
        if label is None:
            return -1
        if isinstance(label, str):
            if label in self.classes:
                return self.classes.index(label)
            if self.classes:
                raise DatasetError(f"{self.name_of(index)} has the label {label!r}, which is none of the classes")
            _say_once("samples come with text, which is not trained on: captions are files, see data.text_encoder")
            return -1
        if isinstance(label, list | tuple) or (isinstance(label, np.ndarray | Tensor) and math.prod(label.shape) > 1):
            return torch.as_tensor(label)
        number = float(label.item() if hasattr(label, "item") else label)
        if number != int(number):
            raise DatasetError(f"{self.name_of(index)} has the label {number:g}: labels are whole numbers")
        return int(number)


class Part(SampleDataset):
    """Some samples of a data set, as `Subset` and `random_split` choose them."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, [int(index) for index in indices]
        self.classes, self.embeddings = dataset.classes, getattr(dataset, "embeddings", None)
        self.buckets = getattr(dataset, "buckets", None)
        buckets = getattr(dataset, "bucket_of", None)
        self.bucket_of = None if buckets is None else [buckets[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.indices[index]]

    def draw(self, index: int, epoch: int) -> dict[str, Any]:
        """The item as a given epoch draws it."""
        return draw(self.dataset, self.indices[index], epoch)

    def name_of(self, index: int) -> str:
        return self.dataset.name_of(self.indices[index])


class Joined(SampleDataset):
    """Several data sets one after the other, as `ConcatDataset` puts them; classes are joined by name.

    A part without class names keeps its numbers where no part has names, and is trained on without labels else.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts]).tolist()
        lists = [part.classes for part in parts]
        self.classes = lists[0] if all(names == lists[0] for names in lists) else sort_classes({*chain(*lists)})
        self.renumber = [[self.classes.index(name) for name in names] for names in lists]
        self.buckets: Buckets | None = getattr(parts[0], "buckets", None)
        shapes = [list(getattr(getattr(part, "buckets", None), "shapes", ())) for part in parts]
        if any(each != shapes[0] for each in shapes):
            raise UsageError("the parts of the ConcatDataset have different buckets: give all of them the same")
        self.bucket_of = [bucket for part in parts for bucket in part.bucket_of] if shapes[0] else None

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, place = self.place_of(index)
        return self._renumbered(part, self.parts[part][place])

    def draw(self, index: int, epoch: int) -> dict[str, Any]:
        """The item as a given epoch draws it."""
        part, place = self.place_of(index)
        return self._renumbered(part, draw(self.parts[part], place, epoch))

    def place_of(self, index: int) -> tuple[int, int]:
        """Which part an index is of, and its index there."""
        index = range(len(self))[index]
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def name_of(self, index: int) -> str:
        part, place = self.place_of(index)
        return self.parts[part].name_of(place)

    def _renumbered(self, part: int, item: dict[str, Any]) -> dict[str, Any]:
        if not self.classes or self.parts[part].classes == self.classes:
            return item
        numbers, label = self.renumber[part], item["label"]
        if numbers:
            check_label_number(label, len(numbers), self.parts[part].name_of)
        return {**item, "label": numbers[label] if numbers and label >= 0 else -1}


ADAPTED = (Adapted, Part, Joined)


class BatchCheck:
    """Looks at batches on the CPU before training sees them: at all labels, and at the values of the first few."""

    def __init__(self, num_classes: int, classes: Sequence[str] = ()) -> None:
        self.num_classes, self.classes = num_classes, classes
        self.left = FIRST_BATCHES
        self.low, self.high, self.labelled = float("inf"), float("-inf"), False

    def __call__(self, x: Tensor, label: Tensor | None) -> None:
        """Raises `UsageError` for labels that the model does not have, and for values far outside [0, 1]."""
        if self.num_classes:
            check_labels(label, len(x), self.num_classes, self.classes)
        elif self.left == FIRST_BATCHES and label is not None and (label >= 0).any():
            log.warning("the data has labels, and the model no classes: labels are left out (RIN(num_classes=N) has)")
        if not self.left:
            return
        self.left -= 1
        low, high = (float(value) / (255 if x.dtype == torch.uint8 else 1) for value in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.labelled = self.labelled or (label is not None and bool((label >= 0).any()))
        found = f"the values of the first batches go from {self.low:.3g} to {self.high:.3g}"
        if self.low < -OVERSHOOT or self.high > 1 + OVERSHOOT:
            normalized = self.low < -OVERSHOOT or self.high <= 2
            advice = "leave out Normalize, or give (x + 1) / 2" if normalized else "divide by 255, or give uint8"
            raise UsageError(f"{found}, training takes [0, 1]: {advice}")
        if self.left:
            return
        if self.low < 0 or self.high > 1:
            log.warning("%s: a little outside [0, 1], trained on as they are", found)
        if 0 < self.high <= ALMOST_BLACK:
            log.warning("%s: almost black. Whole numbers are 0 to 255, floats 0 to 1: was it divided twice?", found)
        if self.num_classes and not self.labelled:
            log.warning("the model has %d classes, and no sample of the first batches has a label", self.num_classes)


def draw(dataset: Any, index: int, epoch: int) -> Any:
    """An item as an epoch draws it; of a data set without `draw`, the item."""
    own = getattr(dataset, "draw", None)
    return own(index, epoch) if own else dataset[index]


def class_names(dataset: Any) -> list[str]:
    """The names of a data set's classes: its `classes`, or those of a ClassLabel of Hugging Face; else none."""
    names = getattr(dataset, "classes", None)
    if names is None and isinstance(features := getattr(dataset, "features", None), Mapping):
        names = next((features[key].names for key in LABEL_KEYS if hasattr(features.get(key), "names")), None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def check_label_number(label: Any, num_classes: int, name_of: Any) -> None:
    """Raises `DatasetError` for a number outside -1 to `num_classes` - 1, in a part of a larger data set."""
    if not isinstance(label, int) or not -1 <= label < num_classes:
        raise DatasetError(f"a sample beside {name_of(0)} has the label {label}, and there are {num_classes} classes")


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _is_picture(x: Any) -> bool:
    return hasattr(x, "getbands") and hasattr(x, "convert")  # a picture of Pillow, which need not be imported for it


def _is_label(part: Any) -> bool:
    if isinstance(part, np.ndarray | Tensor):
        return part.ndim <= 1
    return isinstance(part, str | int | float | np.generic)


def _forms(x: Tensor) -> list[Tensor]:
    """x as it is, with a channel where it has none, with its last axis first, and (F, C, H, W) as (C, F, H, W)."""
    forms = [x, x[None]]
    forms += [x.movedim(-1, 0)] if x.ndim >= 3 else []
    return forms + ([x.transpose(0, 1)] if x.ndim == 4 else [])


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _kind(x: Any) -> str:
    text = repr(x) if isinstance(x, str | bytes) else ""
    return f"of type {type(x).__name__}" + (f" ({text[:60]})" if text else "")


def _say_once(text: str) -> None:
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        _log_once(text)


@lru_cache(maxsize=64)
def _log_once(text: str) -> None:
    log.warning("%s", text)
