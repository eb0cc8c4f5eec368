"""The state to resume from: nested dicts and lists of tensors and plain values, without pickle, written atomically."""

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
CHECKPOINTS = "checkpoints"  # the folder of all states in that of a run


def save_state(folder: Path, state: dict[str, Any], *, write: bool = True) -> None:
    """Write a nested state as a new folder that appears whole or not at all, with checksums of its files.

    Of sharded tensors all processes call this; those that do not `write` only contribute their parts. Raises
    `UsageError` where the disk is full; what was there before is untouched.
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
    """What `save_state` wrote. Raises `UsageError` where the folder is not whole."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        changed = [name for name in STATE_FILES if file_digest(folder / name) != digests[name]]
        if changed:
            raise ValueError(f"{changed[0]} is not what was written")
        tensors = read_tensors(folder / STATE_FILES[0])
        return dict(_put_tensors(json.loads((folder / STATE_FILES[1]).read_text(encoding="utf-8")), tensors))
    except UsageError:
        raise
    except FileNotFoundError as error:
        reason = f"it has no {Path(str(error.filename)).name}"
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        reason = str(error)
    raise UsageError(f"checkpoint {folder} is damaged ({reason}): delete it to go back to an earlier one")


def newest_state(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state of a run that is whole, and its folder; None where the run has none.

    Damaged and unfinished ones are passed over, and this is logged. Raises `UsageError` where all are damaged.
    """
    for unfinished in sorted((run / CHECKPOINTS).glob("step-*.tmp")):
        log.warning("checkpoint %s was not finished when the run was stopped: passed over", unfinished)
    states = saved_states(run)
    for folder in reversed(states):
        try:
            return folder, load_state(folder)
        except UsageError as error:  # noqa: PERF203
            log.warning("passed over: %s", error)
    if states:
        raise UsageError(
            f"none of the {len(states)} checkpoints in {run / 'checkpoints'} can be read: delete that folder to train "
            "from the start, or give another folder (--out)"
        )
    return None


def load_milestone(run: Path, milestone: int | str) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of what `Trainer.save(milestone)` wrote. `UsageError` where there is none."""
    folder = run / CHECKPOINTS / f"milestone-{milestone}"
    if not folder.is_dir():
        there = sorted(p.name.removeprefix("milestone-") for p in folder.parent.glob("milestone-*"))
        raise UsageError(
            f"{run} has no milestone {milestone}: {', '.join(there) or 'none was saved'} (checkpoints of other "
            "packages, model-N.pt, do not fit this network)"
        )
    return folder, load_state(folder)


def saved_states(run: Path) -> list[Path]:
    """Folders of the states of a run that can be resumed from, oldest first."""
    return sorted(p for p in (run / CHECKPOINTS).glob("step-*") if p.suffix != ".tmp")


def remove_state(folder: Path) -> None:
    """Delete a state: only the files that `save_state` wrote. One cut short leaves a state that is known as damaged."""
    if folder.is_dir():
        for name in (MANIFEST, *STATE_FILES):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
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
