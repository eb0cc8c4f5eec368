"""Functions that commands for trained models share: checks, the device, and the output folder."""

from __future__ import annotations

from pathlib import Path

from rin_video.config import Config
from rin_video.diffusion.sampling import plan_steps
from rin_video.errors import UsageError
from rin_video.labels import class_index


def allow_only(overrides: list[str], *sections: str) -> None:
    """Raise `UsageError` for overrides of other sections, which cannot change a trained model."""
    for override in overrides:
        if not override.startswith(sections):
            kinds = " and ".join(f"{section}key=value" for section in sections)
            raise UsageError(f"{override} cannot change a trained model: this command takes {kinds}")


def check_sampling(config: Config, *, always_known: bool = True) -> None:
    """Raise `UsageError` for sampling options that would fail later.

    `always_known` states that all samples have known pixels, which previews during training may not have.
    """
    wanted = config.sample
    drops_label = wanted.guidance and "label" in wanted.guidance_drop
    if drops_label and not config.model.num_classes and not config.model.embedding_dim:
        raise UsageError(
            f"sample.guidance is {wanted.guidance:g}, but the model has no classes and no embeddings: leave it at 0"
            f"{', or add sample.guidance_drop=known' if config.model.known_mask else ''}"
        )
    if wanted.guidance and "known" in wanted.guidance_drop and not (config.model.known_mask and always_known):
        raise UsageError(
            f"sample.guidance_drop is {wanted.guidance_drop}, but these samples have no known pixels: "
            "set it only to sample from a context, with a model that has model.known_mask=true"
        )
    if drops_label and not config.diffusion.label_dropout:
        raise UsageError(
            f"sample.guidance is {wanted.guidance:g}, but the model was trained without label dropout: "
            "train with diffusion.label_dropout=0.1 (embeddings are dropped with the label)"
        )
    if wanted.label is not None:
        class_index(wanted.label, config.data.classes, config.model.num_classes)
    plan_steps(config.diffusion, wanted)


def own_folder(model: str) -> Path:
    """Return the folder for results: that of the model, or the current folder for a model from the hub."""
    return Path(model) if Path(model).is_dir() else Path()
