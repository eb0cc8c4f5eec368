"""The identity of the data of a run: it sets the default folder, and a resumed run checks it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from rin_video.config import Config
from rin_video.datasets.folders import TRAINING
from rin_video.datasets.sources import Member
from rin_video.errors import UsageError
from rin_video.files import HUB, PIPE
from rin_video.training.provenance import read_json

log = logging.getLogger("rin_video")

LONGEST_NAME = 240  # limit of the bytes of a folder's name


def run_folder(data: str | os.PathLike[str]) -> Path:
    """Return the default folder of a run on this data: `runs/NAME`, where NAME is that of the data.

    If `runs/NAME` is a run on other data, it is `runs/PARENT-NAME`, where PARENT is the folder that contains the data.
    """
    name = os.fspath(data)
    if name.startswith((HUB, PIPE)):
        parts = [part for part in re.split(r"[/\\:]+", name.partition(":")[2]) if part not in ("", ".", "..")]
        return Path("runs") / _safe("-".join(parts))
    path = Path(name).resolve()
    own = Path("runs") / _safe(path.name if path.is_dir() else path.stem)
    held = holds_data(own)
    if held is None or held == str(path) or (Path(held).parent == path and Path(held).name.lower() in TRAINING):
        return own
    there = Path(held).parent if "{" in held else Path(held)  # the folder of a pattern of shards
    if not there.exists():  # the data may have moved; the run checks this
        return own
    room = max(LONGEST_NAME - len(own.name.encode()), 8)
    return own.with_name(f"{_safe(path.parent.name).encode()[:room].decode('utf-8', 'ignore')}-{own.name}")


def holds_data(run: Path) -> str | None:
    """Return the resolved path of the data of a run, or None if its folder does not contain it."""
    from rin_video.datasets.open import INDEX

    started = read_json(run / "run.json").get("data")
    if isinstance(started, str):
        return started if started.startswith((HUB, PIPE)) else str(Path(started).resolve())
    try:
        with (run / INDEX).open(encoding="ascii") as file:
            return str(Path(json.loads(file.readline())["root"]).resolve())
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def identify(dataset: Any, config: Config, held: Any = None) -> dict[str, Any]:
    """Return the identity of the data for a checkpoint: paths, columns, classes, and a digest of the contents.

    `held` is the held-out data, or None. Its identity is the share, or the name of its files.
    """
    share = config.data.validation if isinstance(config.data.validation, float | int) else None
    return {
        "path": _resolved(config.data.path),
        "images": _resolved(config.data.images),
        "columns": [getattr(dataset, "column", None), getattr(dataset, "label", None)],
        "classes": list(getattr(dataset, "classes", [])),
        "content": _digest(dataset),
        "share": share,
        "validation": None if held is None or share is not None else _source_of(held),
    }


def check_same_data(run: Path, then: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raise `UsageError` if a run would resume with other data than in `then`, the identity in its checkpoint.

    The data may have moved. It may also have changed at the same path, which logs a warning. A checkpoint without an
    identity is accepted.
    """
    if then is None:
        return
    other = f"use another folder (--out), with --init-from {run} to start from its weights"
    if then.get("share") != now.get("share"):
        before, after = ("null" if one is None else f"{one:g}" for one in (then.get("share"), now.get("share")))
        raise UsageError(
            f"{run} was trained with data.validation={before}, now it is {after}, which moves files from one side to "
            f"the other: use the same value, or {other}"
        )
    if "validation" in then and then["validation"] != now.get("validation"):
        log.warning(
            "the validation data of %s was %s, now it is %s: its losses from now on are of other samples",
            run,
            then["validation"] or "none",
            now.get("validation") or "none",
        )
    if then["classes"] and now["classes"] and then["classes"] != now["classes"]:
        before, after = _list(then["classes"]), _list(now["classes"])
        raise UsageError(f"{run} was trained with the classes {before}, now they are {after}: {other}")
    if then.get("columns", now["columns"]) != now["columns"]:
        before, after = (" and ".join(map(str, columns)) for columns in (then["columns"], now["columns"]))
        raise UsageError(f"{run} was trained on the columns {before}, now they are {after}: {other}")
    same = then["content"] is not None and then["content"] == now["content"]
    if same or None in (then["path"], now["path"]):
        return
    if _resolved(then.get("images")) != now["images"]:
        raise UsageError(f"{run} was trained with the images {then['images']}, now they are {now['images']}: {other}")
    if then["path"] != now["path"]:
        raise UsageError(f"{run} was trained on {then['path']}, now the data is {now['path']}: {other}")
    if then["content"] != now["content"]:
        log.warning("the files of %s have changed since the last checkpoint: training continues with them", now["path"])


def _source_of(held: Any) -> str | None:
    """Return the path of the held-out data, or None for a user's dataset."""
    part = getattr(held, "clips", held)
    found = getattr(part, "root", getattr(part, "path", None))
    return None if found is None else _resolved(os.fspath(found))


def _resolved(path: str | None) -> str | None:
    return None if path is None else path if path.startswith((HUB, PIPE)) else str(Path(path).resolve())


def _digest(dataset: Any) -> str | None:
    """Return a digest of the names and contents of all files, or None if they are not known."""
    index = getattr(dataset, "index", None)
    if index is None:
        parts = [_digest(part) for part in getattr(dataset, "parts", ())]
        return None if not parts or None in parts else "-".join(map(str, parts))
    digest = hashlib.blake2b(digest_size=16)
    root = os.path.abspath(os.fspath(index.root))
    for entry in index.entries:
        source = entry.source
        name = source.name if isinstance(source, Member) else os.path.relpath(os.path.abspath(str(source)), root)
        digest.update(f"{name}\0{entry.hash}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name) or "run"
