"""Converts the arguments of `Trainer`, in any accepted form, to a configuration and a dataset."""

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
    """Return the configuration of a run from the options of `Trainer`."""
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
    """Return the dataset: that of a folder, which the main process indexes before the others, or `data`, adapted."""
    if not isinstance(data, str | os.PathLike):
        return adapt_for(diffusion, data)
    config.data.path = config.data.path or os.fspath(data)
    return first_then_others(
        lambda: open_dataset(data, diffusion.shape, config.data, seed=config.train.seed, index=run / INDEX)
    )
