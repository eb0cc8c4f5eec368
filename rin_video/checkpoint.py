"""Weights for use, and the state to resume from: two different things, both without pickle and written atomically."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rin_video.config import Config
from rin_video.config_files import load_config, plain, to_yaml
from rin_video.errors import UsageError
from rin_video.files import CONFIG, WEIGHTS, full_disk, replacing, sync, write_text
from rin_video.tensor_files import contributing, tensors_digest, write_tensors

log = logging.getLogger("rin_video")

STATE_FILES = ("state.safetensors", "state.json")
MANIFEST = "manifest.json"


# ---- weights for use


def save_model(folder: str | os.PathLike[str], model: nn.Module, config: Config) -> None:
    """Write the model's weights and its configuration, so that `load_model(folder)` gives it back."""
    save_weights(folder, model.state_dict(), config)


def save_weights(
    folder: str | os.PathLike[str], weights: Mapping[str, Tensor], config: Config, *, write: bool = True
) -> None:
    """`save_model` for a state dict. The file says what made it: options of model and diffusion, and a checksum.

    Of sharded weights all processes call this; those that do not `write` only contribute their parts.
    """
    if not write:
        write_tensors(None, weights)
        return
    folder = Path(folder)
    with contributing(weights):
        folder.mkdir(parents=True, exist_ok=True)
    origin = {section: json.dumps(plain(getattr(config, section))) for section in ("model", "diffusion")}
    with replacing(folder / WEIGHTS) as path:
        write_tensors(path, weights, {"format": "pt", **origin}, digest=True)
    write_text(folder / CONFIG, to_yaml(config))


def load_model(source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[Any, Config]:
    """The model, in eval mode, and the configuration of a folder or of a hub id `user/name`.

    Raises `UsageError` where the folder is not a run's, the weights do not fit the configuration, or are damaged.
    """
    from rin_video.rin import RIN

    folder = find_model(source)
    try:
        config = load_config(folder / CONFIG)
        check_origin(folder, config)
        weights = read_tensors(folder / WEIGHTS)
        model = RIN(config.model)
    except UsageError as error:
        raise error if str(folder) in str(error) else UsageError(f"{folder / CONFIG}: {error}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UsageError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {first}") from None
    for name, value in model.state_dict().items():
        if value.is_floating_point() != weights[name].is_floating_point():
            raise UsageError(f"{folder / WEIGHTS} does not fit: {name} is {weights[name].dtype}, not {value.dtype}")
    return model.to(device).eval(), config


def check_origin(folder: Path, config: Config) -> None:
    """Weights that say which options made them must be beside the same options."""
    metadata = read_metadata(folder / WEIGHTS)
    for section in ("model", "diffusion"):
        if section not in metadata:
            continue
        now = plain(getattr(config, section))
        try:
            then = dict(json.loads(metadata[section]))
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{folder / WEIGHTS} is damaged: its header does not read ({error})") from None
        for key in sorted(then.keys() & now.keys()):
            if then[key] != now[key]:
                raise UsageError(
                    f"{folder / CONFIG} says {section}.{key}={now[key]}, but {WEIGHTS} was trained with {then[key]}: "
                    "put that back, or take both files from one run"
                )


def find_model(source: str | os.PathLike[str]) -> Path:
    """The folder of a model. A hub id is fetched, and only where no such folder exists."""
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UsageError(
                    f"{folder} holds no {name}: give the folder that `rin-video train --out` wrote, once it has saved"
                )
        return folder
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give the folder of a run, or a hub id user/name")
    from rin_video.hub import fetch

    return fetch(source)


# ---- the state to resume from: nested dicts and lists of tensors and plain values


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
    temporary = folder.with_name(folder.name + ".tmp")
    with full_disk(folder):
        with contributing(tensors):
            remove_state(temporary)
            temporary.mkdir(parents=True)
        try:
            write_tensors(temporary / STATE_FILES[0], tensors)
            (temporary / STATE_FILES[1]).write_text(json.dumps(tree), encoding="utf-8")
            digests = {name: file_digest(temporary / name) for name in STATE_FILES}
            (temporary / MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            remove_state(folder)
            os.replace(temporary, folder)
            sync(folder.parent)
        except BaseException:
            with suppress(OSError):
                remove_state(temporary)
            raise


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
    for unfinished in sorted((run / "checkpoints").glob("step-*.tmp")):
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


def saved_states(run: Path) -> list[Path]:
    """Folders of the states of a run that can be resumed from, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".tmp")


def remove_state(folder: Path) -> None:
    """Delete a state: only the files that `save_state` wrote. One cut short leaves a state that is known as damaged."""
    if folder.is_dir():
        for name in (MANIFEST, *STATE_FILES):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


# ---- tensors and checksums


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a damaged one is a `UsageError` that names it."""
    wanted = read_metadata(path).get("sha256")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
    if wanted is not None and tensors_digest(tensors) != wanted:
        raise UsageError(f"{path} is damaged: its checksum is not that of its tensors. Copy or download it again")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself; `UsageError` where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None


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
