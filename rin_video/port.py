"""Options of the PyTorch port of RIN by their meaning here, so that code written for it runs.

Those that have the same name and meaning are not named here.
"""

from __future__ import annotations

import os
from typing import Any

from rin_video.config import DiffusionConfig, SamplerName
from rin_video.errors import UsageError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def model_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `RIN` with the port's among them translated.

    Raises `UsageError` for one that has no meaning here, or that says the same as one of ours beside it.
    """
    ours = dict(options)
    if "heads" in ours:
        heads = ours.pop("heads")
        _put(ours, "heads", num_heads=heads, latent_num_heads=heads)
    if ours.pop("dim_head", None) is not None:
        raise UsageError("RIN: dim_head is not chosen here, a head is a layer's width divided by num_heads: set that")
    if "patches_self_attn" in ours:
        mixing = "linear_attention" if ours.pop("patches_self_attn") else "none"
        _put(ours, "patches_self_attn", interface_mixing=mixing)
    if "latent_token_time_cond" in ours:
        place = "latent" if ours.pop("latent_token_time_cond") else "adaln"
        _put(ours, "latent_token_time_cond", time_conditioning=place)
    if ours.pop("learned_sinusoidal_dim", None) is not None:
        raise UsageError("RIN: learned_sinusoidal_dim has no counterpart, the code of the noise level is a fixed one "
                         "of a quarter of the width: leave it out (time_scaling sets its frequencies)")  # fmt: skip
    if ours.pop("inverted_cross_attn", False):
        raise UsageError("RIN: inverted_cross_attn=True has no counterpart: leave it out; qk_norm=True is there")
    ours.pop("flash", None)  # torch takes flash attention wherever the device has it
    return ours


def diffusion_options(options: dict[str, Any]) -> tuple[dict[str, Any], SamplerName | None]:
    """The port's options of `GaussianDiffusion` as ours, and the sampler that they choose. `UsageError` as above."""
    ours = dict(options)
    sampler: SamplerName | None = None
    if "use_ddim" in ours:
        sampler = "ddim" if ours.pop("use_ddim") else "ddpm"
    if difference := ours.pop("time_difference", 0):
        raise UsageError(
            f"GaussianDiffusion: time_difference={difference:g} counts t there and steps here, when sampling: "
            f"diffusion.sample(steps=50, time_difference={50 * difference:g}), or sample.time_difference"
        )
    clipped, gamma = ours.pop("min_snr_loss_weight", None), ours.pop("min_snr_gamma", None)
    if clipped is not None:
        ours["loss_weight"] = "min_snr" if clipped else "none"
    if gamma is not None and clipped:
        ours["loss_weight"] = {"name": "min_snr", "gamma": gamma}
    elif gamma is not None and clipped is None:
        raise UsageError(
            f"GaussianDiffusion: min_snr_gamma={gamma} is of one loss weight: "
            f"give loss_weight={{'name': 'min_snr', 'gamma': {gamma}}}"
        )
    if parameters := ours.pop("schedule_kwargs", None):
        ours["noise_schedule"] = {"name": ours.get("noise_schedule", DiffusionConfig.noise_schedule), **parameters}
    return ours, sampler


def trainer_options(options: dict[str, Any], *, channels: int, is_folder: bool) -> dict[str, Any]:
    """The port's options of `Trainer` as fields of `TrainConfig` and `DataConfig`. `UsageError` as above."""
    ours = dict(options)
    amp, precision = ours.pop("amp", None), ours.pop("mixed_precision_type", "fp16")
    if amp is not None:
        _put(ours, "amp", mixed_precision=precision if amp else "no")
    if not ours.pop("split_batches", True) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "Trainer: split_batches=False has no counterpart, train_batch_size is that of all processes together: "
            f"give {os.environ['WORLD_SIZE']} times as much, and leave it out"
        )
    mode = ours.pop("convert_image_to", None)
    if mode is not None and mode != MODES.get(channels):
        raise UsageError(
            f"Trainer: convert_image_to={mode!r} does not suit a model of {channels} channels, for which images are "
            f"converted by themselves: build RIN(channels={next((n for n, m in MODES.items() if m == mode), 3)})"
        )
    if ours.get("augment_horizontal_flip") and not is_folder:
        raise UsageError("Trainer: augment_horizontal_flip=True is for a folder: let the dataset mirror its samples")
    return ours


def _put(ours: dict[str, Any], name: str, **values: Any) -> None:
    for key, value in values.items():
        if key in ours and ours[key] != value:
            raise UsageError(f"{name} means {key}={value!r}, and {key}={ours[key]!r} is given too: leave out {name}")
        ours[key] = value
