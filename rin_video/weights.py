"""Saved models: `model.safetensors` with its `config.yaml`. They are written atomically and without pickle."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rin_video.config import Config
from rin_video.config_files import load_config, nest_parameters, to_dict, to_yaml
from rin_video.errors import UsageError
from rin_video.files import CONFIG, WEIGHTS, atomic_write, write_text
from rin_video.hub import fetch
from rin_video.tensor_files import contributing, tensors_digest, write_tensors

log = logging.getLogger("rin_video")

SHIPPED = "models"  # folder of the models that come with the package, beside the presets


def save_model(folder: str | os.PathLike[str], model: nn.Module, config: Config) -> None:
    """Write a model's weights and config to a folder, from which `load_model` restores it."""
    save_weights(folder, model.state_dict(), config)


def save_weights(
    folder: str | os.PathLike[str], weights: Mapping[str, Tensor], config: Config, *, write: bool = True
) -> None:
    """Write a state dict and its config; the weights file also has the options of model and diffusion and a checksum.

    If the weights are sharded, all processes must call this; those without `write` only contribute their shards.
    """
    if not write:
        write_tensors(None, weights)
        return
    folder = Path(folder)
    with contributing(weights):
        folder.mkdir(parents=True, exist_ok=True)
    origin = {section: json.dumps(to_dict(getattr(config, section))) for section in ("model", "diffusion")}
    with atomic_write(folder / WEIGHTS) as path:
        write_tensors(path, weights, {"format": "pt", **origin}, digest=True)
    write_text(folder / CONFIG, to_yaml(config))


def read_model(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Config, Path]:
    """Return the weights and the config of a model, and its folder; `source` is a folder or a hub id `user/name`.

    Raises `UsageError` if there is no such model, its two files do not match, or a file is damaged.
    """
    folder = find_model(source)
    try:
        config = load_config(folder / CONFIG)
        check_origin(folder, config)
        return read_tensors(folder / WEIGHTS), config, folder
    except UsageError as error:
        raise error if str(folder) in str(error) else UsageError(f"{folder / CONFIG}: {error}") from None


def check_origin(folder: Path, config: Config) -> None:
    """Raise `UsageError` if the options of model and diffusion in the weights file differ from those of `config`."""
    metadata = read_metadata(folder / WEIGHTS)
    for section in ("model", "diffusion"):
        if section not in metadata:
            continue
        now = to_dict(getattr(config, section))
        try:
            then = nest_parameters(section, dict(json.loads(metadata[section])))
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{folder / WEIGHTS} is damaged: its header cannot be read ({error})") from None
        for key in sorted(then.keys() & now.keys()):
            if then[key] != now[key]:
                raise UsageError(
                    f"{folder / CONFIG} has {section}.{key}={now[key]}, but {WEIGHTS} was trained with {then[key]}: "
                    "restore that value, or use both files from the same run"
                )


def find_model(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: a run, a model that comes with the package (`demo`), or one of the hub.

    A folder takes precedence over a model of the package, and only a hub id `user/name` is downloaded. Raises
    `UsageError` if the folder lacks a file, or there is no such model.
    """
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UsageError(
                    f"{folder} has no {name}: pass the folder of `rin-video train --out`, after it has saved a model"
                )
        return folder
    if folder.is_file():
        raise UsageError(f"{folder} is a file: pass the folder of a run, or a hub id user/name")
    if os.fspath(source) in shipped_models():
        return Path(str(resources.files("rin_video.configs"))) / SHIPPED / source
    return fetch(source)


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    folder = Path(str(resources.files("rin_video.configs"))) / SHIPPED
    return sorted(weights.parent.name for weights in folder.glob(f"*/{WEIGHTS}"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises a `UsageError` that names the file if it is damaged."""
    wanted = read_metadata(path).get("sha256")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
    if wanted is not None and tensors_digest(tensors) != wanted:
        raise UsageError(f"{path} is damaged: its checksum does not match its tensors. Copy or download it again")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file. Raises `UsageError` if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
