"""Plans the drawing of samples: their number, codec, conditions and folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rin_video.config_checks import check_at_least
from rin_video.config_files import to_dict
from rin_video.errors import UsageError
from rin_video.evaluation.drawing import Drawing
from rin_video.evaluation.inputs import Model
from rin_video.evaluation.sets import SampleSet, is_picture_set
from rin_video.labels import class_index

NUM = 2048  # largest number of samples by default

CodecOption: TypeAlias = Literal["auto", "h264", "none"]


def check_counts(**counts: tuple[int | None, int]) -> None:
    """Raise `UsageError` if a number is set and below its minimum."""
    for name, (value, least) in counts.items():
        if value is not None:
            check_at_least(f"--{name.replace('_', '-')}", value, least, int)


def check_shape(shape: tuple[int, ...], given: int | None) -> None:
    """Raise `UsageError` if samples (C, *grid) are no pictures, or have too few frames to predict some."""
    if not is_picture_set(shape):
        raise UsageError(
            f"samples of shape {shape} are no images or clips with 1 or 3 channels: the features are those of pictures"
        )
    if given is None:
        return
    if len(shape) != 4:
        raise UsageError("--given is for clips, but the samples are images")
    if given >= shape[1]:
        raise UsageError(f"--given is {given}, but the clips have {shape[1]} frames: use 1 to {shape[1] - 1}")


def choose_codec(codec: CodecOption, shape: tuple[int, ...], given: int | None) -> Literal["h264", "png", "none"]:
    """Return how samples are stored. Raises `UsageError` if H.264 cannot store the samples."""
    H, W = shape[-2:]
    odd = H % 2 or W % 2
    if len(shape) == 3:
        if codec == "h264":
            raise UsageError("--codec h264 is for clips, but the samples are images, which are written without loss")
        return "png"
    if codec == "h264" and odd:
        raise UsageError(f"--codec h264 requires even sizes, but the clips are {H}x{W}: use --codec none")
    if codec == "auto":
        return "none" if given is not None or odd else "h264"
    return codec


def plan_drawing(
    model: Model,
    real: SampleSet,
    shape: tuple[int, ...],
    num: int,
    codec: Literal["h264", "png", "none"],
    given: int | None,
    seed: int,
    max_batch: int,
) -> Drawing:
    """Return how the samples of an evaluation are drawn.

    Labels come in turn, as in `rin-video sample`; predictions and samples with embeddings take the label and embedding
    of a real sample. Raises `UsageError` if the model only works with known pixels, but none are given.
    """
    config, classes = model.config, model.config.model.num_classes
    known = config.diffusion.known
    if given is None and known and not known.get("none"):
        raise UsageError(f"{model.name} was trained only with known frames: add --given N, the number of known frames")
    if given is not None and not config.model.known_mask:
        raise UsageError(
            f"{model.name} was trained without an observed mask and cannot predict: leave out --given, or train with "
            "model.known_mask=true diffusion.known.none=1 diffusion.known.first=1"
        )
    embedding = config.model.embedding_dim > 0
    conditioned = given is not None or embedding
    names = class_names(model)
    labels = label_numbers(model, real, num, conditioned=conditioned)
    return Drawing(
        num,
        seed,
        config.sample,
        shape,
        codec,
        max_batch,
        titles=None if labels is None or max(labels) < 0 else [names[i] if i >= 0 else "none" for i in labels],
        conditions=real if conditioned else None,
        given=given,
        embedding=embedding,
        labels=conditioned and bool(classes) and config.sample.label is None,
    )


def class_names(model: Model) -> list[str]:
    """Return the names of the classes of a model; a class without a name has its number."""
    names = model.config.data.classes or model.diffusion.classes
    return list(names) or [str(i) for i in range(model.config.model.num_classes)]


def label_numbers(model: Model, real: SampleSet, num: int, *, conditioned: bool) -> list[int] | None:
    """Return the class of each sample, -1 for none; None if the model has no classes.

    It is the class that the options set, or that of the real sample which gives the conditions, or each class in turn.
    """
    classes, label = model.config.model.num_classes, model.config.sample.label
    if not classes:
        return None
    if label is not None:
        return [class_index(label, class_names(model), classes)] * num
    if conditioned:
        return [int(real.labels[i % len(real)]) for i in range(num)]
    return [i % classes for i in range(num)]


def identity_of(model: Model, plan: Drawing) -> dict[str, Any]:
    """Return what determines the samples, as JSON values."""
    options = to_dict(plan.config)
    options.pop("num_samples")
    return {
        "weights": model.digest,
        **{f"sample.{name}": value for name, value in options.items()},
        "num": plan.num,
        "seed": plan.seed,
        "shape": list(plan.shape),
        "codec": plan.codec,
        "given": plan.given,
        "conditions": None if plan.conditions is None else plan.conditions.digest(),
        "max_batch": plan.max_batch,
    }


def digest_of(identity: dict[str, Any]) -> str:
    """Return a short digest of JSON values, for the name of a folder."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()


def output_folder(out: str | os.PathLike[str] | None, model: Model | None, scratch: Path) -> Path:
    """Return the folder for results: `out`, or `evaluation` in the folder of the run, or a temporary one."""
    if out is not None:
        return Path(out)
    return model.folder / "evaluation" if model is not None and model.folder is not None else scratch
