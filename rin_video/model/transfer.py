"""Initialisation from the weights of another model: its core, and all other weights that fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rin_video.config import ModelConfig
from rin_video.config_files import load_config
from rin_video.errors import UsageError
from rin_video.files import CONFIG, WEIGHTS
from rin_video.tokenizers import make_tokenizer
from rin_video.tokenizers.positions import LearnedPosition
from rin_video.weights import check_origin, find_model, read_tensors

UNSEEN = ("num_heads", "latent_num_heads", "time_scaling", "interface_window")  # options that change no shape
CORE = (
    *UNSEEN, "dim", "dim_latent", "mlp_ratio", "latent_mlp_ratio", "self_conditioning", "latent_self_attn_depth",
    "time_conditioning", "class_conditioning", "interface_mixing", "interface_layers",
    "qk_norm", "norm_context",
)  # fmt: skip


@dataclass
class Transfer:
    """The result of `transfer_weights`: the names of the weights by what happened to them."""

    taken: list[str] = field(default_factory=list)  # copied
    fitted: list[str] = field(default_factory=list)  # interpolated, cut to the first rows, or padded with zero channels
    new: list[str] = field(default_factory=list)  # left at their initialisation
    left: list[str] = field(default_factory=list)  # of the other model, not used
    sizes: dict[str, int] = field(default_factory=dict)  # the number of elements of each weight

    def describe(self) -> str:
        """Return one line per kind of result, with the number of elements of each module."""
        words = {"loaded": self.taken, "resized": self.fitted, "initialised": self.new, "not used": self.left}
        return "\n".join(f"{word:<15}{self._list(names)}" for word, names in words.items() if names)

    def _list(self, names: list[str]) -> str:
        modules: dict[str, int] = {}
        for name in names:
            module = ".".join(name.split(".")[:2])
            modules[module] = modules.get(module, 0) + self.sizes[name]
        listed = ", ".join(f"{module} {count:,}" for module, count in modules.items())
        return f"{sum(modules.values()):,} elements: {listed}"


@torch.no_grad()
def transfer_weights(source: str | os.PathLike[str], model: Any) -> Transfer:
    """Copy the weights of another run into a `RIN`, matched by name and shape, and tokenizers by their kind.

    `source` is a run folder or a hub id. The cores must have the same widths and layers, but the number of blocks may
    differ. Learned positions of another grid are interpolated. If the number of latents differs, the first ones are
    copied. Additional input channels of convolutions (an observed mask, an x0 estimate) are zero-initialised.
    Tokenizers, class and other embeddings that do not fit keep their initialisation. Raises `UsageError` if the cores
    do not fit or have no block in common; nothing is copied then.
    """
    folder = find_model(source)
    full = load_config(folder / CONFIG)
    check_origin(folder, full)
    config = full.model
    if unlike := [name for name in UNSEEN if getattr(config, name) != getattr(model.config, name)]:
        raise _misfit(folder, f"{unlike[0]} differs", config, model.config)
    theirs = dict(_by_kind(read_tensors(folder / WEIGHTS), config))
    ours = dict(_by_kind(model.state_dict(keep_vars=True), model.config))
    grids = _position_grids(model)
    result = Transfer(sizes={name: value.numel() for name, value in (theirs | ours).items()})
    copies: list[tuple[Tensor, Tensor]] = []
    for name, mine in ours.items():
        other = theirs.get(name)
        rows = None
        if other is not None and other.shape != mine.shape:
            rows = _fit(name, other, mine, grids.get(name), config)
            if rows is None and _sees_more(name, config, model.config):
                rows = torch.zeros_like(mine)
                rows[:, : other.shape[1]] = other
        if other is not None and (other.shape == mine.shape or rows is not None):
            del theirs[name]
            (result.taken if rows is None else result.fitted).append(name)
            copies.append((mine, other) if rows is None else (mine[: len(rows)], rows))
            continue
        if other is not None and name.startswith("core.") and ".mixers." not in name:
            raise _misfit(folder, f"{name} is {_by(other)}, but {_by(mine)} in this model", config, model.config)
        result.new.append(name)
    if not any(name.startswith("core.blocks.") for name in result.taken):
        raise UsageError(f"{folder} has no block in common with this model, so there are no weights to start from")
    for mine, other in copies:
        mine.copy_(other)
    result.left = list(theirs)
    return result


def _by_kind(weights: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with those of each tokenizer named by its kind, whether it is the primary one or not."""
    first = config.tokenizers[0]
    for name, value in weights.items():
        if name.startswith("tokenizer."):
            name = f"tokenizer {first}.{name.removeprefix('tokenizer.')}"
        elif name.startswith("other_tokenizers."):
            name = f"tokenizer {name.removeprefix('other_tokenizers.')}"
        yield name, value


def _position_grids(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the grid of each learned position table in the tokenizers, by the name of its weight."""
    return {
        f"tokenizer {kind}.{name}.table": module.grid
        for kind, tokenizer in zip(model.config.tokenizers, model.tokenizers, strict=True)
        for name, module in tokenizer.named_modules()
        if isinstance(module, LearnedPosition)
    }


def _fit(name: str, other: Tensor, mine: Tensor, grid: tuple[int, ...] | None, config: ModelConfig) -> Tensor | None:
    """Return the rows of table `mine` that table `other`, of another size, can fill; None if it does not fit."""
    if other.ndim != 2 or other.shape[1:] != mine.shape[1:]:
        return None
    if name.startswith("core.latents."):
        return other[: len(mine)]
    if grid is None:
        return None
    tokenizer: Any = make_tokenizer(config, config.channels, name.split(".")[0].removeprefix("tokenizer "))
    table = LearnedPosition(tokenizer.token_grid(tokenizer.grid), other.shape[1])
    table.table.copy_(other)
    table.interpolate = True
    rows: Tensor = table(grid)
    return rows


def _sees_more(name: str, theirs: ModelConfig, ours: ModelConfig) -> bool:
    """Whether a weight belongs to a convolution over the input, and ours only adds channels at the end."""
    alike = all(getattr(theirs, option) == getattr(ours, option) for option in ("channels", "conv_width"))
    (estimate, mask), (our_estimate, our_mask) = (
        ("x0" in model.self_conditioning, model.known_mask) for model in (theirs, ours)
    )
    appended = mask <= our_mask and (estimate == our_estimate or (our_estimate and not mask))
    return name.endswith(("conv_in.0.weight", "conv_out.0.weight")) and alike and appended


def _misfit(folder: Path, reason: str, theirs: ModelConfig, ours: ModelConfig) -> UsageError:
    options = [(name, getattr(theirs, name)) for name in CORE if getattr(theirs, name) != getattr(ours, name)]
    return UsageError(
        f"the core of {folder} does not fit: {reason}. It was built with "
        + " ".join(f"model.{name}={value}" for name, value in options).replace("None", "null")
    )


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
