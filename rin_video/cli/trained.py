"""What commands on a trained model share: its checks, its device, and where results go."""

from __future__ import annotations

from pathlib import Path

import torch

from rin_video.config import Config
from rin_video.diffusion.sampling import plan_steps
from rin_video.errors import UsageError
from rin_video.labels import class_index


def allow_only(overrides: list[str], *sections: str) -> None:
    """A trained model stays what it is: overrides of other sections than these are a `UsageError`."""
    for override in overrides:
        if not override.startswith(sections):
            kinds = " and ".join(f"{section}key=value" for section in sections)
            raise UsageError(f"{override} cannot change a trained model: this command takes {kinds}")


def check_sampling(config: Config, *, always_given: bool = True) -> None:
    """What would fail in sampling, and can be said before: a `UsageError`. Those of training may be given nothing."""
    wanted = config.sample
    drops_label = wanted.guidance and "label" in wanted.guidance_drop
    if drops_label and not config.model.num_classes and not config.model.embedding_dim:
        raise UsageError(
            f"sample.guidance is {wanted.guidance:g}, but the model has no classes and no embeddings: leave it at 0"
            f"{', or add sample.guidance_drop=known' if config.model.known_mask else ''}"
        )
    if wanted.guidance and "known" in wanted.guidance_drop and not (config.model.known_mask and always_given):
        raise UsageError(
            f"sample.guidance_drop is {wanted.guidance_drop}, but these samples are given no known cells: "
            "set it when sampling from a context, with a model of model.known_mask=true"
        )
    if drops_label and not config.diffusion.label_dropout:
        raise UsageError(
            f"sample.guidance is {wanted.guidance:g}, but the model never learnt to do without labels: "
            "train with diffusion.label_dropout=0.1 (embeddings are dropped with the label)"
        )
    if wanted.label is not None:
        wanted.label = class_index(wanted.label, config.data.classes, config.model.num_classes)
    plan_steps(config.diffusion, wanted)


def own_folder(model: str) -> Path:
    """Where results go: beside the model, or here where it came from the hub."""
    return Path(model) if Path(model).is_dir() else Path()


def best_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
