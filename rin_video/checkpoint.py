"""Weights for use, and the state to resume from: two different things, both without pickle and written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rin_video.config import Config, load_config, to_yaml
from rin_video.errors import UsageError, first_line

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"


# ---- weights for use


def save_model(folder: str | os.PathLike[str], model: nn.Module, config: Config) -> None:
    """Write the model's weights and its configuration, so that `load_model(folder)` gives it back."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_text(folder / CONFIG, to_yaml(config))


def load_model(source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[Any, Config]:
    """The model, in eval mode, and the configuration of a folder or of a hub id `user/name`.

    Raises `UsageError` where the folder is not a run's, or the weights do not fit the configuration.
    """
    from rin_video.rin import RIN

    folder = find_model(source)
    config = load_config(folder / CONFIG)
    model = RIN(config.model)
    weights = read_tensors(folder / WEIGHTS)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UsageError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {first}") from None
    return model.to(device).eval(), config


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
    if folder.exists():
        raise UsageError(f"{folder} is a file: give the folder of a run, or a hub id user/name")
    parts = os.fspath(source).split("/")
    if len(parts) != 2 or not all(parts) or "." in (parts[0], parts[1]):
        raise UsageError(f"no folder is called {source}: give the folder of a run, or a hub id user/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:
        raise UsageError(f"no folder is called {source}, and the hub did not give it: {first_line(error)}") from None


# ---- the state to resume from: nested dicts and lists of tensors and plain values


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a nested state as a new folder that appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = _take_tensors(state, tensors)
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps(tree), encoding="utf-8")
    for path in temporary.iterdir():
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    _sync(folder.parent)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote."""
    tensors = read_tensors(folder / "state.safetensors")
    try:
        tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} cannot be resumed from ({error}): delete it to go back to an earlier one") from None
    return _put_tensors(tree, tensors)


def saved_states(run: Path) -> list[Path]:
    """Folders of the states of a run that can be resumed from, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".tmp")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a damaged one is a `UsageError` that names it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None


def _take_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
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


# ---- atomic writes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
