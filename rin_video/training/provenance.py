"""`run.json`: the versions, hardware, data and command of a run."""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from rin_video.config import Config
from rin_video.files import write_text
from rin_video.wording import counted

PACKAGES = ("rin-video", "torch", "torchvision", "accelerate", "timm", "ema-pytorch", "numpy", "av", "decord")


def write_provenance(folder: Path, config: Config, accelerator: Any) -> None:
    """Write versions, hardware and start time to `run.json`; earlier starts of the run are kept under `earlier`."""
    path = folder / "run.json"
    now = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": package_versions(),
        "system": platform.platform(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "data": config.data.path,
        "command": sys.argv[1:] if Path(sys.argv[0]).stem == "rin-video" else None,
    }
    earlier = []
    if path.exists():
        before = read_json(path)
        starts = before.pop("earlier", [])
        earlier = [*(starts if isinstance(starts, list) else []), before]
    write_text(path, json.dumps(now | {"earlier": earlier}, indent=1) + "\n")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: v for name in PACKAGES if (v := _version(name))}}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def device_name(device: torch.device) -> str:
    """Return a readable name of the device: `NVIDIA H100 80GB HBM3`, `2 CPU threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return counted(torch.get_num_threads(), "CPU thread") if device.type == "cpu" else device.type


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
