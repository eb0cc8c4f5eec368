"""Held-out files, which training never uses: chosen by the hash of their names, so that a file stays on its side."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rin_video.datasets.adapters import ADAPTED, Part
from rin_video.datasets.folders import are_classes
from rin_video.datasets.mixed import MixedDataset
from rin_video.datasets.shards import companion, companions, members_of
from rin_video.datasets.sources import Member, Source, open_source, shown
from rin_video.errors import UsageError
from rin_video.wording import counted

MANIFEST = "prepare.json"  # beside the shards that `rin-video prepare` wrote


def split_by_share(dataset: Any, share: float, path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Split a dataset into (training, held-out); about `share` of the files are held out, each with all its samples.

    The names alone determine the sides (see `hold_out`), not the options with which samples are taken from the files.
    The items of a user's dataset have numbers instead of names. The classes and the embeddings of both sides are those
    of the complete dataset. Of clips mixed with images, a share of both is held out. Raises `UsageError` if a side
    would be empty.
    """
    if isinstance(dataset, MixedDataset):
        (clips, held_clips), (images, held_images) = (split_by_share(part, share, path) for part in dataset.parts)
        ratio = dataset.image_ratio
        return MixedDataset(clips, images, ratio), MixedDataset(held_clips, held_images, ratio)
    if hasattr(dataset, "index"):
        usable = dataset.index.usable
        names = [entry.class_name for entry in usable]
        classes = names if are_classes(names) else [None] * len(names)
        keys = file_keys(dataset.index.root, [entry.source for entry in usable])
        held = hold_out(keys, classes, share, [entry.hash for entry in usable])
        is_held = {id(entry.source): out for entry, out in zip(usable, held, strict=True)}
        sides = [is_held[id(file)] for file in dataset.files]
    elif isinstance(dataset, ADAPTED) or not hasattr(dataset, "select"):
        dataset = Part(dataset, range(len(dataset)))
        sides = hold_out([str(index) for index in range(len(dataset))], [None] * len(dataset), share)
    else:
        sides = hold_out(dataset.keys(), dataset.class_names if dataset.classes else [None] * len(dataset), share)
    chosen = [[i for i, out in enumerate(sides) if out == side] for side in (False, True)]
    for files, side in zip(chosen, ("training", "validation"), strict=True):
        if not files:
            raise UsageError(
                f"data.validation={share:g} leaves no file of {shown(os.fspath(path))} for {side}: it holds out whole "
                f"files, and there are {counted(len(sides), 'usable file')} (a class with one file keeps it for "
                "training). Use --validation FOLDER"
            )
    train, held_out = map(dataset.select, chosen)
    held_out.skipped = []  # the training data reports them
    return train, held_out


def hold_out(
    keys: Sequence[str], classes: Sequence[str | None], share: float, contents: Sequence[str] = ()
) -> list[bool]:
    """Return for each file whether it is held out; files with the same key or the same content are on the same side.

    A file is held out if the hash of its key, uniform in [0, 1), is below `share`. Therefore a new file does not move
    other files, except in a small class: each class with two files or more has a file on both sides, if necessary the
    one with the smallest hash is held out, or the one with the largest hash is not.
    """
    groups = _groups(keys, contents)
    place: dict[int, float] = {}
    for key, group in zip(keys, groups, strict=True):
        place[group] = min(place.get(group, 1.0), hash_of(key))
    held = {group for group, value in place.items() if value < share}
    members: dict[str | None, set[int]] = {}
    for name, group in zip(classes, groups, strict=True):
        members.setdefault(name, set()).add(group)
    for _, found in sorted(members.items(), key=lambda item: (item[0] is not None, item[0] or "")):
        if found <= held:
            held.discard(max(found, key=lambda group: place[group]))
        elif len(found) > 1 and not found & held:
            held.add(min(found, key=lambda group: place[group]))
    return [group in held for group in groups]


def hash_of(key: str) -> float:
    """Return the hash of a name, uniform in [0, 1): BLAKE2b of its NFC form, so that all file systems agree."""
    text = unicodedata.normalize("NFC", key).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48


def file_keys(root: str | os.PathLike[str], sources: Sequence[Source]) -> list[str]:
    """Return the name of each file by which its side is chosen.

    It is the path below `root` without the extension; in a shard, the key that the files of a sample share. For shards
    that `rin-video prepare` wrote, it is the name of the source file, so that the sides are those of the source.
    """
    origins: dict[Path, dict[str, str]] = {}
    keys = []
    for source in sources:
        if isinstance(source, Member):
            if source.shard not in origins:
                origins[source.shard] = _prepared_from(source.shard)
            keys.append(origins[source.shard].get(source.key, source.key))
        else:
            keys.append(file_key(root, source))
    return keys


def file_key(root: str | os.PathLike[str], source: Source) -> str:
    """Return the path of a file below `root` without the extension, or the key of a member of a shard."""
    if isinstance(source, Member):
        return source.key
    path = Path(str(source))
    path = Path(path.name) if path == Path(root) else path.relative_to(root)
    return path.with_suffix("").as_posix()


def spread(dataset: Any, num: int) -> list[tuple[int, int]]:
    """Return `num` places (index, epoch) of a dataset, spread evenly over its files.

    There are fewer if the dataset has fewer items, unless they are clips, of which each epoch has others: then the
    later epochs provide the rest.
    """
    if hasattr(dataset, "image_ratio"):  # clips mixed with images, in the same ratio as in training
        images = round(num * dataset.image_ratio)
        later = [(len(dataset.clips) + index, epoch) for index, epoch in spread(dataset.images, images)]
        return spread(dataset.clips, num - images) + later
    files: dict[int, list[int]] = {}
    for index in range(len(dataset)):
        files.setdefault(dataset.group_of(index), []).append(index)
    if num <= len(files):
        chosen = [list(files.values())[i * len(files) // num] for i in range(num)]
        return sorted((items[len(items) // 2], 0) for items in chosen)
    places = [(rank, index) for items in files.values() for rank, index in enumerate(items)]
    order = [index for _, index in sorted(places)]  # the first item of each file, the second of each file, ...
    count = num if getattr(dataset, "clip_sampler", None) else min(num, len(order))
    return sorted((order[i % len(order)], i // len(order)) for i in range(count))


def _prepared_from(shard: Path) -> dict[str, str]:
    """Return the names of the source files by the key of a sample, for a shard that `rin-video prepare` wrote."""
    try:
        root = Path(json.loads((shard.parent / MANIFEST).read_text(encoding="utf-8"))["root"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    members = members_of(shard)[0]
    by_key, names = companions(members), {}
    for member in members:
        about = companion(by_key, member, ".json")
        if about is None or member.key in names:
            continue
        try:
            with open_source(about) as file:
                found = json.load(file)
            names[member.key] = str(found["name"]) if "name" in found else _below(root, Path(str(found["source"])))
        except (UsageError, OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return names


def _below(root: Path, source: Path) -> str:
    """Return the key of a source that is named relative to an unknown folder; `root` is absolute."""
    parts = [part for part in source.parts if part not in (".", "..")]
    for count in range(min(len(root.parts), len(parts)), 0, -1):
        if list(root.parts[-count:]) == parts[:count]:
            parts = parts[count:] or parts
            break
    return Path(*parts).with_suffix("").as_posix()


def _groups(keys: Sequence[str], contents: Sequence[str]) -> list[int]:
    """Return the number of the group of each file; files with the same key or the same content are in one group."""
    parents = list(range(len(keys)))

    def find(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for kind, values in (("key", keys), ("content", contents)):
        for i, value in enumerate(values):
            if value:
                parents[find(i)] = find(first.setdefault((kind, value), i))
    return [find(i) for i in range(len(keys))]
