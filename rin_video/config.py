"""All options, with their defaults and meanings. A preset or YAML file overrides the defaults, and `key=value` both.

The type of a field determines how its value is read from YAML. Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from rin_video.config_checks import (
    check_above,
    check_at_least,
    check_choice,
    check_choices,
    check_range,
    check_within,
    is_number,
    is_whole,
    read_duration,
    read_numbers,
    split_parameters,
    types_of,
)
from rin_video.errors import UsageError

# The names that options take. These lists exist only here: the checks below and the help of the command line use them,
# and they are the types of the keys of the tables that implement the names. tests/test_choices.py compares the two.
LatentPositionName: TypeAlias = Literal["learned", "sincos", "sincos_learned"]
PositionName: TypeAlias = Literal[LatentPositionName, "coordinate"]
EmbeddingConditioningName: TypeAlias = Literal["latent", "interface"]  # interface: a read-only token
ConditioningName: TypeAlias = Literal[EmbeddingConditioningName, "adaln"]
SelfConditioningName: TypeAlias = Literal["latent", "interface", "x0"]
# conv: depth-wise; local_attention: in windows, shifted in every other layer; group: in windows that never shift
MixingName: TypeAlias = Literal["linear_attention", "conv", "dense_conv", "local_attention", "group"]
ScheduleName: TypeAlias = Literal["linear", "cosine", "cosine_simple", "sigmoid", "rectified_flow"]
ObjectiveName: TypeAlias = Literal["eps", "x0", "v", "velocity"]  # velocity: that of rectified flow
# power: between x0 loss and v loss; balanced: equal parts of all noise levels, with and without known pixels
LossWeightName: TypeAlias = Literal["none", "min_snr", "p2", "sigmoid", "power", "balanced"]
InputScalingName: TypeAlias = Literal["std", "wiener"]
TimeSamplingName: TypeAlias = Literal["uniform", "low_discrepancy", "logit_normal"]
ClippingName: TypeAlias = Literal["static", "dynamic", "none"]  # static: to the range of the data
KnownKind: TypeAlias = Literal["none", "first", "last", "ends", "frames", "boxes"]  # see rin_video/diffusion/masks.py
SpanName: TypeAlias = Literal["window", "whole"]
FileSamplingName: TypeAlias = Literal["clips", "time"]
CropName: TypeAlias = Literal["center", "random"]
DecoderName: TypeAlias = Literal["torchcodec", "decord", "pyav", "pillow"]
DecoderOption: TypeAlias = Literal["auto", DecoderName]
FrameKind: TypeAlias = Literal["image", "video"]
DataKind: TypeAlias = Literal[FrameKind, "array"]
OptimizerName: TypeAlias = Literal["adamw", "lamb", "muon"]  # muon: for matrices, AdamW for other parameters
LRScheduleName: TypeAlias = Literal["cosine", "constant"]
PrecisionName: TypeAlias = Literal["no", "tf32", "bf16", "fp16"]  # no: float32; tf32: with TF32 products on CUDA
PrecisionOption: TypeAlias = Literal["auto", PrecisionName]
ShardingName: TypeAlias = Literal["none", "fsdp2"]  # none: each process holds the full model (DDP)
SamplerName: TypeAlias = Literal["ddim", "euler", "ddpm", "ddpm_small", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "heun"]
SpacingName: TypeAlias = Literal["uniform", "quadratic", "karras", "logsnr"]  # two in t, two in sigma / alpha
GuidanceDropName: TypeAlias = Literal["label", "known"]
# A name with parameters: {name: ddim, eta: 0.5}. Without a name, the parameters apply to the name that is set.
Parameters: TypeAlias = dict[str, float | str]


@dataclass
class ModelConfig:
    """The network: tokenizer, conditioning and core. The defaults build the block as published."""

    dim: int = 256  # width of the interface tokens (patches of the data)
    image_size: int | Sequence[int] | None = None  # size in pixels: one number, or [height, width]; null for sequences
    # size of the patch of a token, which must divide the size of the data: one number (images, sequences),
    # [height, width] (images) or [frames, height, width] (clips)
    patch_size: int | Sequence[int] = 4
    frames: int | None = None  # number of frames of a clip; null: images or sequences
    channels: int = 3  # channels of the data: 3 for RGB
    sequence_length: int | None = None  # length of a sample, for the tokenizer `sequence`; null for images and clips
    # auto (tube if `frames` is set, sequence if `sequence_length` is set, else image), image, tube, sequence, or a
    # registered name; tube+image: clips and images with one core
    tokenizer: str = "auto"
    position: PositionName = "learned"  # position codes of interface tokens; sincos and coordinate allow other sizes
    coordinate_range: float | None = 1000.0  # sin-cos positions go from 0 to this on each axis; null: 0, 1, 2, ...
    dual_patchnorm: bool = False  # apply a LayerNorm to the raw patches, in addition to the one on their tokens
    conv_width: int = 0  # channels of the convolutions around the patches, at full resolution; 0: no convolutions

    depth: int = 6  # number of blocks; each block reads, computes and writes
    # compute layers per block: one number, or a list with one number for each block; a block with 0 only reads
    latent_self_attn_depth: int | Sequence[int] = 2
    num_latents: int = 256  # number of latent vectors, including those that hold conditions
    dim_latent: int | None = None  # width of a latent; null: the same as `dim`
    num_heads: int = 8  # attention heads of the read and write layers
    latent_num_heads: int = 16  # attention heads of the compute layers
    mlp_ratio: float = 4  # hidden width of the feed-forward layers on interface tokens, relative to `dim`
    latent_mlp_ratio: float = 4  # hidden width of the feed-forward layers on latents, relative to `dim_latent`
    latent_position: LatentPositionName = "learned"  # position codes of the latents
    dropout: float = 0.0  # dropout probability in the feed-forward part of the compute layers; 0: none
    drop_path: float = 0.0  # probability that a sample skips a residual branch of a compute layer; 0: none

    known_mask: bool = False  # add an input channel for the observed mask, as `diffusion.known` and contexts require
    num_classes: int = 0  # number of classes; 0: the model takes no labels
    embedding_dim: int = 0  # width of the vectors (of a text or another signal) that condition a sample; 0: none
    embedding_tokens: int = 1  # maximum number of these vectors per sample
    # where the noise level enters; latent: as a latent, interface: as a read-only interface token, adaln: in the norms
    time_conditioning: ConditioningName = "latent"
    class_conditioning: ConditioningName = "latent"  # where the class label enters, with the same choices
    embedding_conditioning: EmbeddingConditioningName = "interface"  # where the embedding vectors enter
    # state that a pass receives from the previous, noisier pass: latent, interface, x0, several joined by +, or none
    self_conditioning: str = "latent"
    time_scaling: float = 1000.0  # factor of the noise level gamma before its sin-cos code

    # mixing of the tokens before each read: conv (depth-wise convolution), dense_conv, local_attention (in windows that
    # shift in every other layer), group (windows do not shift), linear_attention, several joined by +, or none
    interface_mixing: str = "none"
    interface_layers: int = 1  # number of mixing layers of each kind before each read
    # tokens per window of local_attention and group, one number per axis of the token grid, 0 for all; empty: all
    # frames x 4 x 4 for clips, 8 x 8 for images, 64 for sequences
    interface_window: list[int] = field(default_factory=list)
    qk_norm: bool = False  # apply a LayerNorm to the queries and keys of each attention head
    norm_context: bool = False  # apply a LayerNorm to what the read and write layers attend to

    def __post_init__(self) -> None:
        check_choices("model", self)
        for name, kind in (("self_conditioning", SelfConditioningName), ("interface_mixing", MixingName)):
            if getattr(self, name) != "none":
                for part in str(getattr(self, name)).split("+"):
                    check_choice(f"model.{name}", part, get_args(kind))
        for name in ("dim", "channels", "depth", "num_latents", "num_heads", "latent_num_heads", "embedding_tokens"):
            check_at_least(f"model.{name}", getattr(self, name), 1, int)
        check_at_least("model.interface_layers", self.interface_layers, 1, int)
        if any(not is_whole(n, 0) for n in self.interface_window):
            raise UsageError(
                f"model.interface_window is {list(self.interface_window)}: it must be whole numbers, 0 for all tokens"
            )
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
                raise UsageError(f"model.{name} is {getattr(self, name)!r}: it must be true or false")

    @property
    def height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width)."""
        return read_numbers("model.image_size", self.image_size, 2, "height, width")  # type: ignore[return-value]

    @property
    def latent_width(self) -> int:
        """The width of a latent: `dim_latent`, or `dim` if that is not set."""
        return self.dim_latent or self.dim

    @property
    def tokenizers(self) -> list[str]:
        """The names of the tokenizers, which `tokenizer` joins with `+`.

        `auto` is "tube" if there are `frames`, "sequence" if there is a `sequence_length`, and "image" otherwise.
        """
        if self.tokenizer == "auto":
            return ["tube" if self.frames else "sequence" if self.sequence_length else "image"]
        return self.tokenizer.split("+")

    @property
    def conditions(self) -> dict[str, tuple[ConditioningName, int]]:
        """The conditions by name: where each one enters the core, and its number of vectors."""
        found: dict[str, tuple[ConditioningName, int]] = {"time": (self.time_conditioning, 1)}
        if self.num_classes:
            found["class"] = (self.class_conditioning, 1)
        if self.embedding_dim:
            found["embedding"] = (self.embedding_conditioning, self.embedding_tokens)
        return found

    def num_conditions(self, place: ConditioningName) -> int:
        """Return the number of condition vectors that enter the core at a place; "latent" ones take latent slots."""
        return sum(count for where, count in self.conditions.values() if where == place)

    @property
    def modulation_width(self) -> int | None:
        """The width of the condition that modulates the norms (adaLN), or None if no condition does."""
        return self.latent_width if self.num_conditions("adaln") else None

    def patch_sizes(self, num_axes: int, names: str) -> tuple[int, ...]:
        """Return `patch_size` as one number per axis.

        With several tokenizers, one with fewer axes takes the last numbers: for images, height and width. Raises
        `UsageError` for a wrong number of axes, and for a single number with three axes.
        """
        if "+" in self.tokenizer and isinstance(self.patch_size, list | tuple) and len(self.patch_size) > num_axes:
            return read_numbers("model.patch_size", self.patch_size[-num_axes:], num_axes, names)
        if isinstance(self.patch_size, int) and num_axes == 3:
            p = self.patch_size
            raise UsageError(
                f"model.patch_size is {p}, but tubes need three numbers ({names}): use [2,{p},{p}], for example"
            )
        return read_numbers("model.patch_size", self.patch_size, num_axes, names)

    def interface_window_sizes(self, num_axes: int) -> tuple[int, ...]:
        """Return the tokens per window of local attention along each axis of the token grid, 0 for all.

        Raises `UsageError` if `interface_window` has another number of axes.
        """
        defaults = {1: (64,), 2: (8, 8), 3: (0, 4, 4)}
        window = tuple(self.interface_window) or defaults.get(num_axes, (4,) * num_axes)
        if len(window) != num_axes:
            raise UsageError(
                f"model.interface_window is {list(window)}: it must have {num_axes} numbers, one for each axis of the "
                "token grid"
            )
        return window

    @property
    def compute_layers(self) -> tuple[int, ...]:
        """The number of compute layers of each block."""
        layers = self.latent_self_attn_depth
        layers = [layers] * self.depth if isinstance(layers, int) else layers
        if not isinstance(layers, list | tuple) or len(layers) != self.depth or any(not is_whole(n, 0) for n in layers):
            raise UsageError(
                f"model.latent_self_attn_depth is {layers}: it must be one whole number, or {self.depth} (model.depth)"
            )
        return tuple(layers)


@dataclass
class DiffusionConfig:
    """The training objective, the noise levels and the observed masks."""

    timesteps: int | None = None  # default number of sampling steps in Python; null: that of `sample.steps`
    # signal power gamma as a function of time t; parameters of cosine and sigmoid: start, end, tau
    noise_schedule: ScheduleName | Parameters = "sigmoid"
    objective: ObjectiveName = "v"  # prediction target: eps (noise), x0 (data), v (of both), velocity (rectified flow)
    # fraction of the training samples that are self-conditioned on the state of a first pass; 0: no first pass
    train_prob_self_cond: float = 0.9
    # maximum distance in time (t runs from 0 to 1) from the main pass to the noisier first pass; 1 / (sampling steps)
    # helps if the steps are few; 0: both passes at the same time
    self_cond_gap: float = 0.0
    # weight of the loss by noise level; parameters: gamma (min_snr), gamma and k (p2), bias (sigmoid), power and limit
    # (power); balanced: divided by the running mean of the loss at this level, with and without known pixels
    loss_weight: LossWeightName | Parameters = "none"
    # distribution of training times; low_discrepancy: evenly spaced over a batch; parameters of logit_normal: mean, std
    time_sampling: TimeSamplingName | Parameters = "uniform"
    scale: float = 1.0  # factor of the data before noise is added; below 1, every noise level becomes noisier
    # what the network sees; std: the noisy data, with a std of 1; wiener: its linear estimate of the data, in which
    # noise fades where there is little signal
    input_scaling: InputScalingName = "std"
    label_dropout: float = 0.0  # fraction of samples trained without label and embedding, for classifier-free guidance
    # observed masks in training: each kind with its weight, for example {none: 1, first: 2}; empty: no masks
    known: dict[KnownKind, float] = field(default_factory=dict)
    known_frames: list[int] = field(default_factory=list)  # [least, most] known frames; empty: 1 to half of all
    clip_x0: ClippingName = "static"  # clipping of x0 estimates in sampling: to the range of the data, dynamic, or none

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
            raise UsageError(f"diffusion.known is {self.known}: at least one weight must be above 0")
        if self.known_frames:
            if len(self.known_frames) != 2 or any(not is_whole(n, 1) for n in self.known_frames):
                raise UsageError(
                    f"diffusion.known_frames is {list(self.known_frames)}: it must be two whole numbers above 0"
                )
            check_at_least(
                "the second number of diffusion.known_frames", self.known_frames[1], self.known_frames[0], int
            )


@dataclass
class DataConfig:
    """The data files, and how samples are taken from them."""

    path: str | None = None  # folder, file, shards x/{000..123}.tar, or hf:NAME[[:CONFIGURATION]:SPLIT]; null: not set
    # held-out data, which is never trained on: a share of the files in (0, 0.5], or a folder, shards or hf: of its own;
    # null: the split `val` or `test` of the data, if there is one
    validation: float | str | None = None
    images: str | None = None  # images that are mixed with the clips, for `model.tokenizer=tube+image`; null: none
    image_ratio: float = 0.5  # fraction of the training steps that use `images`, between 0 and 1
    embeddings: bool = False  # condition on vectors from files beside the data (x.npy or x.safetensors beside x.mp4)
    text_encoder: str | None = None  # folder or hub id of an encoder for captions in x.txt beside x.mp4; null: none
    caption_tokens: int = 32  # maximum number of vectors per caption; 1: their mean
    image_column: str | None = None  # Hugging Face column of images or clips; null: the first of type Image or Video
    label_column: str | None = None  # Hugging Face column of labels (numbers or text); null: the first ClassLabel
    stride: int = 1  # distance in the file between frames of a clip, in frames; 1: consecutive frames
    fps: float | None = None  # frames per second to which clips are resampled by time stamps; null: use `stride`
    span: SpanName = "window"  # window: frames at the distance of `stride` or `fps`; whole: spread over the entire file
    sampling: FileSamplingName = "clips"  # clips: all files equally often; time: files in proportion to their length
    windows: int = 1  # clips per file and epoch; with sampling=time, this number for each clip that fits into the file
    avoid_cuts: bool = False  # take only clips without a scene change
    crop: CropName = "center"  # position of the crop
    # range of the side of the crop as a fraction of the largest possible crop, in [0.05, 1]
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    augment_horizontal_flip: bool = False  # mirror half of the samples
    augment_color: float = 0.0  # random changes of brightness, contrast, saturation and hue, 0 (none) to 1 (strong)
    augment_reverse: bool = False  # reverse half of the clips in time
    # range of the random playback speed of clips, in [0.1, 10]; 1: unchanged, 2: twice as fast
    augment_speed: list[float] = field(default_factory=lambda: [1.0, 1.0])
    # shapes in one run, one per batch: 48x80 for images, 16x48x80 for clips; empty: only the shape of the model
    buckets: list[str] = field(default_factory=list)
    decoder: DecoderOption = "auto"  # decoder of clips; auto: torchcodec if it works, else pyav
    num_workers: int = 2  # processes that load data; 0: the training process loads it, so a bad file can end the run
    prefetch: int = 2  # batches that each of these processes loads in advance
    strict: bool = False  # refuse to start if there are files that cannot be used
    max_failures: int = 100  # samples that may fail and be replaced during training; one more stops the run
    read_timeout: float = 60.0  # maximum time to read a file, in seconds; slower files are not used
    max_pixels: int = 100_000_000  # largest image or frame, in pixels; larger files are refused
    allow_pipe: bool = False  # allow shards pipe:COMMAND, which run a command; cannot be set in a file
    classes: list[str] = field(default_factory=list)  # class names by number; set by training

    def __post_init__(self) -> None:
        check_choices("data", self)
        for name in ("stride", "windows", "prefetch", "max_pixels", "caption_tokens"):
            check_at_least(f"data.{name}", getattr(self, name), 1, int)
        for name in ("num_workers", "max_failures"):
            check_at_least(f"data.{name}", getattr(self, name), 0, int)
        if self.embeddings and self.text_encoder is not None:
            raise UsageError(
                "data.embeddings and data.text_encoder both choose the embeddings of a sample: set only one"
            )
        if isinstance(self.validation, int | float) and not (is_number(self.validation) and 0 < self.validation <= 0.5):
            raise UsageError(
                f"data.validation is {self.validation}: it must be a share above 0 and at most 0.5, or the name of a "
                "folder (write ./NAME if the name is a number)"
            )
        if not 0 < self.image_ratio < 1:
            raise UsageError(f"data.image_ratio is {self.image_ratio:g}: it must be above 0 and below 1")
        if self.fps is not None:
            check_above("data", "fps", self.fps, 0)
            if self.stride != 1:
                raise UsageError(
                    f"data.fps={self.fps:g} and data.stride={self.stride} both choose frames: set only one"
                )
        if self.span == "whole" and (self.fps is not None or self.stride != 1 or self.avoid_cuts):
            raise UsageError(
                "data.span=whole takes frames from the complete file: leave out stride, fps and avoid_cuts"
            )
        check_above("data", "read_timeout", self.read_timeout, 0)
        check_within("data.augment_color", self.augment_color, 0, 1)
        check_range("data.crop_scale", self.crop_scale, 0.05, 1)
        check_range("data.augment_speed", self.augment_speed, 0.1, 10)


@dataclass
class TrainConfig:
    """Optimisation, EMA of the weights, checkpoints and logging."""

    train_num_steps: int = 100_000  # number of optimizer steps; with `time`, an estimate that training updates
    # length of the training as a time, which replaces the number of steps: 90s, 30m, 2h, 1d, 1h30m; null: use
    # `train_num_steps`
    time: str | None = None
    train_batch_size: int = 16  # samples per forward pass, summed over all processes (the global batch)
    gradient_accumulate_every: int = 1  # forward passes per optimizer step; their gradients are averaged
    optimizer: OptimizerName = "adamw"  # muon: Muon for matrices and AdamW for other parameters
    train_lr: float = 1e-4  # maximum learning rate
    weight_decay: float = 0.01  # weight decay, except on biases, norms and embeddings; 0: none
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of first and second moments
    lr_schedule: LRScheduleName = "cosine"  # course of the learning rate after the warm-up
    lr_cosine_portion: float = 1.0  # fraction of the cosine's half period that the run covers; 1: down to 0
    # steps over which the learning rate rises linearly from 0, with `time` at most a tenth of it; 0: no warm-up
    warmup_steps: int = 0
    max_grad_norm: float = 1.0  # maximum norm of the gradient, to which larger ones are scaled; 0: no clipping
    ema_decay: float = 0.9999  # decay per step of the EMA of the weights, independent of `ema_update_every`
    ema_warmup: float | None = 0.1  # the EMA spans at most this fraction of the steps so far; null: constant decay
    ema_update_every: int = 1  # steps between updates of the EMA
    # lengths of the power-function EMAs for `rin-video ema`: two or more values of sigma_rel, each a fraction of the
    # training in [0.01, 0.28]; empty: none
    ema_sigma_rel: list[float] = field(default_factory=lambda: [0.05, 0.1])
    ema_snapshot_every: int = 5000  # steps between snapshots of the power-function EMAs
    # precision of activations; no: float32; tf32: the same with TF32 products; auto: bf16 if it is faster here
    mixed_precision: PrecisionOption = "no"
    # recompute the activations of each block in the backward pass: less memory, more time
    gradient_checkpointing: bool = False
    compile: bool = False  # use torch.compile; if compilation fails, training continues without it
    sharding: ShardingName = "none"  # none: each process holds the full model (DDP); fsdp2: a part
    init_from: str | None = None  # run folder or hub id of a model whose weights are loaded where they fit; null: none
    seed: int = 0  # seed of the initial weights, the order of the data, the noise and the samples
    save_and_sample_every: int = 1000  # steps between checkpoints; samples are drawn at the same steps
    keep_checkpoints: int = 2  # number of most recent checkpoints to keep
    keep_every: int = 0  # checkpoints at multiples of this number of steps are never deleted; 0: none
    log_every: int = 10  # steps between lines of metrics.jsonl
    # steps between measurements of the validation loss, if there is held-out data; null: with each checkpoint
    validate_every: int | None = None
    validation_samples: int = 64  # held-out samples of the validation loss, and as many training samples
    keep_best: bool = False  # keep the EMA weights with the lowest validation loss in best/
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb or another of accelerate; empty: none

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
            "validation_samples",
        ):
            check_at_least(f"train.{name}", getattr(self, name), 1, int)
        for name in ("warmup_steps", "seed", "keep_every"):
            check_at_least(f"train.{name}", getattr(self, name), 0, int)
        if self.validate_every is not None:
            check_at_least("train.validate_every", self.validate_every, 1, int)
        if self.time is not None:
            read_duration("train.time", self.time)
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
                f"train.ema_sigma_rel is {list(self.ema_sigma_rel)}: set at least two different lengths, or none"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"train.betas is {list(self.betas)}: it must be two numbers in [0, 1)")


def check_sigma_rel(name: str, value: Any) -> None:
    """Check the length of a power-function EMA, as a fraction of the training (Karras et al. 2024, arXiv 2312.02696).

    Raises `UsageError` if it is not in [0.01, 0.28]; 0.28 covers nearly all of the training.
    """
    check_within(name, value, 0.01, 0.28)


@dataclass
class SampleConfig:
    """How samples are drawn, during training and by `rin-video sample`."""

    num_samples: int = 16  # number of samples
    steps: int = 50  # sampling steps; each is one network call, or two with heun
    # sampling method, compared in benchmarks/README.md; parameters: eta of ddim, in [0, 1]; churn of heun, at least 0
    sampler: SamplerName | Parameters = "dpmpp_2m_sde"
    # spacing of the steps: uniform and quadratic in t, karras and logsnr in sigma / alpha; null: karras for dpmpp and
    # heun, and uniform for other samplers and with `schedule` or `time_difference`
    spacing: SpacingName | None = None
    # asymmetric time intervals: each step goes to the noise level of this many steps later; 0: none
    time_difference: float = 0.0
    schedule: ScheduleName | Parameters | None = None  # noise schedule to sample with; null: that of training
    label: int | str | None = None  # class of all samples, by name or number, -1 for no class; null: each class in turn
    guidance: float = 0.0  # scale of classifier-free guidance; 0: no guidance
    guidance_drop: str = "label"  # conditions that the unconditional prediction omits: label, known, or label+known
    # range [low, high] of gamma in which guidance is applied; 0: noise, 1: clean
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    # both predictions of guidance in one forward pass; false: in two, which need less memory
    batched_guidance: bool = True
    guidance_rescale: float = 0.0  # how far to restore the std of the conditional prediction, from 0 (not) to 1 (fully)
    clip_x0: ClippingName | None = None  # clipping of x0 estimates; null: `diffusion.clip_x0`
    # precision of the network; null: that of training (on a CPU, float32 if bf16 is not faster)
    precision: PrecisionName | None = None
    fps: float | None = None  # frame rate of the written clips, in frames per second; null: that of the data

    def __post_init__(self) -> None:
        for name in ("num_samples", "steps"):
            check_at_least(f"sample.{name}", getattr(self, name), 1, int)
        check_choices("sample", self)
        check_at_least("sample.time_difference", self.time_difference, 0, float)
        check_within("sample.guidance_rescale", self.guidance_rescale, 0, 1)
        check_at_least("sample.guidance", self.guidance, 0, float)
        if self.fps is not None:
            check_above("sample", "fps", self.fps, 0)
        for part in str(self.guidance_drop).split("+"):
            check_choice("sample.guidance_drop", part, get_args(GuidanceDropName))
        interval = list(self.guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise UsageError(
                f"sample.guidance_interval is {interval}: it must be [low, high] with 0 <= low < high <= 1"
            )


@dataclass
class Config:
    """All options of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def model_config(**options: Any) -> ModelConfig:
    """Return a `ModelConfig`. Raises `UsageError` for an unknown option, and names the most similar one."""
    check_names(options, ModelConfig, "RIN", prefix="")
    return ModelConfig(**options)


def data_config(**options: Any) -> DataConfig:
    """Return a `DataConfig`. Raises `UsageError` for an unknown option, and names the most similar one."""
    check_names(options, DataConfig, "data", prefix="")
    return DataConfig(**options)


def trainer_config(**options: Any) -> tuple[TrainConfig, DataConfig]:
    """Return the options of the Trainer from fields of `TrainConfig` and `DataConfig`, which have no name in common."""
    names = {field.name for field in dataclasses.fields(DataConfig)}
    data = {name: options.pop(name) for name in names & options.keys()}
    return train_config(**options), data_config(**data)


def train_config(**options: Any) -> TrainConfig:
    """Return a `TrainConfig`. Raises `UsageError` for an unknown option, and names the most similar one."""
    check_names(options, TrainConfig, "Trainer", prefix="")
    return TrainConfig(**options)


def check_names(names: Iterable[str], kind: Any, origin: str, prefix: str) -> None:
    """Raise `UsageError` for a name that is not a field of the dataclass `kind`, and name the most similar field.

    The message begins with `origin`, the place where the names come from, and puts `prefix` before each name.
    """
    known = [f.name for f in dataclasses.fields(kind)]
    for name in names:
        if name not in known:
            near = [key for key in known if key.endswith(f"_{name}")]  # lr: train_lr
            near = near or _elsewhere(str(name)) or difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix if near[0] in known else ''}{near[0]}?" if near else f"known keys are {known}"
            raise UsageError(f"{origin}: unknown key {prefix}{name}: {hint}")


def _elsewhere(name: str) -> list[str]:
    return [f"{section}.{name}" for section, kind in types_of(Config).items() if name in types_of(kind)]
