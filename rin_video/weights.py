"""Weights for use: `model.safetensors` and `config.yaml` beside it. No pickle; written atomically."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
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
    origin = {section: json.dumps(to_dict(getattr(config, section))) for section in ("model", "diffusion")}
    with atomic_write(folder / WEIGHTS) as path:
        write_tensors(path, weights, {"format": "pt", **origin}, digest=True)
    write_text(folder / CONFIG, to_yaml(config))


def read_model(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Config, Path]:
    """The weights and the configuration of a folder or of a hub id `user/name`, and the folder they are in.

    Raises `UsageError` where the folder is not a run's, its two files are of different models, or are damaged.
    """
    folder = find_model(source)
    try:
        config = load_config(folder / CONFIG)
        check_origin(folder, config)
        return read_tensors(folder / WEIGHTS), config, folder
    except UsageError as error:
        raise error if str(folder) in str(error) else UsageError(f"{folder / CONFIG}: {error}") from None


def check_origin(folder: Path, config: Config) -> None:
    """Weights that say which options made them must be beside the same options."""
    metadata = read_metadata(folder / WEIGHTS)
    for section in ("model", "diffusion"):
        if section not in metadata:
            continue
        now = to_dict(getattr(config, section))
        try:
            then = nest_parameters(section, dict(json.loads(metadata[section])))
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
    return fetch(source)


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
