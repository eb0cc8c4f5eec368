"""The sizes of models that `rin-video train --time` chooses from, and the choice. To change the sizes, edit this file.

A size is worth its cost from a number of training samples on: with fewer, the next smaller size is better after the
same time. These numbers are estimates, not yet measurements; all sizes share the style of the preset `clips64`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Options = Mapping[str, Mapping[str, Any]]  # section -> option -> value


class Size(NamedTuple):
    """A size: its name, the training samples from which on it is the best one, and its options."""

    name: str
    least_samples: int
    options: Options


COMMON: Options = {
    "model": {
        "position": "sincos",
        "coordinate_range": None,
        "mlp_ratio": 2,
        "interface_mixing": "dense_conv",
        "norm_context": True,
        "self_conditioning": "none",
    },
    "diffusion": {
        "objective": "x0",
        "loss_weight": "balanced",
        "input_scaling": "wiener",
        "time_sampling": "low_discrepancy",
        "train_prob_self_cond": 0,
        "label_dropout": 0.1,
    },
    "train": {
        "optimizer": "muon",
        "train_batch_size": 16,
        "betas": [0.9, 0.99],
        "warmup_steps": 100,
        "mixed_precision": "auto",
        "ema_decay": 0.9999,  # with ema_warmup, the EMA spans the last tenth of the steps
        "save_and_sample_every": 5000,  # and ten times in a run
        "ema_snapshot_every": 1000,
    },
    "sample": {"num_samples": 9, "steps": 50},
}
CLIPS: Options = {  # of clips: they can be continued, too
    "model": {"known_mask": True},
    "diffusion": {"known": {"none": 1, "first": 3}},
}
SIZES = (  # parameters at 16x64x64, from the smallest to the largest
    Size(
        "tiny",  # 2.7 M
        0,
        {
            "model": {"dim": 128, "num_heads": 4, "depth": 2, "latent_self_attn_depth": 2, "interface_layers": 3}
            | {"num_latents": 32, "dim_latent": 128, "latent_num_heads": 4},
            "train": {"train_lr": 1e-2},
        },
    ),
    Size(
        "small",  # 7.7 M, as the presets clips32 and clips64
        2_000,
        {
            "model": {"dim": 256, "num_heads": 4, "depth": 2, "latent_self_attn_depth": 2, "interface_layers": 4}
            | {"num_latents": 32, "dim_latent": 128, "latent_num_heads": 4},
            "train": {"train_lr": 1e-2},
        },
    ),
    Size(
        "medium",  # 28 M
        100_000,
        {
            "model": {"dim": 384, "num_heads": 6, "depth": 3, "latent_self_attn_depth": 2, "interface_layers": 4}
            | {"num_latents": 64, "dim_latent": 256, "latent_num_heads": 8},
            "train": {"train_lr": 7e-3},
        },
    ),
    Size(
        "large",  # 60 M
        1_000_000,
        {
            "model": {"dim": 512, "num_heads": 8, "depth": 3, "latent_self_attn_depth": 3, "interface_layers": 4}
            | {"num_latents": 128, "dim_latent": 384, "latent_num_heads": 8},
            "train": {"train_lr": 5e-3},
        },
    ),
)
PATCHES = ((32, 2), (96, 4), (192, 8))  # longest side of a frame, in pixels -> height and width of a patch up to there
LARGEST_PATCH = 16  # for longer sides
FRAMES = 16  # frames of a patch, or the largest smaller number that divides those of the clip


def overrides_of(size: Size, frames: int | None, height_width: Sequence[int]) -> list[str]:
    """Return the options of a size for clips (`frames`, *`height_width`), or images without frames, as overrides."""
    patch = [next((patch for side, patch in PATCHES if max(height_width) <= side), LARGEST_PATCH)] * 2
    if frames:
        patch = [max(n for n in range(1, FRAMES + 1) if frames % n == 0), *patch]
    shared = [COMMON, CLIPS] if frames and frames > 1 else [COMMON]
    return [text for part in ({"model": {"patch_size": patch}}, *shared, size.options) for text in _overrides(part)]


def _overrides(options: Options) -> list[str]:
    return [f"{section}.{name}={json.dumps(value) if not isinstance(value, str) else value}"
            for section, values in options.items() for name, value in values.items()]  # fmt: skip


Measured = TypeVar("Measured")


class Choice(NamedTuple):
    """The chosen size and the next larger one by their place, and what was measured up to there (None: unusable)."""

    chosen: int
    larger: int | None
    measured: list[Any]


def choose_size(
    least: Sequence[int], measure: Callable[[int], Measured | None], samples: Callable[[Measured], float]
) -> Choice:
    """Choose the largest size that sees enough samples.

    `least` has the samples from which each size is best, and `samples` returns those that a measured size sees. Sizes
    are measured from the smallest on, until one does not see enough or cannot be used (None); larger ones would see
    even fewer. The smallest size is always used.
    """
    measured: list[Any] = []
    for place, needed in enumerate(least):
        measured.append(measure(place))
        enough = measured[-1] is not None and samples(measured[-1]) >= needed
        if place and not enough:
            return Choice(place - 1, place, measured)
    return Choice(len(least) - 1, None, measured)
