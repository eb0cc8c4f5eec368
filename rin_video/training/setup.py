"""What a `Trainer` is given, in any accepted form, as a configuration and a dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rin_video.config import Config, ModelConfig, SampleConfig, trainer_config
from rin_video.datasets.adapters import adapt_for
from rin_video.datasets.open import INDEX, open_dataset
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import UsageError
from rin_video.port import trainer_options
from rin_video.training.distributed import first_then_others


def find_inputs(diffusion: GaussianDiffusion | None, data: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The diffusion and the data, also by the names of the PyTorch port, which are taken out of `options`."""
    diffusion = options.pop("diffusion_model", None) if diffusion is None else diffusion
    given = [data, *(options.pop(name, None) for name in ("dataset", "folder"))]
    if sum(one is not None for one in given) > 1:
        raise UsageError("the data is given twice: give one of data, dataset and folder")
    data = next((one for one in given if one is not None), None)
    if diffusion is None or data is None:
        missing = "a GaussianDiffusion" if diffusion is None else "data: a folder, or a Dataset"
        raise UsageError(f"Trainer(diffusion, data) was given no {missing}")
    return diffusion, data


def make_config(diffusion: GaussianDiffusion, data: Any, num_samples: int, options: dict[str, Any]) -> Config:
    """The configuration of a run from the options that `Trainer` was given."""
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


def open_data(diffusion: GaussianDiffusion, data: Any, config: Config, run: Path) -> Any:
    """The dataset in a folder, looked through by the first process before the others; or a given one, adapted."""
    if not isinstance(data, str | os.PathLike):
        return adapt_for(diffusion, data)
    config.data.path = config.data.path or os.fspath(data)
    return first_then_others(
        lambda: open_dataset(data, diffusion.shape, config.data, seed=config.train.seed, index=run / INDEX)
    )
