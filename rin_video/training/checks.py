"""Whether a model and its data fit together, and what is known of a loss that is not a number."""

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
    """Raises `UsageError` for data that the model does not take; a dataset smaller than a batch is logged."""
    check_kinds(diffusion, data)
    check_classes(diffusion, data)
    check_embeddings(diffusion, data)
    if len(data) < batch_size:
        log.warning(
            "the data are %d samples, a batch is %d: every step sees some of them more than once", len(data), batch_size
        )


def check_kinds(diffusion: GaussianDiffusion, data: Any) -> None:
    """Clips and images together need a model with a tokenizer for each."""
    if isinstance(data, MixedDataset) and {3, 4} - {len(shape) for shape in getattr(diffusion.model, "shapes", ())}:
        raise UsageError("clips are mixed with images, and the model takes one kind: set model.tokenizer=tube+image")


def check_classes(diffusion: GaussianDiffusion, data: Any) -> None:
    """A model with classes needs as many as the data has."""
    expected = getattr(diffusion.model, "num_classes", 0)
    classes = getattr(data, "classes", None)
    unnamed = not classes and isinstance(data, ADAPTED)  # labels are looked at batch by batch
    if expected and classes is not None and len(classes) != expected and not unnamed:
        raise UsageError(
            f"the model has {expected} classes, the data {len(classes)}: set model.num_classes={len(classes)}"
        )


def check_embeddings(diffusion: GaussianDiffusion, data: Any) -> None:
    """What comes with the samples must fit the model, and come where the model waits for it."""
    config = getattr(diffusion.model, "config", None)
    shape, wanted = embedding_shape(data), getattr(config, "embedding_dim", 0)
    if shape is None and wanted and isinstance(data, ImageFolder | ClipFolder | MixedDataset):
        raise UsageError(
            f"model.embedding_dim is {wanted}, and nothing comes with the samples: use data.embeddings=true (files) or "
            "data.text_encoder=NAME (captions)"
        )
    if shape is not None and (wanted != shape[1] or getattr(config, "embedding_tokens", 0) < shape[0]):
        raise UsageError(
            f"the samples come with {shape[0]} vectors of {shape[1]}, the model takes "
            f"{getattr(config, 'embedding_tokens', 0) if wanted else 0} of {wanted}: set "
            f"model.embedding_tokens={shape[0]} model.embedding_dim={shape[1]}"
        )


def not_finite_error(failure: Failure, data: Any, checkpoint: Path | None) -> UsageError:
    """Names the step, the samples that it was of and the last good checkpoint."""
    names = [name_of(data, index) for index in failure.samples]
    named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return UsageError(
        f"the {'loss' if failure.of_loss else 'gradient'} of step {failure.step} is not a number. It came with "
        f"{named}. The last good checkpoint is {checkpoint or 'none'}: look at these files; if they are sound, "
        "lower train.train_lr, raise train.warmup_steps, or use train.mixed_precision=bf16 instead of fp16"
    )
