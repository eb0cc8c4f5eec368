"""Recognition of the splits of a dataset: its folders `train`, `val` and `test`, or those of a Hugging Face dataset."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from rin_video.datasets.extensions import KINDS
from rin_video.datasets.folders import RUN, TEST, TRAINING, VALIDATION
from rin_video.datasets.hub import is_hub, split_names
from rin_video.datasets.shards import is_shards
from rin_video.datasets.sources import shown
from rin_video.errors import UsageError
from rin_video.files import HUB

MEDIA = {".tar", *(extension for extensions in KINDS.values() for extension in extensions)}


def find_splits(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Return the data to train on, and that to validate on (None if there is none), by the splits in `path`.

    Without splits, all of `path` is for training. Otherwise, the data for validation is the split `val`, or `test` if
    there is no `val`; synonyms are in `rin_video.datasets.folders`. Raises `UsageError` for folders of splits without
    one for training, or with several.
    """
    name = os.fspath(path)
    if is_hub(name):
        return name, _hub_validation(name)
    if not os.path.isdir(name) or is_shards(name):
        return name, None
    folders = _split_folders(Path(name))
    if len(folders) < 2:
        return name, None
    there = f"{shown(name)} contains the splits {', '.join(shown(folder) for folder in sorted(folders.values()))}"
    training = [folders[split] for split in TRAINING if split in folders]
    if not training:
        first = shown(os.path.join(name, sorted(folders.values())[0]))
        raise UsageError(f"{there}, but none for training: pass the one to train on, such as --data {first}")
    if len(training) > 1:
        first = shown(os.path.join(name, training[0]))
        raise UsageError(f"{there}, two of them for training: pass one, such as --data {first}")
    validation = choose_validation(folders)
    return os.path.join(name, training[0]), validation and os.path.join(name, validation)


def choose_validation(splits: Mapping[str, str]) -> str | None:
    """Return the split for validation: `val`, or a synonym, or else `test`; `splits` has them by lower-case name."""
    return next((splits[split] for split in (*VALIDATION, *TEST) if split in splits), None)


def _split_folders(root: Path) -> dict[str, str]:
    """Return the folders of splits by lower-case name; empty if other folders or files at this level have media."""
    folders: list[str] = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif Path(entry.name).suffix.lower() in MEDIA:
                    return {}
    except OSError:
        return {}
    known = {*TRAINING, *VALIDATION, *TEST}
    splits = {folder.lower(): folder for folder in folders if folder.lower() in known}
    if len(splits) < 2 or any(_has_media(root / folder) for folder in folders if folder.lower() not in known):
        return {}
    return {split: folder for split, folder in splits.items() if _has_media(root / folder)}


def _has_media(folder: Path) -> bool:
    """Return whether there is a clip, image, array or shard below a folder that is not that of a training run."""
    if (folder / RUN).is_file():
        return False
    for _, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if any(not name.startswith(".") and os.path.splitext(name)[1].lower() in MEDIA for name in names):
            return True
    return False


def _hub_validation(name: str) -> str | None:
    """Return the name of the validation split of a Hugging Face dataset from which the split `train` is used."""
    splits: Collection[str] = split_names(name)
    found = choose_validation({split.lower(): split for split in splits})
    if "train" not in splits or found is None:
        return None
    if not name.startswith(HUB):
        return os.path.join(name, found)
    return f"{name.removesuffix(':')}:{found}"
