"""Translation of the options of the PyTorch port of RIN, so that code written for it runs.

Options with the same name and meaning in both packages need no translation.
"""

from __future__ import annotations

from typing import Any

from rin_video.config import SamplerName
from rin_video.config_checks import complete_choice
from rin_video.errors import UsageError
from rin_video.ranks import num_started

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def model_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `RIN`, with those of the port translated.

    Raises `UsageError` if an option has no counterpart here, or contradicts one of ours.
    """
    ours = dict(options)
    if "heads" in ours:
        heads = ours.pop("heads")
        _put(ours, "heads", num_heads=heads, latent_num_heads=heads)
    if ours.pop("dim_head", None) is not None:
        raise UsageError("RIN: dim_head has no counterpart, a head is a layer's width divided by num_heads: set those")
    if "patches_self_attn" in ours:
        mixing = "linear_attention" if ours.pop("patches_self_attn") else "none"
        _put(ours, "patches_self_attn", interface_mixing=mixing)
    if "latent_token_time_cond" in ours:
        place = "latent" if ours.pop("latent_token_time_cond") else "adaln"
        _put(ours, "latent_token_time_cond", time_conditioning=place)
    if ours.pop("learned_sinusoidal_dim", None) is not None:
        raise UsageError("RIN: learned_sinusoidal_dim has no counterpart, the noise-level embedding is fixed and has "
                         "a quarter of the width: leave it out (time_scaling sets its frequencies)")  # fmt: skip
    if ours.pop("inverted_cross_attn", False):
        raise UsageError("RIN: inverted_cross_attn=True has no counterpart: leave it out; qk_norm=True is supported")
    ours.pop("flash", None)  # torch uses flash attention if the device supports it
    return ours


def diffusion_options(options: dict[str, Any]) -> tuple[dict[str, Any], SamplerName | None]:
    """Translate the port's options of `GaussianDiffusion`; also return the sampler that they select, or None.

    Raises `UsageError` if an option has no counterpart here.
    """
    ours = dict(options)
    sampler: SamplerName | None = None
    if "use_ddim" in ours:
        sampler = "ddim" if ours.pop("use_ddim") else "ddpm"
    if difference := ours.pop("time_difference", 0):
        raise UsageError(
            f"GaussianDiffusion: time_difference={difference:g} is in units of t in the port, but in steps here, and "
            f"an option of sampling: call diffusion.sample(steps=50, time_difference={50 * difference:g}), or set "
            "sample.time_difference"
        )
    clipped, gamma = ours.pop("min_snr_loss_weight", None), ours.pop("min_snr_gamma", None)
    if clipped is not None:
        ours["loss_weight"] = "min_snr" if clipped else "none"
    if gamma is not None and clipped:
        ours["loss_weight"] = {"name": "min_snr", "gamma": gamma}
    elif gamma is not None and clipped is None:
        raise UsageError(
            f"GaussianDiffusion: min_snr_gamma={gamma} applies to one loss weight only: "
            f"pass loss_weight={{'name': 'min_snr', 'gamma': {gamma}}}"
        )
    if parameters := ours.pop("schedule_kwargs", None):
        ours["noise_schedule"] = complete_choice(ours.get("noise_schedule"), parameters)
    return ours, sampler


def trainer_options(options: dict[str, Any], *, channels: int, is_folder: bool) -> dict[str, Any]:
    """Translate the port's options of `Trainer` to fields of `TrainConfig` and `DataConfig`.

    Raises `UsageError` if an option has no counterpart here, contradicts one of ours, or does not fit the data.
    """
    ours = dict(options)
    amp, precision = ours.pop("amp", None), ours.pop("mixed_precision_type", "fp16")
    if amp is not None:
        _put(ours, "amp", mixed_precision=precision if amp else "no")
    if not ours.pop("split_batches", True) and num_started() > 1:
        raise UsageError(
            "Trainer: split_batches=False has no counterpart, train_batch_size is the global batch size: "
            f"pass {num_started()} times as much, and leave it out"
        )
    mode = ours.pop("convert_image_to", None)
    if mode is not None and mode != MODES.get(channels):
        raise UsageError(
            f"Trainer: convert_image_to={mode!r} does not fit a model with {channels} channels; images are converted "
            "automatically to the channels of the model: "
            f"build RIN(channels={next((n for n, m in MODES.items() if m == mode), 3)})"
        )
    if ours.get("augment_horizontal_flip") and not is_folder:
        raise UsageError("Trainer: augment_horizontal_flip=True requires a folder: flip the samples in the dataset")
    return ours


def _put(ours: dict[str, Any], name: str, **values: Any) -> None:
    for key, value in values.items():
        if key in ours and ours[key] != value:
            raise UsageError(f"{name} sets {key}={value!r}, but {key}={ours[key]!r} was passed too: leave out {name}")
        ours[key] = value
