"""Adapters that convert any common kind of dataset to a `SampleDataset`, whose items are {"x", "label"}."""

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

# Keys of dict samples: ours, and those of Hugging Face and its processors, WebDataset and torchvision.
X_KEYS = (
    "x", "image", "pixel_values", "img", "images", "video", "frames", "clip", "pixels", "png", "jpg", "jpeg", "webp",
    "npy",
)  # fmt: skip
LABEL_KEYS = ("label", "labels", "class", "cls", "target", "targets")
FIRST_BATCHES = 8  # number of batches at the start of a run whose values are checked
OVERSHOOT = 0.1  # tolerated distance from [0, 1], as caused by bicubic resizing
ALMOST_BLACK = 1.5 / 255


def adapt(data: Any, shapes: Sequence[tuple[int, ...]] = (), *, any_size: bool = True) -> Dataset[dict[str, Any]]:
    """Convert a dataset to one with items {"x": (C, *grid), "label": number or -1}, optionally "embedding".

    `data` must have a length and be indexable: a `Dataset`, a list, a tensor or an array. An item is x alone, a tuple
    that begins with x, or a dict with one of `X_KEYS`. x is a tensor, an array or a Pillow image (for a clip, a list of
    them), with channels first, last or, for clips, second. `shapes` are the shapes of the model; `any_size` also allows
    other sizes. `Subset` and `ConcatDataset` keep the epochs and classes of the datasets that they contain. A
    `DataLoader` is replaced by its dataset. Raises `UsageError` if `data` cannot be indexed in any order.
    """
    if isinstance(data, SampleDataset):
        return data
    if isinstance(data, DataLoader):
        log.warning(
            "only the DataLoader's dataset is used, not its batch size, order and collate_fn: set train_batch_size"
        )
        return adapt(data.dataset, shapes, any_size=any_size)
    if isinstance(data, Mapping):
        raise UsageError(f"the data is a dict of {', '.join(map(str, data))}: pass one of them, data[...]")
    length, name = _length(data), type(data).__name__
    if length is None or isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise UsageError(
            f"a {name} only iterates in one order, but training needs random access, so that a run can be resumed "
            "exactly: pass a Dataset with a length (list(...) if it fits into memory), a folder, shards "
            "'x/{000..123}.tar', or hf:NAME"
        )
    if not length:
        raise UsageError(f"the {name} is empty: pass at least one sample")
    if isinstance(data, Subset) and type(data).__getitem__ is Subset.__getitem__:
        return Part(adapt(data.dataset, shapes, any_size=any_size), data.indices)
    if isinstance(data, ConcatDataset) and type(data).__getitem__ is ConcatDataset.__getitem__:
        parts = [part for part in data.datasets if _length(part)]
        return Joined([adapt(part, shapes, any_size=any_size) for part in parts])
    return Adapted(data, shapes, any_size=any_size)


def adapt_for(diffusion: Any, data: Any) -> Dataset[dict[str, Any]]:
    """Adapt a dataset to the shapes of a model: see `adapt`."""
    model = diffusion.model
    shapes = getattr(model, "shapes", None) or [shape for shape in (diffusion.shape,) if shape is not None]
    position = getattr(getattr(model, "config", None), "position", "coordinate")
    return adapt(data, shapes, any_size=position in ("sincos", "coordinate"))


class Adapted(SampleDataset):
    """An adapter for a user's dataset: see `adapt`.

    Raises `DatasetError` when an item is drawn whose format, shape or type is not supported.
    """

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
        """Return item `index` of an epoch, for which it calls the dataset's `draw(index, epoch)` or `set_epoch(epoch)`.

        Raises `DatasetError` if the item is not supported.
        """
        index = range(len(self))[index]
        own = getattr(self.dataset, "draw", None)
        if own is None and epoch != self.epoch:
            getattr(self.dataset, "set_epoch", lambda epoch: None)(epoch)
            self.epoch = epoch
        x, label, embedding = self._parts(self.dataset[index] if own is None else own(index, epoch), index)
        item = {"x": self._fitted(self._tensor(x, index), index), "label": self._label(label, index)}
        return item if embedding is None else {**item, "embedding": torch.as_tensor(embedding)}

    def group_of(self, index: int) -> int:
        """Return the number of the item's file by the dataset's `group_of`, or else that of the item."""
        own = getattr(self.dataset, "group_of", None)
        return int(own(index)) if own else index

    def name_of(self, index: int) -> str:
        """Return the name of an item: by the dataset's `name_of`, its `files`, or "sample N"."""
        return name_of(self.dataset, index)

    def _parts(self, item: Any, index: int) -> tuple[Any, Any, Any]:
        """Return (x, label, embedding) of an item of any supported form."""
        if isinstance(item, Mapping):
            key = next((key for key in X_KEYS if key in item), None)
            if key is None:
                keys = ", ".join(map(str, item)) or "nothing"
                raise DatasetError(f"{self.name_of(index)} is a dict of {keys}: name its data x or image")
            label = next((item[key] for key in LABEL_KEYS if key in item), None)
            return item[key], label, item.get("embedding")
        if isinstance(item, list | tuple) and item and not all(map(_is_picture, item)):
            x, *rest = item
            labels = sorted(
                filter(_is_label, rest), key=lambda part: isinstance(part, str)
            )  # numbers take precedence over text
            return x, labels[0] if labels else None, None
        return item, None, None

    def _tensor(self, x: Any, index: int) -> Tensor:
        """Convert x to a uint8 or float32 tensor."""
        channels = self.shapes[0][0] if self.shapes else 3
        if _is_picture(x):
            return to_pixels(x, channels, self.name_of(index))
        if isinstance(x, list | tuple) and x and all(map(_is_picture, x)):
            frames = [to_pixels(frame, channels, self.name_of(index)) for frame in x]
            if len({frame.shape for frame in frames}) > 1:
                raise DatasetError(f"{self.name_of(index)} has frames of several sizes: resize them in the dataset")
            return torch.stack(frames, dim=1)
        if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
            x = torch.from_numpy(np.ascontiguousarray(x.astype(x.dtype.newbyteorder("="), copy=False)))
        if not isinstance(x, Tensor) or x.is_complex():
            hint = "pass the folder to the Trainer" if isinstance(x, str) else "decode it in the dataset"
            hint = hint if isinstance(x, str | bytes) else "return a tensor (C, *grid), an array or a Pillow image"
            raise DatasetError(f"{self.name_of(index)} is {_type_text(x)}: {hint}")
        if x.dtype == torch.uint8 or x.dtype == torch.float32:
            return x
        if x.is_floating_point() or x.dtype == torch.bool:
            return x.float()
        low, high = int(x.min()), int(x.max())
        if low < 0 or high > 255:
            raise DatasetError(
                f"{self.name_of(index)} has integers from {low} to {high}: return 0 to 255, or floats in [0, 1]"
            )
        return x.to(torch.uint8)

    def _fitted(self, x: Tensor, index: int) -> Tensor:
        """Return x with channels first, in a shape that fits the model and the other samples of a batch."""
        forms = _layouts(x)
        exact = next((form for form in forms if tuple(form.shape) in self.shapes), None)
        alike = [f for f in forms for shape in self.shapes if f.ndim == len(shape) and f.shape[0] == shape[0]]
        if exact is None and self.shapes and not (alike and self.any_size):
            raise DatasetError(
                f"{self.name_of(index)} is {_size(x.shape)}, the model takes {' or '.join(map(_size, self.shapes))}: "
                "resize and crop it in the dataset (torchvision's Resize, CenterCrop), or pass a folder to the Trainer"
            )
        found = exact if exact is not None else alike[0] if alike else x
        self.first_shape = self.first_shape or tuple(found.shape)
        if len(found.shape) == len(self.first_shape) and tuple(found.shape) != self.first_shape:
            raise DatasetError(
                f"{self.name_of(index)} is {_size(found.shape)}, another sample {_size(self.first_shape)}: a batch "
                "requires equal sizes. Resize and crop them in the dataset (torchvision's Resize, CenterCrop)"
            )
        return found.contiguous()

    def _label(self, label: Any, index: int) -> Any:
        """Convert a label to a number, to weights (num_classes), or to -1 if there is none."""
        if label is None:
            return -1
        if isinstance(label, str):
            if label in self.classes:
                return self.classes.index(label)
            if self.classes:
                raise DatasetError(f"{self.name_of(index)} has the label {label!r}, which is none of the classes")
            _warn_once("the text of the samples is ignored: captions must be files, see data.text_encoder")
            return -1
        if isinstance(label, list | tuple) or (isinstance(label, np.ndarray | Tensor) and math.prod(label.shape) > 1):
            return torch.as_tensor(label)
        number = float(label.item() if hasattr(label, "item") else label)
        if number != int(number):
            raise DatasetError(f"{self.name_of(index)} has the label {number:g}: labels must be integers")
        return int(number)


class Part(SampleDataset):
    """A subset of a dataset, as made by `Subset` and `random_split`."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, [int(index) for index in indices]
        self.classes, self.embeddings = list(getattr(dataset, "classes", [])), getattr(dataset, "embeddings", None)
        self.buckets = getattr(dataset, "buckets", None)
        buckets = getattr(dataset, "bucket_of", None)
        self.bucket_of = None if buckets is None else [buckets[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.indices[index]]

    def draw(self, index: int, epoch: int) -> dict[str, Any]:
        """Return item `index` of an epoch."""
        return draw(self.dataset, self.indices[index], epoch)

    def name_of(self, index: int) -> str:
        """Return the name of an item."""
        return self.dataset.name_of(self.indices[index])

    def select(self, items: Sequence[int]) -> Part:
        """Return the dataset of some of the items, by number."""
        return Part(self.dataset, [self.indices[item] for item in items])

    def without_augmentation(self) -> Part:
        """Return the same part of the dataset without random changes of its samples, if it can leave them out."""
        return Part(without_augmentation(self.dataset), self.indices)

    def group_of(self, index: int) -> int:
        """Return the number of the item's file in the complete dataset."""
        return int(self.dataset.group_of(self.indices[index]))


class Joined(SampleDataset):
    """The concatenation of datasets, as made by `ConcatDataset`; their classes are merged by name.

    If no part has class names, the label numbers are kept. Otherwise a part without class names gets no labels. Raises
    `UsageError` if the parts have different buckets.
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
            raise UsageError("the parts of the ConcatDataset have different buckets: use the same for all")
        self.bucket_of = [bucket for part in parts for bucket in part.bucket_of] if shapes[0] else None

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, place = self.place_of(index)
        return self._renumbered(part, self.parts[part][place])

    def draw(self, index: int, epoch: int) -> dict[str, Any]:
        """Return item `index` of an epoch."""
        part, place = self.place_of(index)
        return self._renumbered(part, draw(self.parts[part], place, epoch))

    def place_of(self, index: int) -> tuple[int, int]:
        """Return the part of an index, and the index in that part."""
        index = range(len(self))[index]
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def name_of(self, index: int) -> str:
        """Return the name of an item."""
        part, place = self.place_of(index)
        return self.parts[part].name_of(place)

    def without_augmentation(self) -> Joined:
        """Return the same parts without random changes of their samples, if they can leave them out."""
        return Joined([without_augmentation(part) for part in self.parts])

    def group_of(self, index: int) -> int:
        """Return the number of the item's file; the files of a part come after those of the parts before it."""
        part, place = self.place_of(index)
        return (self.ends[part - 1] if part else 0) + int(self.parts[part].group_of(place))

    def _renumbered(self, part: int, item: dict[str, Any]) -> dict[str, Any]:
        if not self.classes or self.parts[part].classes == self.classes:
            return item
        numbers, label = self.renumber[part], item["label"]
        if numbers:
            check_label_number(label, len(numbers), self.parts[part].name_of)
        return {**item, "label": numbers[label] if numbers and label >= 0 else -1}


ADAPTED = (Adapted, Part, Joined)


class BatchCheck:
    """Checks the labels of all batches, and the values of the first batches, on the CPU before training uses them."""

    def __init__(self, num_classes: int, classes: Sequence[str] = ()) -> None:
        self.num_classes, self.classes = num_classes, classes
        self.left = FIRST_BATCHES
        self.low, self.high, self.labelled = float("inf"), float("-inf"), False

    def __call__(self, x: Tensor, label: Tensor | None) -> None:
        """Raise `UsageError` if labels are not classes of the model, or values are far outside [0, 1]."""
        if self.num_classes:
            check_labels(label, len(x), self.num_classes, self.classes)
        elif self.left == FIRST_BATCHES and label is not None and (label >= 0).any():
            log.warning("the labels of the data are ignored, because the model has no classes: see RIN(num_classes=N)")
        if not self.left:
            return
        self.left -= 1
        low, high = (float(value) / (255 if x.dtype == torch.uint8 else 1) for value in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.labelled = self.labelled or (label is not None and bool((label >= 0).any()))
        found = f"the values of the first batches range from {self.low:.3g} to {self.high:.3g}"
        if self.low < -OVERSHOOT or self.high > 1 + OVERSHOOT:
            normalized = self.low < -OVERSHOOT or self.high <= 2
            advice = "leave out Normalize, or return (x + 1) / 2" if normalized else "divide by 255, or return uint8"
            raise UsageError(f"{found}, but training requires [0, 1]: {advice}")
        if self.left:
            return
        if self.low < 0 or self.high > 1:
            log.warning("%s, slightly outside [0, 1]; they are used unchanged", found)
        if 0 < self.high <= ALMOST_BLACK:
            log.warning(
                "%s: almost black. Integers are 0 to 255, floats 0 to 1: were they divided by 255 twice?", found
            )
        if self.num_classes and not self.labelled:
            log.warning("the model has %d classes, but no sample of the first batches has a label", self.num_classes)


def draw(dataset: Any, index: int, epoch: int) -> Any:
    """Return item `index` of an epoch, or `dataset[index]` if the dataset has no `draw`."""
    own = getattr(dataset, "draw", None)
    return own(index, epoch) if own else dataset[index]


def without_augmentation(dataset: Any) -> Any:
    """Return a dataset without random changes of its samples; a dataset that cannot leave them out is unchanged."""
    own = getattr(dataset, "without_augmentation", None)
    return own() if own else dataset


def class_names(dataset: Any) -> list[str]:
    """Return a dataset's class names: its `classes`, or those of a Hugging Face ClassLabel; otherwise none."""
    names = getattr(dataset, "classes", None)
    if names is None and isinstance(features := getattr(dataset, "features", None), Mapping):
        names = next((features[key].names for key in LABEL_KEYS if hasattr(features.get(key), "names")), None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def check_label_number(label: Any, num_classes: int, name_of: Any) -> None:
    """Raise `DatasetError` if a label of a part of a dataset is not in -1 to `num_classes` - 1."""
    if not isinstance(label, int) or not -1 <= label < num_classes:
        raise DatasetError(f"a sample next to {name_of(0)} has the label {label}, but there are {num_classes} classes")


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _is_picture(x: Any) -> bool:
    return hasattr(x, "getbands") and hasattr(x, "convert")  # a Pillow image, checked without importing Pillow


def _is_label(part: Any) -> bool:
    if isinstance(part, np.ndarray | Tensor):
        return part.ndim <= 1
    return isinstance(part, str | int | float | np.generic)


def _layouts(x: Tensor) -> list[Tensor]:
    """Return x in all supported layouts: unchanged, with a channel axis, last axis first, axes 0 and 1 swapped."""
    forms = [x, x[None]]
    forms += [x.movedim(-1, 0)] if x.ndim >= 3 else []
    return forms + ([x.transpose(0, 1)] if x.ndim == 4 else [])


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _type_text(x: Any) -> str:
    text = repr(x) if isinstance(x, str | bytes) else ""
    return f"of type {type(x).__name__}" + (f" ({text[:60]})" if text else "")


def _warn_once(text: str) -> None:
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        _log_once(text)


@lru_cache(maxsize=64)
def _log_once(text: str) -> None:
    log.warning("%s", text)
