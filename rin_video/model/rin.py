"""RIN: a tokenizer and the core, which together are the denoiser."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from rin_video.config import Config, ModelConfig, model_config
from rin_video.errors import UsageError
from rin_video.files import CONFIG, WEIGHTS
from rin_video.model.conditioning import Conditioner
from rin_video.model.core import RINCore
from rin_video.port import model_options
from rin_video.tokenizers import make_tokenizer, tokenizer_names
from rin_video.tokenizers.positions import LearnedPosition
from rin_video.weights import read_model, save_model

State = Tensor | tuple[Tensor, Tensor]  # latents, or (latents, interface tokens)


class RIN(nn.Module):
    """Recurrent Interface Network for images, video or sequences.

    Give it the fields of `ModelConfig` by name (or the options of the PyTorch port), or one `ModelConfig`:

        RIN(dim=256, image_size=128, patch_size=8, depth=6, num_latents=128, dim_latent=512, latent_self_attn_depth=4)
        RIN(dim=256, image_size=64, frames=16, patch_size=(2, 4, 4), num_classes=10)

    `model(x, gamma, latents=None, label=None, ...) -> (prediction, latents)`:
    `x` (B, C, *grid) is the noisy input, about unit variance; `gamma` (B,) in (0, 1] is the share of signal, 1 is
    clean; `latents` is what the previous, noisier pass returned, an opaque value; `label` (B,) integers, -1 for none;
    `embedding` (B, n, embedding_dim), zeros for none; `x0` (B, C, *grid), with x0 self-conditioning, is the previous
    estimate; `known` (B, 1, *grid), with `known_mask`, is true where `x` is clean. With several tokenizers, the number
    of axes of `x` says which. Other sizes than the built one work where the position code allows it. Raises
    `UsageError` for sizes and options that cannot be. Source: arXiv 2212.11972.
    """

    def __init__(self, config: ModelConfig | None = None, /, **options: Any) -> None:
        super().__init__()
        self.config = config = model_config(**model_options(options)) if config is None else config
        parts = config.self_conditioning.split("+")
        self.x0_self_conditioning = "x0" in parts
        self.interface_self_conditioning = "interface" in parts
        in_channels = config.channels * (1 + self.x0_self_conditioning) + config.known_mask
        first, *others = tokenizer_names(config)
        self.tokenizer: Any = make_tokenizer(config, in_channels, first)
        self.other_tokenizers = nn.ModuleDict({name: make_tokenizer(config, in_channels, name) for name in others})
        ranks = [len(shape) for shape in self.shapes]
        if len(set(ranks)) < len(ranks):
            raise UsageError(f"model.tokenizer={config.tokenizer} takes one kind of data twice: name each kind once")
        self.conditioner = Conditioner(config)
        self.core = RINCore(config, num_axes=max(ranks) - 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, *grid); of the first tokenizer's data."""
        return self.tokenizer.shape

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one sample of every kind of data that the model takes."""
        return [tokenizer.shape for tokenizer in self.tokenizers]

    @property
    def tokenizers(self) -> list[Any]:
        """All of them, the first first."""
        return [self.tokenizer, *self.other_tokenizers.values()]

    def tokenizer_for(self, x: Tensor) -> Any:
        """The tokenizer of data like `x` (B, C, *grid), by the number of axes."""
        return next((t for t in self.tokenizers if len(t.shape) == x.ndim - 1), self.tokenizer)

    def interpolate_positions(self, on: bool = True) -> RIN:
        """Let learned positions of tokens serve grids they were not made for, read in between; returns the model."""
        for tokenizer in self.tokenizers:
            for module in tokenizer.modules():
                if isinstance(module, LearnedPosition):
                    module.interpolate = on
        return self

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def self_conditioning(self) -> bool:
        """Whether a pass makes use of what the previous one handed on."""
        return self.config.self_conditioning != "none"

    @property
    def known_mask(self) -> bool:
        return self.config.known_mask

    def forward(
        self,
        x: Tensor,
        gamma: Tensor,
        *,
        latents: State | None = None,
        label: Tensor | None = None,
        embedding: Tensor | None = None,
        x0: Tensor | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        grid, tokenizer = x.shape[2:], self.tokenizer_for(x)
        inputs = [x]
        if self.x0_self_conditioning:
            inputs.append(torch.zeros_like(x) if x0 is None else x0)
        if self.known_mask:
            inputs.append(torch.zeros_like(x[:, :1]) if known is None else known.to(x))
        elif known is not None:
            raise UsageError("the model is not told which cells are known: build it with known_mask=True")
        seen = torch.cat(inputs, dim=1) if len(inputs) > 1 else x
        previous_latents, previous_tokens = latents if isinstance(latents, tuple) else (latents, None)
        tokens, new_latents = self.core(
            tokenizer.tokenize(seen),
            previous_latents,
            self.conditioner(gamma, label, embedding),
            previous_tokens=previous_tokens,
            grid=tokenizer.token_grid(grid),
        )
        prediction = tokenizer.detokenize(tokens, grid, seen)
        return prediction, (new_latents, tokens) if self.interface_self_conditioning else new_latents

    def no_weight_decay(self) -> set[str]:
        """Names of embeddings: parameters that weight decay leaves alone (biases and norms are known by their rank)."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith((".table", "conditioner.label.projection.weight"))
        }

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> RIN:
        """The model of a run: a folder with `config.yaml` and `model.safetensors`, or a hub id `user/name`.

        `user/name@revision` is a branch, tag or commit of it. A folder of that name comes first.
        """
        return load_model(source, device=device)[0]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.yaml` and `model.safetensors`, which `from_pretrained` reads."""
        save_model(folder, self, Config(model=self.config))


def load_model(source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[RIN, Config]:
    """The model of a folder or of a hub id `user/name`, in eval mode, and its configuration.

    Raises `UsageError` where the folder is not a run's, the weights do not fit the configuration, or are damaged.
    """
    weights, config, folder = read_model(source)
    try:
        model = RIN(config.model)
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG}: {error}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UsageError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {first}") from None
    for name, value in model.state_dict().items():
        if value.is_floating_point() != weights[name].is_floating_point():
            raise UsageError(f"{folder / WEIGHTS} does not fit: {name} is {weights[name].dtype}, not {value.dtype}")
    return model.to(device).eval(), config
