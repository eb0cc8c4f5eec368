"""What is evaluated (a model, or samples), and the real samples that it is compared with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rin_video.config import Config, DataConfig
from rin_video.config_files import is_set, load_config
from rin_video.datasets.adapters import adapt
from rin_video.datasets.folders import RUN
from rin_video.datasets.mixed import MixedDataset
from rin_video.datasets.open import INDEX, open_split
from rin_video.datasets.sources import shown
from rin_video.datasets.splits import find_splits
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import ShortClipError, UsageError
from rin_video.evaluation.sets import first_shape, reading_options
from rin_video.files import CONFIG, HUB, WEIGHTS
from rin_video.weights import find_model, read_metadata

Source: TypeAlias = "str | os.PathLike[str] | GaussianDiffusion | Tensor | np.ndarray"
Data: TypeAlias = "str | os.PathLike[str] | Dataset[Any] | Tensor | np.ndarray"
SplitOption: TypeAlias = Literal["auto", "train", "validation", "all"]


class Model(NamedTuple):
    """A model to draw samples from."""

    diffusion: GaussianDiffusion
    config: Config
    name: str
    digest: str  # of the weights
    folder: Path | None  # of the run


class Reference(NamedTuple):
    """Real samples: those to compare with, and those of training, which are other files."""

    real: Any  # a dataset
    train: Any | None  # a dataset; None if there is none, or if `real` is it
    split: str  # what `real` is: "validation", "train" or "all"
    held_out: bool  # whether the model was not trained on `real`, as far as the names of the data tell
    same_source: bool  # whether `real` and `train` are parts of the same data
    options: DataConfig
    name: str

    @property
    def classes(self) -> list[str]:
        """The names of the classes of the data."""
        return list(getattr(self.real, "classes", []))


def is_run(source: Any) -> bool:
    """Return whether a path is the folder of a model."""
    return isinstance(source, str | os.PathLike) and all((Path(source) / name).is_file() for name in (CONFIG, WEIGHTS))


def open_model(source: Source, overrides: Sequence[str], device: torch.device) -> Model | None:
    """Open the model to evaluate; return None if `source` is samples.

    `source` is the folder of a run, a hub id (`user/name`, if there is no such folder or file) or a
    `GaussianDiffusion`. Raises `UsageError` if the folder has neither a model nor samples.
    """
    if isinstance(source, GaussianDiffusion):
        config = load_config(None, overrides)
        config.diffusion = source.config
        config.model = getattr(source.model, "config", config.model)
        return Model(source, config, type(source.model).__name__, weights_digest(source), None)
    if not isinstance(source, str | os.PathLike):
        return None
    here = Path(source)
    if not is_run(source) and (here.exists() or is_pattern(source)):
        if any((here / name).exists() for name in (CONFIG, WEIGHTS, RUN)):
            find_model(source)  # raises an error that names the missing file
        return None
    folder = find_model(source)
    config = load_config(folder / CONFIG, overrides)
    diffusion = GaussianDiffusion.from_pretrained(folder, device=device)
    stored = read_metadata(folder / WEIGHTS).get("sha256")
    digest = f"sha256:{stored}" if stored else weights_digest(diffusion)
    return Model(diffusion, config, os.fspath(source), digest, folder if here.is_dir() else None)


def is_pattern(source: str | os.PathLike[str]) -> bool:
    """Return whether a name is a pattern of shards or a Hugging Face dataset, not a path or a hub id."""
    name = os.fspath(source)
    return name.startswith(HUB) or "{" in name


def weights_digest(diffusion: GaussianDiffusion) -> str:
    """Return the digest of the weights of a model in memory."""
    from rin_video.tensor_files import tensors_digest

    return "sha256:" + tensors_digest(
        {name: tensor.detach().cpu() for name, tensor in diffusion.model.state_dict().items()}
    )


def open_reference(
    model: Model | None,
    samples: Source,
    data: Data | None,
    split: SplitOption,
    overrides: Sequence[str],
    scratch: Path,
) -> tuple[Reference, tuple[int, ...]]:
    """Open the real samples, and return them with the shape (C, *grid) of a sample.

    `data` is a folder, a dataset, or the folder of a run, which stands for its data with its options. Without `data`,
    it is that of the model's training. `scratch` is a folder for an index of the data. Raises `UsageError` if there is
    no data, or no such split.
    """
    config, run = (model.config, model.folder) if model else (load_config(None, overrides), None)
    shape = model.diffusion.shape if model else None
    trained_on = config.data.path
    if is_run(data):
        run = Path(os.fspath(data))  # type: ignore[arg-type]
        config = load_config(run / CONFIG, overrides)
        trained_on = data = config.data.path
        shape = shape or shape_of(config)
        if data is None:
            raise UsageError(f"{run / CONFIG} does not name the data of training: pass the data itself as --data")
    if data is None:
        data = trained_on
    if data is None:
        raise UsageError("the real data is unknown: add --data DATA, a folder of real clips or images")
    if shape is None:
        shape = tuple(samples.shape[1:]) if hasattr(samples, "shape") else first_shape(samples)  # type: ignore
    elif model is None and isinstance(samples, str | os.PathLike):
        found = first_shape(samples)
        if tuple(found[1:]) != tuple(shape[1:]):
            here, there = ("x".join(map(str, sizes[1:])) for sizes in (found, shape))
            raise UsageError(
                f"{run} has samples of {there}, but those of {shown(os.fspath(samples))} are {here}: pass --data "
                "FOLDER, the real data, which is resized to them"
            )
    options = reading_options(config.data)
    if not isinstance(data, str | os.PathLike):
        real = adapt_data(data)
        check_shape_of(real, shape)
        return Reference(real, None, "all", model is None, False, options, "the dataset"), shape
    own = trained_on is not None and same_place(data, trained_on)
    trained_with = None if run is None else load_config(run / CONFIG).data.validation
    if not own and not is_set("data.validation", None, overrides):
        options = dataclasses.replace(options, validation=None)
    known = run / INDEX if own and run is not None and (run / INDEX).is_file() else scratch / INDEX

    def opened(which: Literal["train", "validation", "all"]) -> Any:
        try:
            return clips_of(open_split(data, shape, options, which, seed=0, index=known))
        except ShortClipError as error:
            raise UsageError(f"{error.problem}: use longer clips (--data DATA)") from None

    held_out = opened("validation") if split in ("auto", "validation") else None
    if split == "validation" and held_out is None:
        raise UsageError(
            f"{shown(os.fspath(data))} has no held-out part: use --validation 0.1 in training, or name other --data"
        )
    name = os.fspath(data)
    if held_out is not None:
        unseen = model is None or not overlap(data, trained_on) or options.validation == trained_with
        return Reference(held_out, opened("train"), "validation", unseen, True, options, name), shape
    real = opened("train" if split == "train" else "all")
    train = None
    if model is not None and not own and trained_on is not None and Path(trained_on).exists():
        own_options = reading_options(config.data)
        train = clips_of(open_split(trained_on, shape, own_options, "train", seed=0, index=None))
    seen = None if trained_on is None else find_splits(trained_on)[0]
    unseen = model is None or not overlap(data, seen)
    return Reference(real, train, "train" if split == "train" else "all", unseen, False, options, name), shape


def adapt_data(data: Any) -> Any:
    """Return a dataset in memory as one that the evaluation reads; of a mixture, its clips."""
    if isinstance(data, Tensor | np.ndarray):
        data = [{"x": x} for x in torch.as_tensor(data)]
    return adapt(clips_of(data))


def clips_of(data: Any) -> Any:
    """Return the clips of a mixture of clips and images; other data is returned unchanged."""
    return data.clips if isinstance(data, MixedDataset) else data


def check_shape_of(real: Any, shape: tuple[int, ...]) -> None:
    """Raise `UsageError` if the real samples of a dataset in memory have another shape than the generated ones."""
    found = tuple(real[0]["x"].shape) if len(real) else ()
    if found != tuple(shape):
        raise UsageError(f"the samples have shape {tuple(shape)}, but the real ones have {found}: pass one shape")


def shape_of(config: Config) -> tuple[int, ...] | None:
    """Return the shape (C, *grid) of the samples of a configuration."""
    from rin_video.model.info import model_info

    return model_info(config.model).shape


def overlap(first: str | os.PathLike[str], second: str | os.PathLike[str] | None) -> bool:
    """Return whether two names of data are the same, or one is a folder within the other."""
    if second is None or is_pattern(first) or is_pattern(second):
        return second is not None and same_place(first, second)
    one, two = Path(first).resolve(), Path(second).resolve()
    return one == two or one in two.parents or two in one.parents


def same_place(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Return whether two names of data mean the same."""
    one, two = os.fspath(first), os.fspath(second)
    return one == two or (not is_pattern(one) and not is_pattern(two) and Path(one).resolve() == Path(two).resolve())
