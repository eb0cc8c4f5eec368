"""Every option, with its default and its meaning: dataclass < YAML preset < key=value.

OmegaConf merges and checks; it does not leave this file. Importing it costs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
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
    tokenizer: str = "auto"  # auto (by frames and image_size), image, tube, sequence, or a registered name
    position: str = "learned"  # learned, sincos, sincos_learned, coordinate
    coordinate_range: float | None = 1000.0  # sin-cos positions run from 0 to this along an axis; none: 0, 1, 2, ...
    dual_patchnorm: bool = False  # LayerNorm on the raw patch too

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

    num_classes: int = 0  # 0: no labels
    time_conditioning: str = "latent"  # latent, interface (a token that is only read), adaln
    class_conditioning: str = "latent"  # the same
    self_conditioning: str = "latent"  # none, or what is handed on, joined by +: latent, interface, x0
    time_scaling: float = 1000.0  # gamma is multiplied by this before its sin-cos code

    interface_mixing: str = "none"  # none, linear_attention, conv, linear_attention+conv: before each read
    qk_norm: bool = False  # LayerNorm on the queries and keys of each head
    norm_context: bool = False  # LayerNorm on what read and write attend to

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            for part in str(getattr(self, name)).split("+"):
                _choice(f"model.{name}", part, choices)
        for name in ("dim", "channels", "depth", "num_latents", "num_heads", "latent_num_heads"):
            _positive(f"model.{name}", getattr(self, name))

    @property
    def height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width)."""
        return _numbers("model.image_size", self.image_size, 2, "height, width")  # type: ignore[return-value]

    def patch_sizes(self, num_axes: int, names: str) -> tuple[int, ...]:
        """`patch_size` as one number for each axis. A single number serves images and sequences only."""
        if isinstance(self.patch_size, int) and num_axes == 3:
            p = self.patch_size
            raise UsageError(f"model.patch_size is {p}, tubes need three numbers ({names}): for example [2,{p},{p}]")
        return _numbers("model.patch_size", self.patch_size, num_axes, names)

    @property
    def compute_layers(self) -> tuple[int, ...]:
        """Compute layers of each block, one number a block."""
        layers = self.latent_self_attn_depth
        if isinstance(layers, int):
            layers = [layers] * self.depth
        if len(layers) != self.depth or any(not isinstance(n, int) or n < 0 for n in layers):
            raise UsageError(
                f"model.latent_self_attn_depth {list(layers)} must be one number or {self.depth} (model.depth)"
            )
        return tuple(layers)


_CONDITIONING = ("latent", "interface", "adaln")
_CHOICES = {
    "position": ("learned", "sincos", "sincos_learned", "coordinate"),
    "latent_position": ("learned", "sincos", "sincos_learned"),
    "time_conditioning": _CONDITIONING,
    "class_conditioning": _CONDITIONING,
    "self_conditioning": ("none", "latent", "interface", "x0"),
    "interface_mixing": ("none", "linear_attention", "conv"),
}


@dataclass
class DiffusionConfig:
    """What the network learns to predict, and at which noise levels."""

    timesteps: int = 1000  # sampling steps where none are asked for
    noise_schedule: str = "sigmoid"  # linear, cosine, cosine_simple, sigmoid, rectified_flow
    schedule_kwargs: dict[str, float] = field(default_factory=dict)  # start, end, tau of cosine and sigmoid
    objective: str = "v"  # eps, x0, v, velocity (of rectified flow)
    train_prob_self_cond: float = 0.9  # share of the samples that see the result of a first pass
    self_cond_gap: float = 0.0  # the first pass is at t + U(0, gap): 1 / steps of the sampler helps few steps
    loss_weight: str = "none"  # none, min_snr, p2, sigmoid
    loss_weight_kwargs: dict[str, float] = field(default_factory=dict)  # gamma of min_snr; gamma, k of p2; bias
    time_sampling: str = "uniform"  # uniform, logit_normal
    time_sampling_kwargs: dict[str, float] = field(default_factory=dict)  # mean, std of logit_normal
    scale: float = 1.0  # b: multiplies the data; below 1 makes every noise level noisier
    label_dropout: float = 0.0  # share of the samples that lose their label, for guidance
    clip_x0: str = "static"  # x0 estimates while sampling: static (to the data's range), dynamic, none

    def __post_init__(self) -> None:
        _choice("time_sampling", self.time_sampling, ("uniform", "logit_normal"))
        _choice("clip_x0", self.clip_x0, ("static", "dynamic", "none"))
        for name in ("train_prob_self_cond", "self_cond_gap", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it lies in [0, 1]")
        if self.scale <= 0:
            raise UsageError(f"scale is {self.scale}: it must be above 0")
        if unknown := set(self.time_sampling_kwargs) - ({"mean", "std"} if self.time_sampling != "uniform" else set()):
            raise UsageError(f"time_sampling {self.time_sampling} has no parameter {', '.join(sorted(unknown))}")


@dataclass
class DataConfig:
    """Which files, and how a sample is cut from one."""

    path: str | None = None  # a folder of images or clips, or one file
    stride: int = 1  # source frames from one frame of a clip to the next
    fps: float | None = None  # resample clips to this rate instead of a stride
    crop: str = "center"  # center, random
    augment_horizontal_flip: bool = False
    decoder: str = "auto"  # auto, decord, pyav
    num_workers: int = 2  # processes that read; 0: in the training process

    def __post_init__(self) -> None:
        _choice("data.crop", self.crop, ("center", "random"))


@dataclass
class TrainConfig:
    """The optimisation."""

    train_num_steps: int = 100_000
    train_batch_size: int = 16  # samples of one forward pass, per process
    gradient_accumulate_every: int = 1  # forward passes for one step
    optimizer: str = "adamw"  # adamw, lamb
    train_lr: float = 1e-4
    weight_decay: float = 0.01  # not on biases, norms and embeddings
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    lr_schedule: str = "cosine"  # cosine, constant
    lr_cosine_portion: float = 1.0  # how much of the cosine's half period the run covers
    warmup_steps: int = 0
    max_grad_norm: float = 1.0  # 0: no clipping
    ema_decay: float = 0.9999
    ema_update_every: int = 1
    mixed_precision: str = "no"  # no (fp32), bf16, fp16
    seed: int = 0
    save_and_sample_every: int = 1000
    keep_checkpoints: int = 2  # states to resume from that are kept
    log_every: int = 10  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        _choice("train.optimizer", self.optimizer, ("adamw", "lamb"))
        _choice("train.lr_schedule", self.lr_schedule, ("cosine", "constant"))
        _choice("train.mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        for name in ("train_num_steps", "train_batch_size", "gradient_accumulate_every", "save_and_sample_every"):
            _positive(f"train.{name}", getattr(self, name))


@dataclass
class SampleConfig:
    """How pictures and clips are drawn, in training and by `rin-video sample`."""

    num_samples: int = 16
    steps: int = 100
    sampler: str = "ddim"  # ddim, ddpm, ddpm_small, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, heun
    sampler_kwargs: dict[str, float] = field(default_factory=dict)  # eta of ddim, churn of heun
    spacing: str = "uniform"  # of the steps: uniform, quadratic (in t), karras, logsnr (in sigma / alpha)
    time_difference: float = 0.0  # how many steps further than the clock every step reaches
    noise_schedule: str | None = None  # none: the schedule of training
    schedule_kwargs: dict[str, float] = field(default_factory=dict)
    guidance: float = 0.0  # weight of classifier-free guidance; 0: none
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # gammas at which there is guidance
    guidance_rescale: float = 0.0  # 0 to 1: keeps the spread of the guided prediction
    clip_x0: str | None = None  # none: as in training
    fps: float = 8.0  # of the clips that are written


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("rin_video.configs")
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_config(name_or_file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then a preset by name or a YAML file, then `section.key=value` overrides.

    Raises `UsageError` for an unknown preset, key or value; an unknown key names the nearest one that exists.
    """
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
    merged = OmegaConf.structured(Config)
    for origin, layer in layers:
        _check_keys(OmegaConf.to_container(layer), origin)
        with _plain_errors(origin):
            merged = OmegaConf.merge(merged, layer)
    with _plain_errors("the configuration"):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config | ModelConfig) -> str:
    """The configuration as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def model_config(**options: Any) -> ModelConfig:
    """A `ModelConfig`; an unknown option is a `UsageError` that names the nearest one."""
    _check_names(options, ModelConfig, "RIN", prefix="")
    return ModelConfig(**options)


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

    with _plain_errors(origin):
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

        if isinstance(error, OmegaConfBaseException | YAMLError):
            reason = " ".join(line.strip() for line in str(error).splitlines() if "object_type" not in line)
            raise UsageError(f"{self.origin}: {reason}") from None


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value} is unknown: choose {', '.join(choices)}")


def _positive(name: str, value: float) -> None:
    if value < 1:
        raise UsageError(f"{name} is {value}: it must be at least 1")


def _numbers(name: str, value: Any, count: int, names: str) -> tuple[int, ...]:
    numbers = (value,) * count if isinstance(value, int) else tuple(value or ())
    if len(numbers) != count or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers):
        raise UsageError(f"{name} is {value}: it takes one number, or {count} ({names}), each at least 1")
    return numbers
