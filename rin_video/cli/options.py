"""Options that several commands share, and the choice of the preset and the configuration by these options.

An option whose `dest` is a key of the configuration means `key=value`: see `cli.parser.read_options`.
"""

from __future__ import annotations

import argparse
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal, get_args

from rin_video.config import Config, DataConfig, DataKind, DecoderOption
from rin_video.config_files import load_config, read_overrides
from rin_video.errors import UsageError
from rin_video.files import ARRAY_SUFFIXES

DATA_HELP = "folder of clips or images (its sub-folders are classes), a file, shards 'x/{000..123}.tar', or hf:NAME"
SIZE_HELP = "height and width, in pixels"
RUN_HELP = "folder of a run"


def one_of(kind: Any) -> str:
    """Return the values of an option as text for its help."""
    return ", ".join(get_args(kind))


def add_data_options(command: argparse.ArgumentParser) -> None:
    """Add the options that determine how samples are made from the data, for `train` and `preview`."""
    add = command.add_argument
    add("--frames", type=int, metavar="N", help="frames per clip; 0: images (default: by the files in DATA)")
    add("--size", metavar="N|HxW", help=SIZE_HELP)
    add(
        "--images",
        dest="data.images",
        metavar="DATA",
        help="images to mix with the clips, in the fraction data.image_ratio of the steps",
    )
    add("--config", metavar="NAME|FILE", help="preset or YAML file (default: by frames and size)")
    for name in ("image", "label"):
        help = f"{name} column of a Hugging Face dataset (default: by its type)"
        add(f"--{name}-column", dest=f"data.{name}_column", metavar="NAME", help=help)
    add_reading_options(command)


def add_reading_options(command: argparse.ArgumentParser) -> None:
    """Add the options that determine how files are read."""
    command.add_argument(
        "--decoder", dest="data.decoder", metavar="NAME", help=f"video decoder: {one_of(DecoderOption)}"
    )
    command.add_argument(
        "--strict",
        dest="data.strict",
        action="store_true",
        default=None,
        help="do not start if a file cannot be used",
    )


def read_config(options: Namespace, preset: str | None) -> Config:
    """Return the configuration for the options on data, frames and size.

    Raises `UsageError` for invalid options, or if `data.images` is set for a model of images.
    """
    shape = []
    if options.frames is not None:
        shape.append(f"model.frames={options.frames or 'null'}")
    if options.size:
        shape.append(f"model.image_size={parse_size(options.size)}")
    config = load_config(preset, [*options.overrides, *shape])
    config.data.path = os.fspath(options.data)
    if config.data.images is not None:
        if not config.model.frames:
            raise UsageError(
                "data.images (--images) is mixed with clips: set --frames, or use only the images as the data"
            )
        if config.model.tokenizer in ("auto", "tube"):
            config.model.tokenizer = "tube+image"
    return config


def choose_preset(options: Namespace) -> str:
    """Return `--config`, or the preset that fits the data and the size. Sizes of arrays are added to the overrides."""
    from rin_video.datasets.hub import is_hub, kind_of_hub
    from rin_video.datasets.splits import find_splits

    frames, size = options.frames, options.size
    if frames is not None and frames < 0:
        raise UsageError(f"--frames is {frames}: use the number of frames per clip, or 0 for images")
    if options.config is not None:
        return options.config
    data = DataConfig(**read_overrides(options.overrides).get("data", {}))
    path = find_splits(options.data)[0]
    if shape := shape_of_arrays(path, data):
        channels, *length, H, W = shape
        frames = [*length, 0][0] if frames is None else frames
        size = size or f"{H}x{W}"
        sizes = [f"model.channels={channels}", f"model.image_size=[{H},{W}]", *(f"model.frames={F}" for F in length)]
        options.overrides[:0] = sizes  # arrays are not resized; options of the user come later and take precedence
    elif frames is None:
        find_kind = kind_of_hub if is_hub(path) else kind_of
        frames = 0 if find_kind(path, data) == "image" else None
    return default_preset(frames, size)


def default_preset(frames: int | None, size: str | None) -> str:
    """Return the smallest preset for images (frames 0) or clips of a size."""
    height_width = parse_size(size) if size else 64
    longest = height_width if isinstance(height_width, int) else max(height_width)
    if frames == 0:
        return "image64" if longest <= 64 else "image128" if longest <= 128 else "image256"
    return "video64" if longest <= 64 else "video128"


def kind_of(data: str, options: DataConfig) -> DataKind:
    """Return the kind of files in the data."""
    from rin_video.datasets.folders import detect_kind
    from rin_video.training.identity import run_folder

    return detect_kind(data, allow_pipe=options.allow_pipe, cache=run_folder(data) / "pipes")


def shape_of_arrays(data: str, options: DataConfig) -> tuple[int, ...] | None:
    """Return the shape of a sample if the data is arrays of images or clips, else None."""
    from rin_video.datasets.array_files import probe_array, sample_shape
    from rin_video.datasets.folders import find_sources
    from rin_video.datasets.open import holds_arrays
    from rin_video.training.identity import run_folder

    cache = run_folder(data) / "pipes"
    if not holds_arrays(data, options, cache):
        return None
    first, *_ = find_sources(data, ARRAY_SUFFIXES, allow_pipe=options.allow_pipe, cache=cache)
    return sample_shape(probe_array(first))


def open_known(data: str, shape: tuple[int, ...] | None, config: Config, index: Path | None) -> Any:
    """Open a dataset with the index of a training run, if there is one; no new index is written.

    Of the data in the configuration, it is what training uses, without held-out files.
    """
    from rin_video.datasets.open import open_split

    known = index if index is not None and index.exists() else None
    split: Literal["train", "all"] = "train" if data == config.data.path else "all"
    return open_split(data, shape, config.data, split, seed=config.train.seed, index=known)


def parse_size(text: str) -> int | list[int]:
    """Parse `64` or `48x64` (height x width). Raises `UsageError` for other text."""
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise UsageError(f"--size {text} is not a size: write 64, or 48x64 (height x width)")
    numbers = [int(n) for n in text.split("x")]
    return numbers[0] if len(numbers) == 1 else numbers


def say(text: str) -> None:
    """Print a result of a command to stdout."""
    print(text)
