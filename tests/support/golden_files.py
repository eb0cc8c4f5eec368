"""Reference arrays of the authors' release, and conversion of their weights to our modules.

The folder is tests/golden or the environment variable RIN_GOLDEN; it may contain only some kinds of files.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from rin_video.model.rin import RIN

GOLDEN = Path(os.environ.get("RIN_GOLDEN", Path(__file__).parents[1] / "golden"))
NETWORKS = sorted(
    f for f in [*GOLDEN.glob("image_rin*.npz"), *GOLDEN.glob("video_rin*.npz")] if "predict" not in f.name
)
POSITIONS = {"learned": "learned", "sin_cos": "sincos", "sin_cos_plus_learned": "sincos_learned"}


def build(config: dict) -> RIN:
    """Build our model with the sizes of the release."""
    layers = [int(n) for n in config["num_layers"].split(",")]
    patch = [config["patch_size"]] * 2
    return RIN(
        dim=config["tape_dim"],
        image_size=[config["image_height"], config["image_width"]],
        patch_size=[config["seq_stride"], *patch] if "seq_len" in config else patch,
        frames=config.get("seq_len"),
        channels=config["image_channels"],
        position=POSITIONS[config["tape_pos_encoding"]],
        coordinate_range=config["time_scaling"],
        depth=len(layers),
        latent_self_attn_depth=layers,
        num_latents=config["latent_slots"],
        dim_latent=config["latent_dim"],
        num_heads=config["rw_num_heads"],
        latent_num_heads=config["latent_num_heads"],
        mlp_ratio=config["tape_mlp_ratio"],
        latent_mlp_ratio=config["latent_mlp_ratio"],
        latent_position=POSITIONS[config["latent_pos_encoding"]],
        num_classes=config.get("num_classes", 0),
        time_conditioning="latent" if config["time_on_latent"] else "interface",
        class_conditioning="latent" if config["cond_on_latent_n"] else "interface",
        self_conditioning=config["self_cond"].replace("tape", "interface"),
        time_scaling=config["time_scaling"],
        norm_context=config["xattn_enc_ln"],
    ).eval()


class Weights:
    """The `w.*` arrays of a file; each must be used exactly once."""

    def __init__(self, arrays) -> None:
        self.left = {name[2:]: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("w.")}

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(name)

    def linear(self, name: str) -> dict[str, torch.Tensor]:
        """Return a linear layer or convolution as (out, in); its last axes, as many as the bias has, are the output."""
        kernel, bias = self.take(f"{name}.kernel"), self.take(f"{name}.bias")
        return {"weight": kernel.reshape(-1, bias.numel()).T, "bias": bias.flatten()}

    def norm(self, name: str) -> dict[str, torch.Tensor]:
        return {"weight": self.take(f"{name}.gamma"), "bias": self.take(f"{name}.beta")}

    def feed_forward(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "norm": self.norm(f"{name}.ln"),
            "mlp.fc1": self.linear(f"{name}.dense1"),
            "mlp.fc2": self.linear(f"{name}.dense2"),
        }

    def unit(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        key, value = self.linear(f"{name}.attn.key"), self.linear(f"{name}.attn.value")
        parts = {
            "norm": self.norm(f"{name}.attn_ln"),
            "attention.to_q": self.linear(f"{name}.attn.query"),
            "attention.to_kv": {k: torch.cat([key[k], value[k]]) for k in key},
            "attention.to_out": self.linear(f"{name}.attn.out"),
        }
        if f"{name}.enc_ln.gamma" in self.left:
            parts["norm_context"] = self.norm(f"{name}.enc_ln")
        return parts | under("feed_forward", self.feed_forward(f"{name}.mlp"))


def under(prefix: str, parts: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in parts.items()}


def load_weights(model: RIN, arrays) -> None:
    """Load every array of the file into our modules; raise if one is missing, unused or has another shape."""
    w = Weights(arrays)
    parts = {
        "tokenizer.to_tokens": w.linear("stem"),
        "tokenizer.norm": w.norm("stem_ln"),
        "tokenizer.out_norm": w.norm("output_ln"),
        "tokenizer.to_patches": w.linear("output_linear"),
        "conditioner.time.mlp.0": w.linear("time_emb.dense0"),
        "conditioner.time.mlp.2": w.linear("time_emb.dense1"),
    }
    if "cond_proj.kernel" in w.left:
        parts["conditioner.label.projection"] = w.linear("cond_proj")
    tables = {
        "latent_pos_emb": "core.latents",
        "latent_pos_emb_res": "core.latents.residual",
        "tape_pos_emb": "tokenizer.position",
        "tape_pos_emb_res": "tokenizer.position.residual",
    }
    for theirs, ours in tables.items():
        if theirs in w.left:
            parts[ours] = {"table": w.take(theirs)}
    for theirs, ours in {"latent_prev": "core.latent_self_cond", "tape_prev": "core.interface_self_cond"}.items():
        if f"{theirs}_ln.gamma" in w.left:
            parts |= under(f"{ours}.feed_forward", w.feed_forward(f"{theirs}_mlp"))
            parts[f"{ours}.norm"] = w.norm(f"{theirs}_ln")
    for i, block in enumerate(model.core.blocks):
        units = {"read": "read"} | {f"process{j}": f"compute.{j}" for j in range(len(block.compute))}
        if block.write is not None:
            units["write"] = "write"
        for theirs, ours in units.items():
            parts |= under(f"core.blocks.{i}.{ours}", w.unit(f"block{i}.{theirs}"))
    assert not w.left, f"weights of the file that nothing used: {sorted(w.left)}"
    state = {f"{module}.{name}": tensor for module, tensors in parts.items() for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).movedim(-1, 1)
