"""Denoisers of other packages behind a common interface, for `run.py`; `pip install '.[bench]'` installs them.

A `Contender` has `loss(x)`, for data (B, C, *grid) in [0, 1], and `sample(batch, steps)`. The diffusers models have no
training loss on pixels; they get a standard one (mean squared error of the predicted noise) and DDIM.

A `Peer` has the interface of a RIN instead, so that `GaussianDiffusion` trains and samples it with our loss and our
samplers: `video_learning.py` compares only the networks. `pip install video-diffusion-pytorch` installs one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rin_video import RIN, GaussianDiffusion
from rin_video.config import ModelConfig


@dataclass
class Contender:
    """A model with its loss and sampler."""

    name: str
    module: nn.Module
    loss: Callable[[Tensor], Tensor]
    sample: Callable[[int, int], Tensor]

    @property
    def network(self) -> nn.Module:
        """The denoiser without its loss, which is the part to compile."""
        return getattr(self.module, "model", self.module)

    @property
    def params(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)


def rin(name: str = "rin-video", *, self_cond: float = 0.9, **options: Any) -> Contender:
    """Build our model; its loss runs the self-conditioning pass in every step."""
    diffusion = GaussianDiffusion(RIN(**options), train_prob_self_cond=self_cond)
    return Contender(
        name, diffusion, diffusion, lambda batch, steps: diffusion.sample(batch_size=batch, steps=steps, sampler="ddim")
    )


EXTRAS = {  # options that are always on in the port
    "interface_mixing": "linear_attention+conv",
    "time_conditioning": "adaln",
    "self_conditioning": "latent+x0",
    "dual_patchnorm": True,
    "norm_context": True,
}


def rin_pytorch(name: str = "rin-pytorch", **options: Any) -> Contender:
    """Build the PyTorch port; like ours, it runs the self-conditioning pass in every step."""
    import rin_pytorch as port

    diffusion = port.GaussianDiffusion(port.RIN(**options), timesteps=1000, train_prob_self_cond=1.0)

    def sample(batch: int, steps: int) -> Tensor:
        diffusion.timesteps = steps
        return diffusion.sample(batch_size=batch)

    return Contender(name, diffusion, diffusion, sample)


def unet(image_size: int, dim: int, **options: Any) -> Contender:
    """Build the 2D U-Net of denoising-diffusion-pytorch, without self-conditioning."""
    import denoising_diffusion_pytorch as ddp

    diffusion = ddp.GaussianDiffusion(
        ddp.Unet(dim=dim, dim_mults=(1, 2, 4, 8), **options), image_size=image_size, sampling_timesteps=50
    )

    def sample(batch: int, steps: int) -> Tensor:
        diffusion.sampling_timesteps = steps
        return diffusion.sample(batch_size=batch)

    return Contender("denoising-diffusion-pytorch U-Net", diffusion, diffusion, sample)


def plain(name: str, model: nn.Module, call: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> Contender:
    """Add a noise-prediction loss and DDIM to a diffusers model; `call(x_t, t)` returns the predicted noise."""
    from diffusers import DDIMScheduler

    schedule = DDIMScheduler()

    def loss(x: Tensor) -> Tensor:
        x = 2 * x - 1
        eps = torch.randn_like(x)
        t = torch.randint(1000, (len(x),), device=x.device)
        return F.mse_loss(call(schedule.add_noise(x, eps, t), t), eps)

    @torch.no_grad()
    def sample(batch: int, steps: int) -> Tensor:
        device = next(model.parameters()).device
        schedule.set_timesteps(steps)
        x = torch.randn(batch, *shape, device=device)
        for t in schedule.timesteps:
            x = schedule.step(call(x, t.to(device).expand(batch)), t, x).prev_sample
        return x

    return Contender(name, model, loss, sample)


def unet3d_network(size: int, width: int, *, channels: int = 3, heads: int = 32, context: int = 64) -> nn.Module:
    """Build diffusers' UNet3DConditionModel on pixels, with `channels` inputs and vectors of `context` as its text."""
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=3,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=context,
        attention_head_dim=heads,  # diffusers' name for the number of heads
    )


def unet3d(frames: int, size: int, width: int) -> Contender:
    """Build diffusers' UNet3DConditionModel on pixels; its text input is one vector of zeros."""
    model = unet3d_network(size, width)

    def call(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, encoder_hidden_states=x.new_zeros(len(x), 1, 64)).sample

    return plain("diffusers UNet3D", model, call, (3, frames, size, size))


def latte_network(
    frames: int, size: int, heads: int, layers: int, patch: int = 4, *, channels: int = 3, head: int = 64
) -> nn.Module:
    """Build diffusers' Latte transformer on pixels; its text input has vectors as wide as the model, `heads * head`."""
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=channels,
        out_channels=3,
        num_layers=layers,
        sample_size=size,
        patch_size=patch,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=heads * head,
        cross_attention_dim=heads * head,
        video_length=frames,
    )


def latte(frames: int, size: int, heads: int, layers: int, patch: int = 4) -> Contender:
    """Build diffusers' Latte transformer on pixels, unconditional; attention alternates between frames and time."""
    model = latte_network(frames, size, heads, layers, patch)

    def call(x: Tensor, t: Tensor) -> Tensor:
        return model(x, timestep=t, encoder_hidden_states=x.new_zeros(len(x), 1, heads * 64)).sample

    return plain("diffusers Latte", model, call, (3, frames, size, size))


def dit(shape: tuple[int, ...], heads: int, layers: int, patch: tuple[int, ...], head: int = 64) -> Contender:
    """Build diffusers' DiT with full attention on images, or on clips, whose tubes become patches of a tall image."""
    from diffusers import DiTTransformer2DModel

    depth = patch[0] if len(patch) == 3 else 1
    frames = shape[1] // depth if len(shape) == 4 else 1
    height = shape[-2]
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=3 * depth,
        out_channels=3 * depth,
        num_layers=layers,
        sample_size=height,
        patch_size=patch[-1],
    )

    def call(x: Tensor, t: Tensor) -> Tensor:
        label = torch.zeros_like(t)
        tall = x if x.ndim == 4 else rearrange(x, "b c (f d) h w -> b (c d) (f h) w", d=depth)
        tokens = model.pos_embed(tall)
        for block in model.transformer_blocks:
            tokens = block(tokens, timestep=t, class_labels=label)
        cond = model.transformer_blocks[0].norm1.emb(t, label, hidden_dtype=tokens.dtype)
        shift, scale = model.proj_out_1(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1)
        patches = model.proj_out_2(model.norm_out(tokens) * (1 + scale) + shift)
        p = patch[-1]
        tall = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=frames * height // p)
        return tall if x.ndim == 4 else rearrange(tall, "b (c d) (f h) w -> b c (f d) h w", d=depth, f=frames)

    return plain("diffusers DiT", model, call, shape)


# ---- networks for our diffusion


class Peer(nn.Module):
    """A network of another package with the interface of a RIN: `model(x_t, gamma, ...) -> (prediction, None)`.

    `call(network, x, t, condition)` runs the network on inputs (B, inputs, F, H, W), times (B,) from 0 (data) to 1000
    (noise) and class vectors (B, context). Conditioning frames enter as four further channels: the clean values, zero
    elsewhere, and the observed mask. `config` describes the data: channels, frames, sizes, classes, observed mask.
    """

    self_conditioning = False  # GaussianDiffusion runs no first pass

    def __init__(
        self, network: nn.Module, call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor], config: ModelConfig,
        context: int
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.call, self.config = network, call, config
        self.shape = (config.channels, config.frames, *config.height_width)
        self.num_classes, self.known_mask = config.num_classes, config.known_mask
        self.classes = nn.Embedding(config.num_classes + 1, context)  # the last one: no class
        if not config.num_classes:
            nn.init.zeros_(self.classes.weight).requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        gamma: Tensor,
        *,
        latents: None = None,
        label: Tensor | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Predict the objective (B, C, F, H, W) from a noisy input of the same shape; the arguments are those of RIN.

        The time that the network sees is that at which the cosine schedule has the signal power `gamma` (B,).
        """
        if self.known_mask:
            mask = torch.zeros_like(x[:, :1]) if known is None else known.to(x)
            x = torch.cat([x, x * mask, mask], dim=1)
        t = 1000 * 2 / math.pi * gamma.sqrt().clamp(max=1).acos()
        number = torch.full_like(gamma, -1, dtype=torch.long) if label is None else label
        condition = self.classes(torch.where(number < 0, self.num_classes, number))
        return self.call(self.network, x, t, condition), None


def inputs_of(config: ModelConfig) -> int:
    """Return the number of input channels of a `Peer`: the noisy ones, the clean ones and the observed mask."""
    return config.channels * (1 + config.known_mask) + config.known_mask


def peer_unet3d(config: ModelConfig, width: int) -> Peer:
    """Build diffusers' UNet3DConditionModel for our diffusion; the class is its text."""
    (size, _), context = config.height_width, 64
    network = unet3d_network(size, width, channels=inputs_of(config), heads=8, context=context)
    return Peer(network, lambda net, x, t, c: net(x, t, encoder_hidden_states=c[:, None]).sample, config, context)


def peer_latte(config: ModelConfig, heads: int, layers: int) -> Peer:
    """Build diffusers' Latte transformer with heads of width 32 for our diffusion; the class is its text."""
    assert config.frames is not None
    (size, _), context = config.height_width, 32 * heads
    network = latte_network(config.frames, size, heads, layers, channels=inputs_of(config), head=32)
    return Peer(
        network, lambda net, x, t, c: net(x, timestep=t, encoder_hidden_states=c[:, None]).sample, config, context
    )


def peer_video_unet(config: ModelConfig, dim: int, mults: tuple[int, ...], heads: int) -> Peer:
    """Build the Unet3D of video-diffusion-pytorch for our diffusion; the class is its condition."""
    from video_diffusion_pytorch import Unet3D

    context = 4 * dim
    network = Unet3D(
        dim, cond_dim=context, dim_mults=mults, attn_heads=heads, channels=inputs_of(config), out_dim=config.channels
    )
    return Peer(network, lambda net, x, t, c: net(x, t, cond=c), config, context)
