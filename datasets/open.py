"""Opening of a folder, shards, arrays or a hub dataset as the dataset that fits the shape of a model."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from rin_video.config import DataConfig
from rin_video.datasets.arrays import ArrayFolder
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.embeddings import embedding_shape
from rin_video.datasets.folders import detect_kind
from rin_video.datasets.held_out import split_by_share
from rin_video.datasets.hub import HubDataset, is_hub
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.mixed import MixedDataset
from rin_video.datasets.sources import shown
from rin_video.datasets.splits import find_splits
from rin_video.errors import UsageError
from rin_video.wording import counted

log = logging.getLogger("rin_video")

INDEX = "index.jsonl"  # in the folder of a run

Opened: TypeAlias = ImageFolder | ClipFolder | ArrayFolder | HubDataset | MixedDataset
Split: TypeAlias = Literal["train", "validation", "all"]


class Sides(NamedTuple):
    """The dataset to train on, that to validate on (None without held-out data), and a line about the latter."""

    train: Opened
    validation: Opened | None
    note: str = ""


def open_dataset(
    path: str | os.PathLike[str],
    shape: tuple[int, ...] | None,
    options: DataConfig,
    *,
    seed: int = 0,
    index: Path | None = None,
) -> Opened:
    """Open data of the sample shape `shape`: images (C, H, W), clips (C, F, H, W), or arrays of any shape.

    With `options.images`, clips are mixed with images. If the data has splits, the one for training is opened;
    `options.validation` has no effect. `index` is a file that caches the properties of the data between runs. Raises
    `UsageError` if the data does not fit the shape or the options.
    """
    return open_sides(path, shape, replace(options, validation=None), seed=seed, index=index, validate=False).train


def open_split(
    path: str | os.PathLike[str],
    shape: tuple[int, ...] | None,
    options: DataConfig,
    split: Split,
    *,
    seed: int = 0,
    index: Path | None = None,
) -> Opened | None:
    """Open one side of the data: what training uses ("train"), what it never uses ("validation"), or "all".

    `options.validation` and the splits in the data determine the sides, the other options only how samples are taken
    from the files: a file is on the same side whatever they are. "all" is the data of `path` before a share of it is
    held out; of data with splits, it is the one for training. Returns None for "validation" if there is no held-out
    data. Raises `UsageError` as `open_sides` does.
    """
    if split == "all":
        return open_dataset(path, shape, options, seed=seed, index=index)
    sides = open_sides(path, shape, options, seed=seed, index=index, validate=split == "validation")
    return sides.train if split == "train" else sides.validation


def open_sides(
    path: str | os.PathLike[str],
    shape: tuple[int, ...] | None,
    options: DataConfig,
    *,
    seed: int = 0,
    index: Path | None = None,
    validate: bool = True,
) -> Sides:
    """Open the data to train on and the held-out data; without `validate`, separate held-out data is not opened.

    `options.validation` is a share of the files or a source of its own. Without it, the split `val` or `test` of the
    data is the held-out data. The validation data has the classes of the training data. Raises `UsageError` as
    `open_dataset` does, and if the held-out data does not fit the training data.
    """
    if options.images is not None:
        return _open_mixture(path, shape, options, seed, index, validate)
    training, found = find_splits(path)
    data = _open(training, shape, options, seed, index)
    return split_sides(data, training, shape, options, found=found, seed=seed, index=index, validate=validate)


def split_sides(
    data: Any,
    training: str,
    shape: tuple[int, ...] | None,
    options: DataConfig,
    *,
    found: str | None = None,
    seed: int = 0,
    index: Path | None = None,
    validate: bool = True,
) -> Sides:
    """Return the sides of open data, whose name is `training`; `found` is its split for validation, if it has one.

    The other arguments and the errors are those of `open_sides`.
    """
    wanted = options.validation
    if isinstance(wanted, float | int):
        train, held = split_by_share(data, wanted, training)
        return Sides(train, held, f"{_count(held)} of {_files(data)} held out (data.validation={wanted:g})")
    own = wanted or found
    if own is None or not validate:
        return Sides(data, None)
    if wanted is not None:
        own = find_splits(own)[1] or own  # the validation part of a dataset with splits
        _check_apart(own, training)
    beside = index.with_name(f"validation-{index.name}") if index else None
    held = _open(own, shape, options, seed, beside)
    held.use_classes(data.classes)
    _check_embeddings(held, data, own)
    _warn_of_copies(held, data)
    note = f"{_files(held)} of {shown(own)}"
    if data.classes and not any(label >= 0 for label in getattr(held, "labels", [])):
        note += ", without labels: it has no folders named as the classes of the training data"
    return Sides(data, held, note)


def _open(
    path: str | os.PathLike[str], shape: tuple[int, ...] | None, options: DataConfig, seed: int, index: Path | None
) -> Opened:
    """Open data of one kind without splits."""
    if shape is None:
        raise UsageError("the model has no fixed shape: pass the Trainer a Dataset instead")
    with_embeddings = options.embeddings or options.text_encoder is not None
    cache = index.parent / "pipes" if index else None
    arrays = not is_hub(path) and (len(shape) not in (3, 4) or holds_arrays(path, options, cache))
    if with_embeddings and (is_hub(path) or arrays):
        raise UsageError(f"{path}: embeddings and captions require folders or shards of clips or images")
    for name in ("image_column", "label_column"):
        if not is_hub(path) and getattr(options, name) is not None:
            raise UsageError(f"{path}: data.{name} requires a Hugging Face dataset, which this is not: leave it out")
    if is_hub(path):
        return HubDataset(path, shape, options, seed=seed)
    if arrays:
        return ArrayFolder(path, shape, index=index, config=options, seed=seed)
    channels, *frames, height, width = shape
    common: dict[str, Any] = {"channels": channels, "seed": seed, "index": index, "config": options}
    if not frames:
        return ImageFolder(path, (height, width), **common)
    return ClipFolder(path, (height, width), frames[0], **common)


def _open_mixture(
    path: str | os.PathLike[str],
    shape: tuple[int, ...] | None,
    options: DataConfig,
    seed: int,
    index: Path | None,
    validate: bool,
) -> Sides:
    """Open clips and images. A share is held out of both; a source of its own for validation has only clips."""
    assert options.images is not None
    if shape is None or len(shape) != 4:
        raise UsageError(
            f"data.images={options.images} is mixed with clips, but the model has shape {shape}: pass --frames, or "
            "pass the images alone as data"
        )
    alone = replace(options, images=None)
    clips = open_sides(path, shape, alone, seed=seed, index=index, validate=validate)
    beside = index.with_name(f"images-{index.name}") if index else None
    still = replace(alone, buckets=[], fps=None, stride=1, span="window", avoid_cuts=False)
    if isinstance(options.validation, str):
        still = replace(still, validation=None)
        validate = False
    images = open_sides(options.images, (shape[0], *shape[2:]), still, seed=seed, index=beside, validate=validate)
    train = MixedDataset(clips.train, images.train, options.image_ratio)
    held: Opened | None = clips.validation or images.validation
    if clips.validation is not None and images.validation is not None:
        held = MixedDataset(clips.validation, images.validation, options.image_ratio)
    if held is not None:
        held.use_classes(train.classes if held.classes else [])
    return Sides(train, held, "; ".join(note for note in (clips.note, images.note) if note))


def holds_arrays(path: str | os.PathLike[str], options: DataConfig, cache: Path | None = None) -> bool:
    """Return whether the data consists of arrays only."""
    try:
        return detect_kind(path, allow_pipe=options.allow_pipe, cache=cache) == "array"
    except UsageError:
        return False


def _files(data: Any) -> str:
    kind = "row" if isinstance(data, HubDataset) else "array" if isinstance(data, ArrayFolder) else "file"
    return counted(_count(data), kind)


def _count(data: Any) -> int:
    return len({data.group_of(i) for i in range(len(data))})


def _check_apart(validation: str, training: str) -> None:
    """Raise `UsageError` if the validation data is the training data, or a folder in it."""
    if is_hub(validation) or is_hub(training):
        same = validation == training
    else:
        held, trained = (Path(name).resolve() for name in (validation, training))
        same = held == trained or trained in held.parents or held in trained.parents
    if same:
        raise UsageError(
            f"the validation data {shown(validation)} and the training data {shown(training)} overlap: move it to a "
            "folder beside it, or hold out a share (--validation 0.05)"
        )


def _check_embeddings(held: Opened, data: Opened, path: str) -> None:
    mine, theirs = embedding_shape(held), embedding_shape(data)
    if mine is not None and theirs is not None and (mine[1] != theirs[1] or mine[0] > theirs[0]):
        raise UsageError(
            f"the embeddings of the validation data {shown(path)} are up to {mine[0]} vectors of {mine[1]}, those of "
            f"the training data up to {theirs[0]} of {theirs[1]}: create them in the same way"
        )


def _warn_of_copies(held: Any, data: Any) -> None:
    """Log a warning if files of the validation data are also in the training data, by content."""
    if not hasattr(held, "index") or not hasattr(data, "index"):
        return
    trained = {entry.hash: entry.source for entry in data.index.usable}
    copies = [entry for entry in held.index.usable if entry.hash and entry.hash in trained]
    if copies:
        log.warning(
            "%s of the validation data %s also in the training data, such as %s and %s: delete one of each pair, or "
            "the validation loss is too low",
            counted(len(copies), "file"),
            "is" if len(copies) == 1 else "are",
            shown(copies[0].source),
            shown(trained[copies[0].hash]),
        )
