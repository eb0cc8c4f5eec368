"""Train and sample Recurrent Interface Networks (RIN) on images and video."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rin_video.config import Config, ModelConfig
    from rin_video.config_files import load_config
    from rin_video.diffusion.process import GaussianDiffusion
    from rin_video.errors import UsageError
    from rin_video.evaluation.evaluate import evaluate
    from rin_video.media import save_samples, write_video
    from rin_video.model.rin import RIN
    from rin_video.reports.card import push_to_hub
    from rin_video.training.callbacks import Callback
    from rin_video.training.trainer import Trainer

__all__ = [
    "RIN",
    "Callback",
    "Config",
    "GaussianDiffusion",
    "ModelConfig",
    "Trainer",
    "UsageError",
    "evaluate",
    "load_config",
    "push_to_hub",
    "save_samples",
    "write_video",
]

# Imported on first use, so that `rin-video --help` does not import torch.
_HOME = {
    "RIN": "model.rin",
    "Callback": "training.callbacks",
    "Config": "config",
    "GaussianDiffusion": "diffusion.process",
    "ModelConfig": "config",
    "Trainer": "training.trainer",
    "UsageError": "errors",
    "evaluate": "evaluation.evaluate",
    "load_config": "config_files",
    "push_to_hub": "reports.card",
    "save_samples": "media",
    "write_video": "media",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
