"""Converts the arguments of `Trainer`, in any accepted form, to a configuration and a dataset."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rin_video.config import Config, ModelConfig, SampleConfig, trainer_config
from rin_video.datasets.adapters import adapt_for
from rin_video.datasets.open import INDEX, open_sides, split_sides
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import UsageError
from rin_video.port import trainer_options
from rin_video.training.distributed import first_then_others

log = logging.getLogger("rin_video")


def find_inputs(diffusion: GaussianDiffusion | None, data: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the diffusion and the data; their names in the PyTorch port are removed from `options`.

    Raises `UsageError` if one of them is missing, or if there are several arguments for the data.
    """
    diffusion = options.pop("diffusion_model", None) if diffusion is None else diffusion
    candidates = [data, *(options.pop(name, None) for name in ("dataset", "folder"))]
    if sum(one is not None for one in candidates) > 1:
        raise UsageError("there are several arguments for the data: pass one of data, dataset and folder")
    data = next((one for one in candidates if one is not None), None)
    if diffusion is None or data is None:
        missing = "a GaussianDiffusion" if diffusion is None else "data: pass a folder or a Dataset"
        raise UsageError(f"Trainer(diffusion, data) requires {missing}")
    return diffusion, data


def make_config(diffusion: GaussianDiffusion, data: Any, num_samples: int, options: dict[str, Any]) -> Config:
    """Return the configuration of a run from the options of `Trainer`.

    Raises `UsageError` if they are not valid, or if both `time` and `train_num_steps` set the length of the training.
    """
    if options.get("time") is not None and "train_num_steps" in options:
        raise UsageError("Trainer: time and train_num_steps both set the length of the training: pass one of them")
    channels = (diffusion.shape or (3,))[0]
    is_folder = isinstance(data, str | os.PathLike)
    train, reading = trainer_config(**trainer_options(options, channels=channels, is_folder=is_folder))
    steps = diffusion.config.timesteps or SampleConfig.steps
    sampler = diffusion.sampler or SampleConfig.sampler
    return Config(
        model=getattr(diffusion.model, "config", ModelConfig()),
        diffusion=diffusion.config,
        data=reading,
        train=train,
        sample=SampleConfig(num_samples=num_samples, steps=steps, sampler=sampler),
    )


def open_data(diffusion: GaussianDiffusion, data: Any, validation: Any, config: Config, run: Path) -> tuple[Any, Any]:
    """Return the dataset to train on and the held-out one, or None.

    `data` and `validation` are datasets, which are adapted, or folders, which the main process indexes before the
    others. `validation` may also be a share, or None: then `data.validation` of the configuration applies. Raises
    `UsageError` if the two datasets do not fit, or if `train.keep_best` has no held-out data.
    """
    if isinstance(validation, str | os.PathLike | float | int):
        name = validation if isinstance(validation, float | int) else os.fspath(validation)
        config.data, validation = replace(config.data, validation=name), None
    given = None if validation is None else adapt_for(diffusion, validation)
    options = config.data if given is None else replace(config.data, validation=None)
    where: dict[str, Any] = {"seed": config.train.seed, "index": run / INDEX, "validate": given is None}
    if isinstance(data, str | os.PathLike):
        config.data.path = config.data.path or os.fspath(data)
        sides = first_then_others(lambda: open_sides(data, diffusion.shape, options, **where))
    else:
        adapted: Any = adapt_for(diffusion, data)
        sides = first_then_others(lambda: split_sides(adapted, "the dataset", diffusion.shape, options, **where))
    if sides.note:
        log.info("validation data: %s", sides.note)
    held: Any = sides.validation if given is None else given
    if held is not None and held.classes and held.classes != sides.train.classes:
        raise UsageError(
            f"the validation data has the classes {', '.join(held.classes[:8])}, the training data "
            f"{', '.join(sides.train.classes[:8]) or 'none'}: number them in the same way"
        )
    if held is None and config.train.keep_best:
        raise UsageError(
            "train.keep_best=true chooses weights by held-out data, and there is none: set data.validation=0.05, for "
            "example"
        )
    return sides.train, held
