"""Every option, with its default and its meaning: dataclass < YAML preset < key=value.

OmegaConf merges and checks; it does not leave this file. Importing it costs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rin_video.errors import UsageError


@dataclass
class ModelConfig:
    """A RIN: a tokenizer and the core. The defaults are the published block."""

    dim: int = 256  # width of an interface token
    image_size: Any = None  # height and width: one number, or [height, width]
    patch_size: Any = 4  # one number, or one for each axis: [height, width], [frames, height, width]
    frames: int | None = None  # frames of a clip; none: images
    channels: int = 3
    sequence_length: int | None = None  # for the tokenizer `sequence`
    tokenizer: str = "auto"  # auto (by frames), image, tube, sequence, a registered name; tube+image: one core for both
    position: str = "learned"  # learned, sincos, sincos_learned, coordinate
    coordinate_range: float | None = 1000.0  # sin-cos positions run from 0 to this along an axis; none: 0, 1, 2, ...
    dual_patchnorm: bool = False  # LayerNorm on the raw patch too
    conv_width: int = 0  # channels of convolutions around the patches, at full resolution; 0: none

    depth: int = 6  # blocks of read, compute, write
    latent_self_attn_depth: Any = 2  # compute layers in a block, or one number for each block (0: it only reads)
    num_latents: int = 256  # the tokens of time and class are among them
    dim_latent: int | None = None  # width of a latent; none: dim
    num_heads: int = 8  # heads of read and write
    latent_num_heads: int = 16  # heads of the compute layers
    mlp_ratio: float = 4  # hidden width of the interface's feed-forward
    latent_mlp_ratio: float = 4  # hidden width of the latents' feed-forward
    latent_position: str = "learned"  # learned, sincos, sincos_learned
    dropout: float = 0.0  # in the feed-forward of the compute layers
    drop_path: float = 0.0  # whole residual branches of the compute layers

    known_mask: bool = False  # one more input channel says which cells are given: for diffusion.known and contexts
    num_classes: int = 0  # 0: no labels
    embedding_dim: int = 0  # width of the vectors that come with a sample, of a text or any other signal; 0: none
    embedding_tokens: int = 1  # how many of them at most
    time_conditioning: str = "latent"  # latent, interface (a token that is only read), adaln
    class_conditioning: str = "latent"  # the same
    embedding_conditioning: str = "interface"  # latent, interface
    self_conditioning: str = "latent"  # none, or what is handed on, joined by +: latent, interface, x0
    time_scaling: float = 1000.0  # gamma is multiplied by this before its sin-cos code

    interface_mixing: str = "none"  # none, linear_attention, conv, linear_attention+conv: before each read
    qk_norm: bool = False  # LayerNorm on the queries and keys of each head
    norm_context: bool = False  # LayerNorm on what read and write attend to

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _choice(f"model.{name}", getattr(self, name), choices)
        for name, choices in _COMBINATIONS.items():
            value = getattr(self, name)
            if value != "none":
                for part in str(value).split("+"):
                    _choice(f"model.{name}", part, choices)
        for name in ("dim", "channels", "depth", "num_latents", "num_heads", "latent_num_heads", "embedding_tokens"):
            _at_least(f"model.{name}", getattr(self, name), 1, int)
        for name in ("frames", "sequence_length", "dim_latent"):
            if getattr(self, name) is not None:
                _at_least(f"model.{name}", getattr(self, name), 1, int)
        for name in ("num_classes", "embedding_dim", "conv_width"):
            _at_least(f"model.{name}", getattr(self, name), 0, int)
        for name in ("mlp_ratio", "latent_mlp_ratio", "time_scaling"):
            _above("model", name, getattr(self, name), 0)
        for name in ("dropout", "drop_path"):
            _within(f"model.{name}", getattr(self, name), 0, 1)
        for name in ("dual_patchnorm", "qk_norm", "norm_context", "known_mask"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"model.{name} is {getattr(self, name)!r}: it is true or false")

    @property
    def height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width)."""
        return _numbers("model.image_size", self.image_size, 2, "height, width")  # type: ignore[return-value]

    def patch_sizes(self, num_axes: int, names: str) -> tuple[int, ...]:
        """`patch_size` as one number for each axis. A single number serves images and sequences only.

        Where a model has several tokenizers, one of fewer axes takes the last numbers: an image the height and width.
        """
        if "+" in self.tokenizer and isinstance(self.patch_size, list | tuple) and len(self.patch_size) > num_axes:
            return _numbers("model.patch_size", self.patch_size[-num_axes:], num_axes, names)
        if isinstance(self.patch_size, int) and num_axes == 3:
            p = self.patch_size
            raise UsageError(f"model.patch_size is {p}, tubes need three numbers ({names}): for example [2,{p},{p}]")
        return _numbers("model.patch_size", self.patch_size, num_axes, names)

    @property
    def compute_layers(self) -> tuple[int, ...]:
        """Compute layers of each block, one number a block."""
        layers = self.latent_self_attn_depth
        layers = [layers] * self.depth if isinstance(layers, int) else layers
        if not isinstance(layers, list | tuple) or len(layers) != self.depth or any(not _whole(n, 0) for n in layers):
            raise UsageError(
                f"model.latent_self_attn_depth {layers} must be one number or {self.depth} (model.depth), all whole"
            )
        return tuple(layers)


_CONDITIONING = ("latent", "interface", "adaln")
_CHOICES = {
    "position": ("learned", "sincos", "sincos_learned", "coordinate"),
    "latent_position": ("learned", "sincos", "sincos_learned"),
    "time_conditioning": _CONDITIONING,
    "class_conditioning": _CONDITIONING,
    "embedding_conditioning": ("latent", "interface"),
}
_COMBINATIONS = {  # none, or some of these joined by +
    "self_conditioning": ("latent", "interface", "x0"),
    "interface_mixing": ("linear_attention", "conv"),
}


# The first k frames, the last k, some at both ends, some anywhere, boxes in space and time: see rin_video/known.py.
KNOWN_KINDS = ("none", "first", "last", "ends", "frames", "boxes")


@dataclass
class DiffusionConfig:
    """What the network learns to predict, and at which noise levels."""

    timesteps: int = 1000  # sampling steps at most, where none are asked for
    noise_schedule: str = "sigmoid"  # linear, cosine, cosine_simple, sigmoid, rectified_flow
    schedule_kwargs: dict[str, float] = field(default_factory=dict)  # start, end, tau of cosine and sigmoid
    objective: str = "v"  # eps, x0, v, velocity (of rectified flow)
    train_prob_self_cond: float = 0.9  # share of the samples that see the result of a first pass
    self_cond_gap: float = 0.0  # the first pass is at t + U(0, gap): 1 / steps of the sampler helps few steps
    loss_weight: str = "none"  # none, min_snr, p2, sigmoid, power (between x0 and v)
    loss_weight_kwargs: dict[str, float] = field(default_factory=dict)  # their parameters: see objectives.py
    time_sampling: str = "uniform"  # uniform, low_discrepancy (evenly over a forward pass), logit_normal
    time_sampling_kwargs: dict[str, float] = field(default_factory=dict)  # mean, std of logit_normal
    scale: float = 1.0  # b: multiplies the data; below 1 makes every noise level noisier
    label_dropout: float = 0.0  # share of the samples that lose their label, for guidance
    known: dict[str, float] = field(default_factory=dict)  # what training gives, by weight: KNOWN_KINDS
    known_frames: list[int] = field(default_factory=list)  # least and most frames given; none: 1 to half
    clip_x0: str = "static"  # x0 estimates while sampling: static (to the data's range), dynamic, none

    def __post_init__(self) -> None:
        _choice("time_sampling", self.time_sampling, ("uniform", "low_discrepancy", "logit_normal"))
        _choice("clip_x0", self.clip_x0, ("static", "dynamic", "none"))
        _at_least("timesteps", self.timesteps, 1, int)
        for name in ("train_prob_self_cond", "self_cond_gap", "label_dropout"):
            _within(name, getattr(self, name), 0, 1)
        _above("diffusion", "scale", self.scale, 0)
        if unknown := set(self.time_sampling_kwargs) - (
            {"mean", "std"} if self.time_sampling == "logit_normal" else set()
        ):
            raise UsageError(f"time_sampling {self.time_sampling} has no parameter {', '.join(sorted(unknown))}")
        _above("diffusion.time_sampling_kwargs", "std", self.time_sampling_kwargs.get("std", 1.0), 0)
        for kind, weight in self.known.items():
            _choice("diffusion.known", kind, KNOWN_KINDS)
            _at_least(f"diffusion.known.{kind}", weight, 0, float)
        if self.known and not sum(self.known.values()):
            raise UsageError(f"diffusion.known is {self.known}: some weight must be above 0")
        if self.known_frames:
            if len(self.known_frames) != 2 or any(not _whole(n, 1) for n in self.known_frames):
                raise UsageError(f"diffusion.known_frames is {list(self.known_frames)}: it takes two numbers from 1 on")
            _at_least("the second of diffusion.known_frames", self.known_frames[1], self.known_frames[0], int)


@dataclass
class DataConfig:
    """Which files, and how a sample is cut from one."""

    path: str | None = None  # a folder, one file, shards {000..123}.tar, or hf:NAME
    images: str | None = None  # images to mix with the clips, for model.tokenizer=tube+image
    image_ratio: float = 0.5  # share of the steps that are of images
    embeddings: bool = False  # vectors beside the files (x.npy, x.safetensors beside x.mp4) as conditions
    text_encoder: str | None = None  # captions (x.txt beside x.mp4) through it as conditions: folder or hub id
    caption_tokens: int = 32  # vectors of a caption at most; 1: their mean
    stride: int = 1  # source frames from one frame of a clip to the next
    fps: float | None = None  # resample clips to this rate instead of a stride
    span: str = "window"  # window: as stride and fps say; whole: frames from all over the file
    sampling: str = "clips"  # clips: every file as often; time: long files as often as clips fit into them
    windows: int = 1  # clips from one file (or, over time, from one stretch) in an epoch
    avoid_cuts: bool = False  # no clip goes over a change of scene
    crop: str = "center"  # center, random
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # range of a crop's sides, 1: the largest
    augment_horizontal_flip: bool = False  # half of the samples mirrored
    augment_color: float = 0.0  # strength of changes in brightness, contrast, saturation and hue, 0 to 1
    augment_reverse: bool = False  # half of the clips backwards
    augment_speed: list[float] = field(default_factory=lambda: [1.0, 1.0])  # range of the speed, 2: twice as fast
    buckets: list[str] = field(default_factory=list)  # shapes in one run: 48x80, or 16x48x80 with frames; none: one
    decoder: str = "auto"  # auto (torchcodec where it works, else pyav), torchcodec, decord, pyav, pillow
    num_workers: int = 2  # processes that read; 0: the training process, which a crash or a hang then ends
    prefetch: int = 2  # batches that each of these has ready
    strict: bool = False  # refuse to start where a file cannot be used
    max_failures: int = 100  # samples that may fail later, each replaced by another, before a run stops
    read_timeout: float = 60.0  # seconds for a file to be read, or a loader's process to start, before it is given up
    max_pixels: int = 100_000_000  # of a frame or an image: more is taken for a decompression bomb
    allow_pipe: bool = False  # shards may be pipe:COMMAND, which is run
    classes: list[str] = field(default_factory=list)  # names of the sub-folders, as training found them

    def __post_init__(self) -> None:
        _choice("data.crop", self.crop, ("center", "random"))
        _choice("data.span", self.span, ("window", "whole"))
        _choice("data.sampling", self.sampling, ("clips", "time"))
        _choice("data.decoder", self.decoder, ("auto", "torchcodec", "decord", "pyav", "pillow"))
        for name in ("stride", "windows", "prefetch", "max_pixels", "caption_tokens"):
            _at_least(f"data.{name}", getattr(self, name), 1, int)
        for name in ("num_workers", "max_failures"):
            _at_least(f"data.{name}", getattr(self, name), 0, int)
        if self.embeddings and self.text_encoder is not None:
            raise UsageError("data.embeddings and data.text_encoder both say what comes with a sample: leave one out")
        if not 0 < self.image_ratio < 1:
            raise UsageError(f"data.image_ratio is {self.image_ratio:g}: it must be above 0 and below 1")
        if self.fps is not None:
            _above("data", "fps", self.fps, 0)
            if self.stride != 1:
                raise UsageError(
                    f"data.fps={self.fps:g} and data.stride={self.stride} both choose frames: leave one out"
                )
        if self.span == "whole" and (self.fps is not None or self.stride != 1 or self.avoid_cuts):
            raise UsageError("data.span=whole takes frames from all over a file: leave out stride, fps and avoid_cuts")
        _above("data", "read_timeout", self.read_timeout, 0)
        _within("data.augment_color", self.augment_color, 0, 1)
        _range("data.crop_scale", self.crop_scale, 0.05, 1)
        _range("data.augment_speed", self.augment_speed, 0.1, 10)


@dataclass
class TrainConfig:
    """The optimisation."""

    train_num_steps: int = 100_000  # optimizer steps
    train_batch_size: int = 16  # samples of one forward pass, shared out among the processes
    gradient_accumulate_every: int = 1  # forward passes for one step
    optimizer: str = "adamw"  # adamw, lamb, muon (matrices; AdamW for the rest)
    train_lr: float = 1e-4  # the highest learning rate
    weight_decay: float = 0.01  # not on biases, norms and embeddings
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of the optimizer's two averages
    lr_schedule: str = "cosine"  # cosine, constant
    lr_cosine_portion: float = 1.0  # how much of the cosine's half period the run covers
    warmup_steps: int = 0  # the learning rate rises linearly over these
    max_grad_norm: float = 1.0  # 0: no clipping
    ema_decay: float = 0.9999  # of the averaged weights, reached by a warm-up
    ema_update_every: int = 1  # steps
    ema_sigma_rel: list[float] = field(default_factory=lambda: [0.05, 0.1])  # two lengths or more for `rin-video ema`
    ema_snapshot_every: int = 5000  # steps between what `rin-video ema` puts together
    mixed_precision: str = "no"  # no (fp32), bf16, fp16
    gradient_checkpointing: bool = False  # compute each block again for its gradient: less memory, more time
    compile: bool = False  # torch.compile the model; left out where it fails
    sharding: str = "none"  # none (every process holds the model: DDP), fsdp2 (each holds a part)
    init_from: str | None = None  # folder or hub id of a model whose weights to start with, where they fit
    seed: int = 0  # of initial weights, data order, noise and samples
    save_and_sample_every: int = 1000  # steps
    keep_checkpoints: int = 2  # states to resume from that are kept
    keep_every: int = 0  # steps; states at its multiples are kept for good, 0: none
    log_every: int = 10  # steps between lines of metrics.jsonl
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb or another one that accelerate knows

    def __post_init__(self) -> None:
        _choice("train.optimizer", self.optimizer, ("adamw", "lamb", "muon"))
        _choice("train.lr_schedule", self.lr_schedule, ("cosine", "constant"))
        _choice("train.mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        _choice("train.sharding", self.sharding, ("none", "fsdp2"))
        for name in (
            "train_num_steps",
            "train_batch_size",
            "gradient_accumulate_every",
            "save_and_sample_every",
            "ema_update_every",
            "ema_snapshot_every",
            "keep_checkpoints",
            "log_every",
        ):
            _at_least(f"train.{name}", getattr(self, name), 1, int)
        for name in ("warmup_steps", "seed", "keep_every"):
            _at_least(f"train.{name}", getattr(self, name), 0, int)
        _above("train", "train_lr", self.train_lr, 0)
        _above("train", "lr_cosine_portion", self.lr_cosine_portion, 0)
        for name in ("weight_decay", "max_grad_norm"):
            _at_least(f"train.{name}", getattr(self, name), 0, float)
        _within("train.ema_decay", self.ema_decay, 0, 1)
        for sigma_rel in self.ema_sigma_rel:
            check_sigma_rel("train.ema_sigma_rel", sigma_rel)
        if len(self.ema_sigma_rel) == 1 or len(set(self.ema_sigma_rel)) != len(self.ema_sigma_rel):
            raise UsageError(
                f"train.ema_sigma_rel is {list(self.ema_sigma_rel)}: give two lengths that differ, or none"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"train.betas is {list(self.betas)}: it takes two numbers in [0, 1)")


def check_sigma_rel(name: str, value: Any) -> None:
    """The length of an average, as a share of the training (Karras et al. 2024): 0.28 is nearly all of it."""
    _within(name, value, 0.01, 0.28)


SAMPLER_NAMES = ("ddim", "euler", "ddpm", "ddpm_small", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "heun")


@dataclass
class SampleConfig:
    """How pictures and clips are drawn, in training and by `rin-video sample`."""

    num_samples: int = 16  # how many
    steps: int = 50  # network calls, or twice as many with heun
    sampler: str = "dpmpp_2m_sde"  # one of SAMPLER_NAMES; this one and 50 by benchmarks/README.md
    sampler_kwargs: dict[str, float] = field(default_factory=dict)  # eta of ddim, churn of heun
    spacing: str | None = None  # uniform, quadratic (in t), karras, logsnr (in sigma / alpha); null: by sampler
    time_difference: float = 0.0  # how many steps further than the clock every step reaches
    schedule: str | None = None  # noise schedule; none: that of training
    schedule_kwargs: dict[str, float] = field(default_factory=dict)  # its parameters
    label: Any = None  # one class for all samples, by name or number; none: each class in turn
    guidance: float = 0.0  # weight of classifier-free guidance; 0: none
    guidance_drop: str = "label"  # what the other branch does without: label, known, label+known
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # gammas at which there is guidance
    batched_guidance: bool = True  # both branches in one forward pass; false: in two, with less memory
    guidance_rescale: float = 0.0  # 0 to 1: keeps the spread of the guided prediction
    clip_x0: str | None = None  # none: as in training
    fps: float = 8.0  # of the clips that are written

    def __post_init__(self) -> None:
        for name in ("num_samples", "steps"):
            _at_least(f"sample.{name}", getattr(self, name), 1, int)
        _choice("sample.sampler", self.sampler, SAMPLER_NAMES)
        if self.spacing is not None:
            _choice("sample.spacing", self.spacing, ("uniform", "quadratic", "karras", "logsnr"))
        if self.clip_x0 is not None:
            _choice("sample.clip_x0", self.clip_x0, ("static", "dynamic", "none"))
        _at_least("sample.time_difference", self.time_difference, 0, float)
        _within("sample.guidance_rescale", self.guidance_rescale, 0, 1)
        _at_least("sample.guidance", self.guidance, 0, float)
        _above("sample", "fps", self.fps, 0)
        interval = list(self.guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise UsageError(f"sample.guidance_interval is {interval}: it takes two gammas, 0 <= low < high <= 1")


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def class_index(label: Any, classes: Sequence[str], num_classes: int) -> int:
    """A class by name or number as its number. Raises `UsageError` for one that the model does not have."""
    if not num_classes:
        raise UsageError(f"class {label} is asked for, but the model has no classes")
    if label in classes:
        return list(classes).index(label)
    if str(label).isdecimal() and int(label) < num_classes:
        return int(label)
    names = f" ({', '.join(classes)})" if classes else ""
    raise UsageError(f"the model has no class {label}: it has 0 to {num_classes - 1}{names}")


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("rin_video.configs")
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_config(name_or_file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then a preset by name or a YAML file, then `section.key=value` overrides.

    Raises `UsageError` for an unknown preset, key or value; an unknown key names the nearest one that exists.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.structured(Config)
    layers = _layers(name_or_file, overrides)
    for origin, layer in layers:
        _check_keys(OmegaConf.to_container(layer), origin)
    for i, (origin, layer) in enumerate(layers):
        if i == len(layers) - len(overrides):
            with _plain_errors("the configuration"):
                _forget_parameters(merged, [OmegaConf.to_container(layer) for _, layer in layers[i:]])
        with _plain_errors(origin):
            merged = OmegaConf.merge(merged, layer)
    with _plain_errors("the configuration"):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


PARAMETERS = {  # of what is chosen by name
    "diffusion": {
        "noise_schedule": "schedule_kwargs",
        "loss_weight": "loss_weight_kwargs",
        "time_sampling": "time_sampling_kwargs",
    },
    "sample": {"sampler": "sampler_kwargs", "schedule": "schedule_kwargs"},
}


def _forget_parameters(merged: Any, overrides: Sequence[Any]) -> None:
    """Those of a file go where overrides choose something else, or write {} for them: a merge would keep them.

    The overrides are plain, with `${...}` as it stands: that counts as something else.
    """
    chosen = {}
    for override in overrides:
        for section, values in override.items():
            for name, value in values.items() if isinstance(values, dict) else ():
                chosen[section, name] = value
                if value == {} and hasattr(merged[section].get(name), "items"):
                    merged[section][name] = {}
    for (section, name), value in chosen.items():
        parameters = PARAMETERS.get(section, {}).get(name)
        if parameters and value != merged[section][name]:
            merged[section][parameters] = {}


def is_set(key: str, name_or_file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> bool:
    """Whether `section.key` is said by the file or the overrides, be it with its default."""
    section, name = key.split(".")
    return any(name in (layer.get(section) or {}) for _, layer in _layers(name_or_file, overrides))


def _layers(name_or_file: str | os.PathLike[str] | None, overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """What is merged onto the defaults, each with its name for errors."""
    from omegaconf import OmegaConf

    layers: list[tuple[str, Any]] = []
    if name_or_file is not None:
        text, origin = _read(name_or_file)
        layers.append((origin, _parse(text, origin)))
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"cannot read {override!r}: overrides are written section.key=value")
        with _plain_errors(override):
            layers.append((override, OmegaConf.from_dotlist([override])))
    return layers


def to_yaml(config: Config | ModelConfig) -> str:
    """The configuration as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def model_config(**options: Any) -> ModelConfig:
    """A `ModelConfig`; an unknown option is a `UsageError` that names the nearest one."""
    _check_names(options, ModelConfig, "RIN", prefix="")
    return ModelConfig(**options)


def data_config(**options: Any) -> DataConfig:
    """A `DataConfig`; an unknown option is a `UsageError` that names the nearest one."""
    _check_names(options, DataConfig, "data", prefix="")
    return DataConfig(**options)


def train_config(**options: Any) -> TrainConfig:
    """A `TrainConfig`; an unknown option is a `UsageError` that names the nearest one."""
    _check_names(options, TrainConfig, "Trainer", prefix="")
    return TrainConfig(**options)


def _read(name_or_file: str | os.PathLike[str]) -> tuple[str, str]:
    name = os.fspath(name_or_file)
    if name in presets():
        return (resources.files("rin_video.configs") / f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}"
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"no preset and no file is called {name}: the presets are {', '.join(presets())}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file: {error.reason}") from None


def _parse(text: str, origin: str) -> Any:
    from omegaconf import DictConfig, OmegaConf

    parsed = None
    with _plain_errors(origin), suppress(AssertionError):  # OmegaConf asserts on a lone number
        parsed = OmegaConf.create(text)
    if not isinstance(parsed, DictConfig):
        raise UsageError(
            f"{origin} is no mapping of sections: it starts with model:, diffusion:, data:, train:, sample:"
        )
    return parsed


def _check_keys(layer: Any, origin: str) -> None:
    sections = {f.name: f.type for f in dataclasses.fields(Config)}
    _check_names(layer, Config, origin, prefix="")
    for section, values in layer.items():
        if not isinstance(values, dict):
            raise UsageError(f"{origin}: {section} is a section: write {section}.key=value, or keys below {section}:")
        _check_names(values, globals()[str(sections[section])], origin, prefix=f"{section}.")


def _check_names(given: Any, kind: Any, origin: str, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5) or _elsewhere(str(name))
            hint = f"did you mean {prefix if near[0] in known else ''}{near[0]}?" if near else f"known are {known}"
            raise UsageError(f"{origin}: unknown key {prefix}{name}: {hint}")


def _elsewhere(name: str) -> list[str]:
    keys = [
        f"{s.name}.{f.name}" for s in dataclasses.fields(Config) for f in dataclasses.fields(globals()[str(s.type)])
    ]
    return [key for key in keys if key.split(".")[1] == name]


class _plain_errors:  # noqa: N801 (reads as a verb)
    """Turns OmegaConf's and YAML's errors into one line that says where."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        if isinstance(error, OmegaConfBaseException | YAMLError | TypeError):  # the last of a list for a mapping
            reason = " ".join(line.strip() for line in str(error).splitlines() if "object_type" not in line)
            raise UsageError(f"{self.origin}: {reason}") from None


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value} is unknown: choose {', '.join(choices)}")


def _at_least(name: str, value: Any, least: int, kind: type) -> None:
    if kind is int and not _whole(value, -(10**18)):
        raise UsageError(f"{name} is {value!r}: it must be a whole number")
    if not _number(value) or value < least:
        raise UsageError(f"{name} is {value!r}: it must be at least {least}")


def _above(section: str, name: str, value: Any, bound: float) -> None:
    if not (_number(value) and value > bound):
        raise UsageError(f"{section}.{name} is {value!r}: it must be above {bound}")


def _within(name: str, value: Any, low: float, high: float) -> None:
    if not (_number(value) and low <= value <= high):
        raise UsageError(f"{name} is {value!r}: it lies in [{low}, {high}]")


def _range(name: str, value: Any, low: float, high: float) -> None:
    if len(value) != 2 or not all(_number(n) for n in value) or not low <= value[0] <= value[1] <= high:
        raise UsageError(f"{name} is {list(value)}: it takes two numbers, the smaller one first, in [{low}, {high}]")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _numbers(name: str, value: Any, count: int, names: str) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(numbers) != count or any(not _whole(n, 1) for n in numbers):
        raise UsageError(f"{name} is {value}: it takes one number, or {count} ({names}), each at least 1")
    return numbers
