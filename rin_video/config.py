"""Every option, with its default and its meaning: dataclass < YAML preset < key=value.

The type of a field decides how its value is read from YAML. Importing this costs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from rin_video.config_checks import (
    check_above,
    check_at_least,
    check_choice,
    check_choices,
    check_range,
    check_within,
    is_whole,
    read_numbers,
    split_parameters,
    types_of,
)
from rin_video.errors import UsageError

# The names that options take, each list here and nowhere else. The checks below and the command line's help use it, and
# it is the type of the keys of the table that implements the names: tests/test_choices.py compares the two.
LatentPositionName: TypeAlias = Literal["learned", "sincos", "sincos_learned"]
PositionName: TypeAlias = Literal[LatentPositionName, "coordinate"]
EmbeddingConditioningName: TypeAlias = Literal["latent", "interface"]  # interface: a token that is only read
ConditioningName: TypeAlias = Literal[EmbeddingConditioningName, "adaln"]
SelfConditioningName: TypeAlias = Literal["latent", "interface", "x0"]
MixingName: TypeAlias = Literal["linear_attention", "conv"]
ScheduleName: TypeAlias = Literal["linear", "cosine", "cosine_simple", "sigmoid", "rectified_flow"]
ObjectiveName: TypeAlias = Literal["eps", "x0", "v", "velocity"]  # velocity: of rectified flow
LossWeightName: TypeAlias = Literal["none", "min_snr", "p2", "sigmoid", "power"]  # power: between x0 and v
TimeSamplingName: TypeAlias = Literal["uniform", "low_discrepancy", "logit_normal"]
ClippingName: TypeAlias = Literal["static", "dynamic", "none"]  # static: to the data's range
KnownKind: TypeAlias = Literal["none", "first", "last", "ends", "frames", "boxes"]  # see rin_video/diffusion/masks.py
SpanName: TypeAlias = Literal["window", "whole"]
FileSamplingName: TypeAlias = Literal["clips", "time"]
CropName: TypeAlias = Literal["center", "random"]
DecoderName: TypeAlias = Literal["torchcodec", "decord", "pyav", "pillow"]
DecoderOption: TypeAlias = Literal["auto", DecoderName]
FrameKind: TypeAlias = Literal["image", "video"]
DataKind: TypeAlias = Literal[FrameKind, "array"]
OptimizerName: TypeAlias = Literal["adamw", "lamb", "muon"]  # muon: on matrices, AdamW for the rest
LRScheduleName: TypeAlias = Literal["cosine", "constant"]
PrecisionName: TypeAlias = Literal["no", "tf32", "bf16", "fp16"]  # no: float32; tf32: its products on a CUDA GPU
ShardingName: TypeAlias = Literal["none", "fsdp2"]  # none: every process holds the model (DDP); fsdp2: a part of it
SamplerName: TypeAlias = Literal["ddim", "euler", "ddpm", "ddpm_small", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "heun"]
SpacingName: TypeAlias = Literal["uniform", "quadratic", "karras", "logsnr"]  # the first two in t, then sigma / alpha
GuidanceDropName: TypeAlias = Literal["label", "known"]
# A name with parameters: {name: ddim, eta: 0.5}; without the name, parameters of the name that is set.
Parameters: TypeAlias = dict[str, float | str]


@dataclass
class ModelConfig:
    """A RIN: a tokenizer and the core. The defaults are the published block."""

    dim: int = 256  # width of an interface token
    image_size: int | Sequence[int] | None = None  # height and width: one number, or [height, width]
    patch_size: int | Sequence[int] = 4  # one number, or one for each axis: [height, width], [frames, height, width]
    frames: int | None = None  # frames of a clip; none: images
    channels: int = 3
    sequence_length: int | None = None  # for the tokenizer `sequence`
    tokenizer: str = "auto"  # auto (by frames), image, tube, sequence, a registered name; tube+image: one core for both
    position: PositionName = "learned"  # codes of the interface's tokens
    coordinate_range: float | None = 1000.0  # sin-cos positions run from 0 to this along an axis; none: 0, 1, 2, ...
    dual_patchnorm: bool = False  # LayerNorm on the raw patch too
    conv_width: int = 0  # channels of convolutions around the patches, at full resolution; 0: none

    depth: int = 6  # blocks of read, compute, write
    latent_self_attn_depth: int | Sequence[int] = 2  # compute layers of a block, or one number a block (0: read only)
    num_latents: int = 256  # the tokens of time and class are among them
    dim_latent: int | None = None  # width of a latent; none: dim
    num_heads: int = 8  # heads of read and write
    latent_num_heads: int = 16  # heads of the compute layers
    mlp_ratio: float = 4  # hidden width of the interface's feed-forward
    latent_mlp_ratio: float = 4  # hidden width of the latents' feed-forward
    latent_position: LatentPositionName = "learned"  # codes of the latents
    dropout: float = 0.0  # in the feed-forward of the compute layers
    drop_path: float = 0.0  # whole residual branches of the compute layers

    known_mask: bool = False  # one more input channel says which cells are given: for diffusion.known and contexts
    num_classes: int = 0  # 0: no labels
    embedding_dim: int = 0  # width of the vectors that come with a sample, of a text or any other signal; 0: none
    embedding_tokens: int = 1  # how many of them at most
    time_conditioning: ConditioningName = "latent"  # where the noise level enters
    class_conditioning: ConditioningName = "latent"  # where the label enters
    embedding_conditioning: EmbeddingConditioningName = "interface"  # where vectors enter
    self_conditioning: str = "latent"  # none, or what is handed on: SelfConditioningName, joined by +
    time_scaling: float = 1000.0  # gamma is multiplied by this before its sin-cos code

    interface_mixing: str = "none"  # none, or what comes before each read: MixingName, joined by +
    qk_norm: bool = False  # LayerNorm on the queries and keys of each head
    norm_context: bool = False  # LayerNorm on what read and write attend to

    def __post_init__(self) -> None:
        check_choices("model", self)
        for name, kind in (("self_conditioning", SelfConditioningName), ("interface_mixing", MixingName)):
            if getattr(self, name) != "none":
                for part in str(getattr(self, name)).split("+"):
                    check_choice(f"model.{name}", part, get_args(kind))
        for name in ("dim", "channels", "depth", "num_latents", "num_heads", "latent_num_heads", "embedding_tokens"):
            check_at_least(f"model.{name}", getattr(self, name), 1, int)
        for name in ("frames", "sequence_length", "dim_latent"):
            if getattr(self, name) is not None:
                check_at_least(f"model.{name}", getattr(self, name), 1, int)
        for name in ("num_classes", "embedding_dim", "conv_width"):
            check_at_least(f"model.{name}", getattr(self, name), 0, int)
        for name in ("mlp_ratio", "latent_mlp_ratio", "time_scaling"):
            check_above("model", name, getattr(self, name), 0)
        for name in ("dropout", "drop_path"):
            check_within(f"model.{name}", getattr(self, name), 0, 1)
        for name in ("dual_patchnorm", "qk_norm", "norm_context", "known_mask"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"model.{name} is {getattr(self, name)!r}: it is true or false")

    @property
    def height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width)."""
        return read_numbers("model.image_size", self.image_size, 2, "height, width")  # type: ignore[return-value]

    @property
    def latent_width(self) -> int:
        """The width of a latent: `dim_latent`, or `dim` where it is not set."""
        return self.dim_latent or self.dim

    def patch_sizes(self, num_axes: int, names: str) -> tuple[int, ...]:
        """`patch_size` as one number for each axis. A single number serves images and sequences only.

        Where a model has several tokenizers, one of fewer axes takes the last numbers: an image the height and width.
        """
        if "+" in self.tokenizer and isinstance(self.patch_size, list | tuple) and len(self.patch_size) > num_axes:
            return read_numbers("model.patch_size", self.patch_size[-num_axes:], num_axes, names)
        if isinstance(self.patch_size, int) and num_axes == 3:
            p = self.patch_size
            raise UsageError(f"model.patch_size is {p}, tubes need three numbers ({names}): for example [2,{p},{p}]")
        return read_numbers("model.patch_size", self.patch_size, num_axes, names)

    @property
    def compute_layers(self) -> tuple[int, ...]:
        """Compute layers of each block, one number a block."""
        layers = self.latent_self_attn_depth
        layers = [layers] * self.depth if isinstance(layers, int) else layers
        if not isinstance(layers, list | tuple) or len(layers) != self.depth or any(not is_whole(n, 0) for n in layers):
            raise UsageError(
                f"model.latent_self_attn_depth {layers} must be one number or {self.depth} (model.depth), all whole"
            )
        return tuple(layers)


@dataclass
class DiffusionConfig:
    """What the network learns to predict, and at which noise levels."""

    timesteps: int | None = None  # sampling steps where none are asked for; null: those of sample.steps
    noise_schedule: ScheduleName | Parameters = "sigmoid"  # signal left at a time; start, end, tau of cosine, sigmoid
    objective: ObjectiveName = "v"  # what the network predicts
    train_prob_self_cond: float = 0.9  # share of the samples that see the result of a first pass
    self_cond_gap: float = 0.0  # the first pass is at t + U(0, gap): 1 / steps of the sampler helps few steps
    loss_weight: LossWeightName | Parameters = "none"  # of the loss at a noise level; parameters: see objectives.py
    time_sampling: TimeSamplingName | Parameters = (
        "uniform"  # low_discrepancy: evenly over a batch; mean, std of logit_normal
    )
    scale: float = 1.0  # b: multiplies the data; below 1 makes every noise level noisier
    label_dropout: float = 0.0  # share of the samples that lose their label, for guidance
    known: dict[KnownKind, float] = field(default_factory=dict)  # what training gives, by weight: KnownKind
    known_frames: list[int] = field(default_factory=list)  # least and most frames given; none: 1 to half
    clip_x0: ClippingName = "static"  # of x0 estimates while sampling

    def __post_init__(self) -> None:
        check_choices("diffusion", self)
        if self.timesteps is not None:
            check_at_least("timesteps", self.timesteps, 1, int)
        for name in ("train_prob_self_cond", "self_cond_gap", "label_dropout"):
            check_within(name, getattr(self, name), 0, 1)
        check_above("diffusion", "scale", self.scale, 0)
        name, parameters = split_parameters(self.time_sampling)
        if unknown := set(parameters) - ({"mean", "std"} if name == "logit_normal" else set()):
            raise UsageError(f"time_sampling {name} has no parameter {', '.join(sorted(unknown))}")
        check_above("diffusion.time_sampling", "std", parameters.get("std", 1.0), 0)
        for kind, weight in self.known.items():
            check_choice("diffusion.known", kind, get_args(KnownKind))
            check_at_least(f"diffusion.known.{kind}", weight, 0, float)
        if self.known and not sum(self.known.values()):
            raise UsageError(f"diffusion.known is {self.known}: some weight must be above 0")
        if self.known_frames:
            if len(self.known_frames) != 2 or any(not is_whole(n, 1) for n in self.known_frames):
                raise UsageError(f"diffusion.known_frames is {list(self.known_frames)}: it takes two numbers from 1 on")
            check_at_least("the second of diffusion.known_frames", self.known_frames[1], self.known_frames[0], int)


@dataclass
class DataConfig:
    """Which files, and how a sample is cut from one."""

    path: str | None = None  # a folder, one file, shards {000..123}.tar, or hf:NAME[[:CONFIGURATION]:SPLIT]
    images: str | None = None  # images to mix with the clips, for model.tokenizer=tube+image
    image_ratio: float = 0.5  # share of the steps that are of images
    embeddings: bool = False  # vectors beside the files (x.npy, x.safetensors beside x.mp4) as conditions
    text_encoder: str | None = None  # captions (x.txt beside x.mp4) through it as conditions: folder or hub id
    caption_tokens: int = 32  # vectors of a caption at most; 1: their mean
    image_column: str | None = None  # of a Hugging Face set: images or clips; none: the first of that type
    label_column: str | None = None  # of a Hugging Face set: numbers or text; none: the first of type ClassLabel
    stride: int = 1  # source frames from one frame of a clip to the next
    fps: float | None = None  # resample clips to this rate instead of a stride
    span: SpanName = "window"  # window: as stride and fps say; whole: frames from all over the file
    sampling: FileSamplingName = "clips"  # clips: every file as often; time: long files as often as clips fit into them
    windows: int = 1  # clips from one file (or, over time, from one stretch) in an epoch
    avoid_cuts: bool = False  # no clip goes over a change of scene
    crop: CropName = "center"  # where a crop lies
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # range of a crop's sides, 1: the largest
    augment_horizontal_flip: bool = False  # half of the samples mirrored
    augment_color: float = 0.0  # strength of changes in brightness, contrast, saturation and hue, 0 to 1
    augment_reverse: bool = False  # half of the clips backwards
    augment_speed: list[float] = field(default_factory=lambda: [1.0, 1.0])  # range of the speed, 2: twice as fast
    buckets: list[str] = field(default_factory=list)  # shapes in one run: 48x80, or 16x48x80 with frames; none: one
    decoder: DecoderOption = "auto"  # auto: torchcodec where it works, else pyav
    num_workers: int = 2  # processes that read; 0: the training process, which a crash or a hang then ends
    prefetch: int = 2  # batches that each of these has ready
    strict: bool = False  # refuse to start where a file cannot be used
    max_failures: int = 100  # samples that may fail later, each replaced by another, before a run stops
    read_timeout: float = 60.0  # seconds for one file to be read before it is left out
    max_pixels: int = 100_000_000  # of a frame or an image: more is taken for a decompression bomb
    allow_pipe: bool = False  # shards may be pipe:COMMAND, which is run; files cannot set it
    classes: list[str] = field(default_factory=list)  # names of the sub-folders, as training found them

    def __post_init__(self) -> None:
        check_choices("data", self)
        for name in ("stride", "windows", "prefetch", "max_pixels", "caption_tokens"):
            check_at_least(f"data.{name}", getattr(self, name), 1, int)
        for name in ("num_workers", "max_failures"):
            check_at_least(f"data.{name}", getattr(self, name), 0, int)
        if self.embeddings and self.text_encoder is not None:
            raise UsageError("data.embeddings and data.text_encoder both say what comes with a sample: leave one out")
        if not 0 < self.image_ratio < 1:
            raise UsageError(f"data.image_ratio is {self.image_ratio:g}: it must be above 0 and below 1")
        if self.fps is not None:
            check_above("data", "fps", self.fps, 0)
            if self.stride != 1:
                raise UsageError(
                    f"data.fps={self.fps:g} and data.stride={self.stride} both choose frames: leave one out"
                )
        if self.span == "whole" and (self.fps is not None or self.stride != 1 or self.avoid_cuts):
            raise UsageError("data.span=whole takes frames from all over a file: leave out stride, fps and avoid_cuts")
        check_above("data", "read_timeout", self.read_timeout, 0)
        check_within("data.augment_color", self.augment_color, 0, 1)
        check_range("data.crop_scale", self.crop_scale, 0.05, 1)
        check_range("data.augment_speed", self.augment_speed, 0.1, 10)


@dataclass
class TrainConfig:
    """The optimisation."""

    train_num_steps: int = 100_000  # optimizer steps
    train_batch_size: int = 16  # samples of one forward pass, shared out among the processes
    gradient_accumulate_every: int = 1  # forward passes for one step
    optimizer: OptimizerName = "adamw"
    train_lr: float = 1e-4  # the highest learning rate
    weight_decay: float = 0.01  # not on biases, norms and embeddings
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of the optimizer's two averages
    lr_schedule: LRScheduleName = "cosine"  # after the warm-up
    lr_cosine_portion: float = 1.0  # how much of the cosine's half period the run covers
    warmup_steps: int = 0  # the learning rate rises linearly over these
    max_grad_norm: float = 1.0  # 0: no clipping
    ema_decay: float = 0.9999  # of the averaged weights, for one step, whatever `ema_update_every` is
    ema_warmup: float | None = 0.1  # they span at most this share of the steps done so far; null: no warm-up
    ema_update_every: int = 1  # steps
    ema_sigma_rel: list[float] = field(default_factory=lambda: [0.05, 0.1])  # two lengths or more for `rin-video ema`
    ema_snapshot_every: int = 5000  # steps between what `rin-video ema` puts together
    mixed_precision: PrecisionName = "no"  # of activations
    gradient_checkpointing: bool = False  # compute each block again for its gradient: less memory, more time
    compile: bool = False  # torch.compile the model; left out where it fails
    sharding: ShardingName = "none"  # what of the model a process holds
    init_from: str | None = None  # folder or hub id of a model whose weights to start with, where they fit
    seed: int = 0  # of initial weights, data order, noise and samples
    save_and_sample_every: int = 1000  # steps
    keep_checkpoints: int = 2  # states to resume from that are kept
    keep_every: int = 0  # steps; states at its multiples are kept for good, 0: none
    log_every: int = 10  # steps between lines of metrics.jsonl
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb or another one that accelerate knows

    def __post_init__(self) -> None:
        check_choices("train", self)
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
            check_at_least(f"train.{name}", getattr(self, name), 1, int)
        for name in ("warmup_steps", "seed", "keep_every"):
            check_at_least(f"train.{name}", getattr(self, name), 0, int)
        check_above("train", "train_lr", self.train_lr, 0)
        check_above("train", "lr_cosine_portion", self.lr_cosine_portion, 0)
        for name in ("weight_decay", "max_grad_norm"):
            check_at_least(f"train.{name}", getattr(self, name), 0, float)
        check_within("train.ema_decay", self.ema_decay, 0, 1)
        if self.ema_warmup is not None:
            check_above("train", "ema_warmup", self.ema_warmup, 0)
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
    check_within(name, value, 0.01, 0.28)


@dataclass
class SampleConfig:
    """How pictures and clips are drawn, in training and by `rin-video sample`."""

    num_samples: int = 16  # how many
    steps: int = 50  # network calls, or twice as many with heun
    sampler: SamplerName | Parameters = (
        "dpmpp_2m_sde"  # with eta of ddim, churn of heun; chosen in benchmarks/README.md
    )
    spacing: SpacingName | None = None  # of the steps; null: by sampler
    time_difference: float = 0.0  # how many steps further than the clock every step reaches
    schedule: ScheduleName | Parameters | None = None  # noise schedule; null: that of training
    label: int | str | None = None  # one class for all samples, by name or number; none: each class in turn
    guidance: float = 0.0  # weight of classifier-free guidance; 0: none
    guidance_drop: str = "label"  # what the other branch does without: GuidanceDropName, joined by +
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # gammas at which there is guidance
    batched_guidance: bool = True  # both branches in one forward pass; false: in two, with less memory
    guidance_rescale: float = 0.0  # 0 to 1: keeps the spread of the guided prediction
    clip_x0: ClippingName | None = None  # null: as in training
    precision: PrecisionName | None = None  # null: that of training, on a CPU float32
    fps: float | None = None  # of the clips that are written; none: that of the data

    def __post_init__(self) -> None:
        for name in ("num_samples", "steps"):
            check_at_least(f"sample.{name}", getattr(self, name), 1, int)
        check_choices("sample", self)
        check_at_least("sample.time_difference", self.time_difference, 0, float)
        check_within("sample.guidance_rescale", self.guidance_rescale, 0, 1)
        check_at_least("sample.guidance", self.guidance, 0, float)
        if self.fps is not None:
            check_above("sample", "fps", self.fps, 0)
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


def model_config(**options: Any) -> ModelConfig:
    """A `ModelConfig`; an unknown option is a `UsageError` that names the nearest one."""
    check_names(options, ModelConfig, "RIN", prefix="")
    return ModelConfig(**options)


def data_config(**options: Any) -> DataConfig:
    """A `DataConfig`; an unknown option is a `UsageError` that names the nearest one."""
    check_names(options, DataConfig, "data", prefix="")
    return DataConfig(**options)


def trainer_config(**options: Any) -> tuple[TrainConfig, DataConfig]:
    """Options of the Trainer by name: fields of `TrainConfig` and of `DataConfig`, which have no name in common."""
    names = {field.name for field in dataclasses.fields(DataConfig)}
    data = {name: options.pop(name) for name in names & options.keys()}
    return train_config(**options), data_config(**data)


def train_config(**options: Any) -> TrainConfig:
    """A `TrainConfig`; an unknown option is a `UsageError` that names the nearest one."""
    check_names(options, TrainConfig, "Trainer", prefix="")
    return TrainConfig(**options)


def check_names(given: Any, kind: Any, origin: str, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5) or _elsewhere(str(name))
            hint = f"did you mean {prefix if near[0] in known else ''}{near[0]}?" if near else f"known are {known}"
            raise UsageError(f"{origin}: unknown key {prefix}{name}: {hint}")


def _elsewhere(name: str) -> list[str]:
    return [f"{section}.{name}" for section, kind in types_of(Config).items() if name in types_of(kind)]
