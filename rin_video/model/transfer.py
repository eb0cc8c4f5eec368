"""Starting from another model: the core, and whatever else fits."""

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
from rin_video.tokenizers import make_tokenizer, tokenizer_names
from rin_video.tokenizers.positions import LearnedPosition
from rin_video.weights import check_origin, find_model, read_tensors

UNSEEN = ("num_heads", "latent_num_heads", "time_scaling")  # what no shape tells
CORE = (
    *UNSEEN, "dim", "dim_latent", "mlp_ratio", "latent_mlp_ratio", "self_conditioning", "latent_self_attn_depth",
    "time_conditioning", "class_conditioning", "interface_mixing", "qk_norm", "norm_context",
)  # fmt: skip


@dataclass
class Transfer:
    """What came of bringing weights over: names of the new model's weights, and of those that found no place."""

    taken: list[str] = field(default_factory=list)
    fitted: list[str] = field(default_factory=list)  # tables read in between, or their first rows
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """A line for each kind, by module."""
        words = {"taken": self.taken, "fitted to size": self.fitted, "new": self.new, "left behind": self.left}
        return "\n".join(f"{word:<15}{self._list(names)}" for word, names in words.items() if names)

    def _list(self, names: list[str]) -> str:
        modules: dict[str, int] = {}
        for name in names:
            module = ".".join(name.split(".")[:2])
            modules[module] = modules.get(module, 0) + self.sizes[name]
        listed = ", ".join(f"{module} {count:,}" for module, count in modules.items())
        return f"{sum(modules.values()):,} numbers: {listed}"


@torch.no_grad()
def transfer_weights(source: str | os.PathLike[str], model: Any) -> Transfer:
    """Copy the weights of another run into a `RIN`, by name and shape; tokenizers are matched by their kind.

    `source` is a folder that training wrote, or a hub id. The core must be as wide and its units alike: else a
    `UsageError`, and nothing is copied. Blocks may be more or fewer. Learned positions of another grid are
    interpolated; of the latents the first are taken where their number differs. Further input channels of convolutions
    (a mask, an estimate) start at zero. Tokenizers, classes and embeddings that do not fit stay new.
    """
    folder = find_model(source)
    config = load_config(folder / CONFIG).model
    check_origin(folder, load_config(folder / CONFIG))
    if unlike := [name for name in UNSEEN if getattr(config, name) != getattr(model.config, name)]:
        raise _misfit(folder, f"it has another {unlike[0]}", config, model.config)
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
            raise _misfit(folder, f"{name} is {_by(other)} there, {_by(mine)} here", config, model.config)
        result.new.append(name)
    if not any(name.startswith("core.blocks.") for name in result.taken):
        raise UsageError(f"{folder} has no block in common with this model, there is nothing to start from")
    for mine, other in copies:
        mine.copy_(other)
    result.left = list(theirs)
    return result


def _by_kind(weights: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Weights with the tokenizers' called by their kind, wherever a model keeps them."""
    first = tokenizer_names(config)[0]
    for name, value in weights.items():
        if name.startswith("tokenizer."):
            name = f"tokenizer {first}.{name.removeprefix('tokenizer.')}"
        elif name.startswith("other_tokenizers."):
            name = f"tokenizer {name.removeprefix('other_tokenizers.')}"
        yield name, value


def _position_grids(model: Any) -> dict[str, tuple[int, ...]]:
    """The grid of every learned position code of a model's tokenizers."""
    return {
        f"tokenizer {kind}.{name}.table": module.grid
        for kind, tokenizer in zip(tokenizer_names(model.config), model.tokenizers, strict=True)
        for name, module in tokenizer.named_modules()
        if isinstance(module, LearnedPosition)
    }


def _fit(name: str, other: Tensor, mine: Tensor, grid: tuple[int, ...] | None, config: ModelConfig) -> Tensor | None:
    """A table of another size as the first rows of ours; None where it cannot be."""
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
    return table(grid)


def _sees_more(name: str, theirs: ModelConfig, ours: ModelConfig) -> bool:
    """Whether a weight is of a convolution that sees the input, and ours only has channels after theirs."""
    alike = all(getattr(theirs, option) == getattr(ours, option) for option in ("channels", "conv_width"))
    (estimate, mask), (our_estimate, our_mask) = (
        ("x0" in model.self_conditioning, model.known_mask) for model in (theirs, ours)
    )
    in_order = mask <= our_mask and (estimate == our_estimate or (our_estimate and not mask))
    return name.endswith(("conv_in.0.weight", "conv_out.0.weight")) and alike and in_order


def _misfit(folder: Path, reason: str, theirs: ModelConfig, ours: ModelConfig) -> UsageError:
    options = [(name, getattr(theirs, name)) for name in CORE if getattr(theirs, name) != getattr(ours, name)]
    return UsageError(
        f"the core of {folder} does not fit: {reason}. It was built with "
        + " ".join(f"model.{name}={value}" for name, value in options).replace("None", "null")
    )


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
