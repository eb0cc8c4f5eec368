"""Checks that a model and its data fit together, and the error for a loss that is not finite."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rin_video.datasets.adapters import ADAPTED
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.embeddings import embedding_shape
from rin_video.datasets.epochs import name_of
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.mixed import MixedDataset
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import UsageError
from rin_video.training.metrics import Failure

log = logging.getLogger("rin_video")


def check_data(diffusion: GaussianDiffusion, data: Any, batch_size: int) -> None:
    """Raise `UsageError` if the model cannot use the data; log a warning if the dataset is smaller than a batch."""
    check_kinds(diffusion, data)
    check_classes(diffusion, data)
    check_embeddings(diffusion, data)
    if len(data) < batch_size:
        log.warning(
            "the dataset has %d samples, but a batch has %d: every batch contains some samples more than once",
            len(data),
            batch_size,
        )


def check_kinds(diffusion: GaussianDiffusion, data: Any) -> None:
    """Raise `UsageError` if clips and images are mixed, but the model has no tokenizer for one of them."""
    if isinstance(data, MixedDataset) and {3, 4} - {len(shape) for shape in getattr(diffusion.model, "shapes", ())}:
        raise UsageError(
            "the data mixes clips and images, but the model takes one kind: set model.tokenizer=tube+image"
        )


def check_classes(diffusion: GaussianDiffusion, data: Any) -> None:
    """Raise `UsageError` if the model has classes, but not as many as the data."""
    expected = getattr(diffusion.model, "num_classes", 0)
    classes = getattr(data, "classes", None)
    unnamed = not classes and isinstance(data, ADAPTED)  # labels are checked batch by batch
    if expected and classes is not None and len(classes) != expected and not unnamed:
        raise UsageError(
            f"the model has {expected} classes, but the data has {len(classes)}: set model.num_classes={len(classes)}"
        )


def check_embeddings(diffusion: GaussianDiffusion, data: Any) -> None:
    """Raise `UsageError` if the embeddings of the data are missing, or do not fit the model."""
    config = getattr(diffusion.model, "config", None)
    shape, wanted = embedding_shape(data), getattr(config, "embedding_dim", 0)
    if shape is None and wanted and isinstance(data, ImageFolder | ClipFolder | MixedDataset):
        raise UsageError(
            f"model.embedding_dim is {wanted}, but the samples have no embeddings: use data.embeddings=true (files) or "
            "data.text_encoder=NAME (captions)"
        )
    if shape is not None and (wanted != shape[1] or getattr(config, "embedding_tokens", 0) < shape[0]):
        raise UsageError(
            f"the embeddings are {shape[0]} vectors of {shape[1]}, but the model takes "
            f"{getattr(config, 'embedding_tokens', 0) if wanted else 0} of {wanted}: set "
            f"model.embedding_tokens={shape[0]} model.embedding_dim={shape[1]}"
        )


def not_finite_error(failure: Failure, data: Any, checkpoint: Path | None) -> UsageError:
    """Return an error that names the step, its samples and the last good checkpoint."""
    names = [name_of(data, index) for index in failure.samples]
    named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return UsageError(
        f"the {'loss' if failure.of_loss else 'gradient'} of step {failure.step} is not finite. The samples were "
        f"{named}. The last good checkpoint is {checkpoint or 'none'}: check these files; if they are valid, "
        "lower train.train_lr, raise train.warmup_steps, or use train.mixed_precision=bf16 instead of fp16"
    )
