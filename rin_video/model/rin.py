"""RIN: the denoiser, made of tokenizers, conditioning and the core."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rin_video.config import Config, ModelConfig, model_config
from rin_video.errors import UsageError
from rin_video.files import CONFIG, WEIGHTS
from rin_video.model.conditioning import Conditioner
from rin_video.model.core import RINCore
from rin_video.port import model_options
from rin_video.tokenizers import make_tokenizer
from rin_video.tokenizers.positions import LearnedPosition
from rin_video.weights import read_model, save_model

State: TypeAlias = Tensor | tuple[Tensor, Tensor]  # latents, or (latents, interface tokens)


class RIN(nn.Module):
    """Recurrent Interface Network for images, video or sequences.

    The arguments are fields of `ModelConfig` (or options of the PyTorch port, see `rin_video.port`), or one
    `ModelConfig`:

        RIN(dim=256, image_size=128, patch_size=8, depth=6, num_latents=128, dim_latent=512, latent_self_attn_depth=4)
        RIN(dim=256, image_size=64, frames=16, patch_size=(2, 4, 4), num_classes=10)

    `forward` explains the call `model(x, gamma, latents=None, label=None, ...) -> (prediction, latents)`. Raises
    `UsageError` for sizes and options that are not valid. Source: Jabri, Fleet & Chen 2022 (arXiv 2212.11972).
    """

    def __init__(self, config: ModelConfig | None = None, /, **options: Any) -> None:
        super().__init__()
        self.config = config = model_config(**model_options(options)) if config is None else config
        parts = config.self_conditioning.split("+")
        self.x0_self_conditioning = "x0" in parts
        self.interface_self_conditioning = "interface" in parts
        in_channels = config.channels * (1 + self.x0_self_conditioning) + config.known_mask
        first, *others = config.tokenizers
        self.tokenizer: Any = make_tokenizer(config, in_channels, first)
        self.other_tokenizers = nn.ModuleDict({name: make_tokenizer(config, in_channels, name) for name in others})
        ranks = [len(shape) for shape in self.shapes]
        if len(set(ranks)) < len(ranks):
            raise UsageError(
                f"model.tokenizer={config.tokenizer} has two tokenizers for one kind of data: name each kind once"
            )
        self.conditioner = Conditioner(config)
        richest = max(self.tokenizers, key=lambda tokenizer: len(tokenizer.shape))
        self.core = RINCore(config, richest.token_grid(richest.shape[1:]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, *grid), for the primary tokenizer."""
        shape: tuple[int, ...] = self.tokenizer.shape
        return shape

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of one sample for each tokenizer."""
        return [tokenizer.shape for tokenizer in self.tokenizers]

    @property
    def tokenizers(self) -> list[Any]:
        """All tokenizers; the primary one comes first."""
        return [self.tokenizer, *self.other_tokenizers.values()]

    def tokenizer_for(self, x: Tensor) -> Any:
        """Return the tokenizer for data with as many axes as `x` (B, C, *grid), or else the primary one."""
        return next((t for t in self.tokenizers if len(t.shape) == x.ndim - 1), self.tokenizer)

    def interpolate_positions(self, on: bool = True) -> RIN:
        """Interpolate learned token positions for grids of other sizes, if `on`; return the model."""
        for tokenizer in self.tokenizers:
            for module in tokenizer.modules():
                if isinstance(module, LearnedPosition):
                    module.interpolate = on
        return self

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 if the model takes no labels."""
        return self.config.num_classes

    @property
    def self_conditioning(self) -> bool:
        """Whether a pass uses the state of the previous pass."""
        return self.config.self_conditioning != "none"

    @property
    def known_mask(self) -> bool:
        """Whether the model has an input channel for the observed mask."""
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
        """Predict the objective (B, C, *grid) from a noisy input; return the prediction and the state of this pass.

        `x` (B, C, *grid) is the noisy input, with about unit variance. If there are several tokenizers, its number of
        axes selects one. Other sizes than that of the configuration work if the position code supports them. `gamma`
        (B,) in (0, 1] is the fraction of signal power: 1 is clean.

        `latents` is the state that the previous, noisier pass returned; treat it as opaque. `label` is (B,) integers
        with -1 for no class, or (B, num_classes) weights. `embedding` is (B, n, embedding_dim), zero where missing.
        `x0` (B, C, *grid) is the previous estimate of the data, for x0 self-conditioning. `known` (B, 1, *grid) is the
        observed mask, true where `x` is clean. All of these may be None. Raises `UsageError` for a condition that the
        model does not take, and for sizes that do not fit.
        """
        grid, tokenizer = x.shape[2:], self.tokenizer_for(x)
        inputs = [x]
        if self.x0_self_conditioning:
            inputs.append(torch.zeros_like(x) if x0 is None else x0)
        if self.known_mask:
            inputs.append(torch.zeros_like(x[:, :1]) if known is None else known.to(x))
        elif known is not None:
            raise UsageError("the model takes no observed mask: build it with known_mask=True")
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
        """Return the names of position and class embeddings, to which weight decay is not applied.

        Biases and norms are not listed: timm recognises them by their rank.
        """
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith((".table", "conditioner.label.projection.weight"))
        }

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> RIN:
        """Load a model from a folder with `config.yaml` and `model.safetensors`, or from the hub.

        A hub id is `user/name`, or `user/name@revision` with a branch, tag or commit. A local folder of the same name
        takes precedence. The model is in eval mode. Raises `UsageError` as `load_model` does.
        """
        return load_model(source, device=device)[0]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.yaml` and `model.safetensors` to a folder, for `from_pretrained`."""
        save_model(folder, self, Config(model=self.config))


def load_model(source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[RIN, Config]:
    """Load a model in eval mode, and its configuration, from a folder or a hub id `user/name`.

    Raises `UsageError` if the folder holds no model, if the weights are damaged, or if they do not fit the
    configuration.
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
            raise UsageError(
                f"{folder / WEIGHTS} does not fit the model: {name} is {weights[name].dtype}, not {value.dtype}"
            )
    return model.to(device).eval(), config
