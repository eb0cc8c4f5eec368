"""Checkpoints on the disk: nested dicts and lists of tensors and plain values, without pickle, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rin_video.errors import UsageError
from rin_video.files import atomic_write
from rin_video.tensor_files import contributing, write_tensors
from rin_video.weights import log, read_tensors

STATE_FILES = ("state.safetensors", "state.json")
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # the folder of all states within the folder of a run


def save_state(folder: Path, state: dict[str, Any], *, write: bool = True) -> None:
    """Write a nested state to a folder atomically, with checksums of its files.

    If tensors are sharded, all processes must call this; those without `write` only contribute their shards. Raises
    `UsageError` if the disk is full; then an earlier state in the folder does not change.
    """
    tensors: dict[str, Tensor] = {}
    tree = _take_tensors(state, tensors)
    if not write:
        write_tensors(None, tensors)
        return
    with atomic_write(folder, remove=remove_state) as temporary:
        with contributing(tensors):
            remove_state(temporary)  # left by a process that was killed
            temporary.mkdir(parents=True)
        write_tensors(temporary / STATE_FILES[0], tensors)
        (temporary / STATE_FILES[1]).write_text(json.dumps(tree), encoding="utf-8")
        digests = {name: file_digest(temporary / name) for name in STATE_FILES}
        (temporary / MANIFEST).write_text(json.dumps(digests), encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """Load what `save_state` wrote. Raises `UsageError` if the folder is incomplete or damaged."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        changed = [name for name in STATE_FILES if file_digest(folder / name) != digests[name]]
        if changed:
            raise ValueError(f"{changed[0]} does not match its checksum")
        tensors = read_tensors(folder / STATE_FILES[0])
        return dict(_put_tensors(json.loads((folder / STATE_FILES[1]).read_text(encoding="utf-8")), tensors))
    except UsageError:
        raise
    except FileNotFoundError as error:
        reason = f"it has no {Path(str(error.filename)).name}"
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        reason = str(error)
    raise UsageError(f"checkpoint {folder} is damaged ({reason}): delete it to return to an earlier one")


def newest_state(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and the content of the newest complete state of a run, or None if it has no states.

    Damaged and incomplete states are skipped with a warning. Raises `UsageError` if all states are damaged.
    """
    for unfinished in sorted((run / CHECKPOINTS).glob("step-*.tmp")):
        log.warning("skipping checkpoint %s: the run was stopped while it was being written", unfinished)
    states = saved_states(run)
    for folder in reversed(states):
        try:
            return folder, load_state(folder)
        except UsageError as error:  # noqa: PERF203
            log.warning("skipping a checkpoint: %s", error)
    if states:
        raise UsageError(
            f"none of the {len(states)} checkpoints in {run / 'checkpoints'} can be read: delete that folder to train "
            "from the start, or use another folder (--out)"
        )
    return None


def load_milestone(run: Path, milestone: int | str) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the content of what `Trainer.save(milestone)` wrote.

    Raises `UsageError` if it does not exist or is damaged.
    """
    folder = run / CHECKPOINTS / f"milestone-{milestone}"
    if not folder.is_dir():
        there = sorted(p.name.removeprefix("milestone-") for p in folder.parent.glob("milestone-*"))
        raise UsageError(
            f"{run} has no milestone {milestone}: it has {', '.join(there) or 'none'} (checkpoints of other packages, "
            "model-N.pt, do not fit this network)"
        )
    return folder, load_state(folder)


def saved_states(run: Path) -> list[Path]:
    """Return the folders of the states that a run can resume from, oldest first."""
    return sorted(p for p in (run / CHECKPOINTS).glob("step-*") if p.suffix != ".tmp")


def remove_state(folder: Path) -> None:
    """Delete the files that `save_state` wrote, and their folder.

    The manifest is deleted first, so that an interrupted deletion leaves a state that is recognised as damaged.
    """
    if folder.is_dir():
        for name in (MANIFEST, *STATE_FILES):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def file_digest(path: Path) -> str:
    """Return the SHA-256 checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _take_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _take_tensors(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, tensors) for item in value]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _put_tensors(item, tensors) for key, item in value["dict"]}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value
