"""Commands for data: `rin-video index`, `preview` and `prepare`."""

from __future__ import annotations

import dataclasses
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

from rin_video.cli.options import (
    DATA_HELP,
    SIZE_HELP,
    add_data_options,
    add_reading_options,
    choose_preset,
    kind_of,
    one_of,
    open_known,
    parse_size,
    read_config,
    say,
)
from rin_video.config import DataConfig, DataKind, FrameKind
from rin_video.config_files import load_config
from rin_video.errors import ShortClipError, UsageError
from rin_video.wording import counted

log = logging.getLogger("rin_video")


def add_parsers(commands: Any) -> None:
    """Add the parsers of `index`, `preview` and `prepare`."""
    command = commands.add_parser("index", help="read every file once; report which can be used, which cannot, and why")
    add = command.add_argument
    add("data", metavar="DATA", help=DATA_HELP)
    add("--kind", metavar="NAME", help=f"kind of the data: {one_of(DataKind)} (default: by the files in DATA)")
    add("--out", metavar="FILE", help="file of the index (default: runs/NAME-OF-FOLDER/index.jsonl, as in train)")
    add_reading_options(command)
    command.set_defaults(run=index, overrides=[])

    command = commands.add_parser(
        "preview", aliases=["peek"], help="show what training will see: statistics and a sheet of samples"
    )
    add = command.add_argument
    add("data", metavar="DATA", help=DATA_HELP)
    add_data_options(command)
    add("--num", type=int, default=12, metavar="N", help="number of samples (default: 12)")
    add("--out", metavar="FILE", help="file of the sheet: .png, or .mp4 to play clips (default: no sheet)")
    command.set_defaults(run=preview, overrides=[])

    command = commands.add_parser("prepare", help="transcode and crop once, into shards that load fast; resumable")
    add = command.add_argument
    add("data", metavar="DATA", help=DATA_HELP)
    add("--size", required=True, metavar="N|HxW", help=SIZE_HELP)
    add(
        "--fps", dest="data.fps", type=float, metavar="N", help="resample clips to this frame rate (default: no change)"
    )
    add("--kind", metavar="NAME", help=f"kind of the data: {one_of(FrameKind)} (default: by the files in DATA)")
    add("--out", required=True, metavar="DIR", help="folder of the shards")
    add("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    add_reading_options(command)
    command.set_defaults(run=prepare, overrides=[])


def index(options: Namespace) -> None:
    """Probe every file, write the index, and print a summary."""
    from rin_video.datasets.index import make_index
    from rin_video.datasets.open import INDEX
    from rin_video.training.identity import run_folder

    data = read_files_config(options)
    kind = options.kind or kind_of(options.data, data)
    path = Path(options.out or run_folder(options.data) / INDEX)
    found = make_index(options.data, kind, data, path=path, progress=True)
    say(found.describe())
    found.require_some(data.strict)
    say(f"index: {path}")


def preview(options: Namespace) -> None:
    """Print statistics of samples as training draws them, and write a sheet of these samples."""
    from rin_video.datasets.open import INDEX
    from rin_video.datasets.preview import captions, check_sheet, draw_some, statistics, write_sheet
    from rin_video.datasets.steady import frame_rate
    from rin_video.media import DEFAULT_FPS
    from rin_video.model.info import model_info
    from rin_video.training.identity import run_folder

    if options.command == "peek":
        log.info("note: peek was renamed to preview: rin-video preview %s", options.data)
    if options.num < 1:
        raise UsageError(f"--num is {options.num}: it must be at least 1")
    config = read_config(options, choose_preset(options))
    if options.out:
        check_sheet(Path(options.out))
    shape, index = model_info(config.model).shape, run_folder(options.data) / INDEX
    try:
        dataset = open_known(options.data, shape, config, index)
    except ShortClipError as error:  # a preview of shorter clips is more useful than an error
        if config.data.buckets:
            raise
        channels, frames, *size = shape
        dataset = open_known(options.data, (channels, error.fits, *size), config, index)
        say(f"no clip has {counted(frames, 'frame')} at this stride or rate, so {error.fits} are shown (--frames)")
    samples, chosen = draw_some(dataset, options.num)
    say(dataset.describe())
    for line in statistics(dataset, samples, chosen):
        say(line)
    if options.out:
        write_sheet(samples, captions(dataset, chosen), options.out, frame_rate(dataset) or DEFAULT_FPS)
        say(f"sheet: {options.out}")


def prepare(options: Namespace) -> None:
    """Write shards of resized and cropped files."""
    from rin_video.datasets.prepare import prepare as write_shards

    data = read_files_config(options)
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers is {options.workers}: it must be at least 1")
    kind = options.kind or kind_of(options.data, data)
    if kind not in get_args(FrameKind):
        raise UsageError(
            f"prepare takes clips or images, but {options.data} is of kind {kind}: "
            f"use --kind {' or '.join(get_args(FrameKind))}"
        )
    size = parse_size(options.size)
    H, W = (size, size) if isinstance(size, int) else size
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: use a folder")
    if Path(options.data).is_dir() and out.resolve().is_relative_to(Path(options.data).resolve()):
        raise UsageError(f"--out {out} is in the folder of the data: use another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be created ({error.strerror}): use another folder") from error
    for line in write_shards(options.data, kind, out, (H, W), data, workers=options.workers or os.cpu_count() or 1):
        say(line)
    say(compare_speed(options.data, out, kind, (H, W), data))
    say(f"next: rin-video train --data {out}")


def compare_speed(source: str, out: Path, kind: str, size: tuple[int, int], data: DataConfig, frames: int = 8) -> str:
    """Describe how fast samples load from the source and from the shards; clips have up to `frames` frames."""
    from rin_video.datasets.clips import ClipFolder
    from rin_video.datasets.images import ImageFolder
    from rin_video.datasets.prepare import loading_speed

    def speed(root: str | Path, index: str, fps: float | None) -> float:
        config = dataclasses.replace(data, fps=fps)
        if kind == "image":
            return loading_speed(ImageFolder(root, size, index=out / index, config=config))
        return loading_speed(ClipFolder(root, size, frames, index=out / index, config=config))

    try:
        before, after = speed(source, "source.jsonl", data.fps), speed(out, "index.jsonl", None)
    except UsageError as error:  # the shards are complete, so a failed measurement must not fail the command
        if kind == "image" or frames == 1:
            return f"the loading speed was not measured: {error}"
        return compare_speed(source, out, kind, size, data, frames // 2)
    what = "images" if kind == "image" else f"clips of {counted(frames, 'frame')}"
    return (
        f"one process loads {before:.1f} {what} per second from the source, {after:.1f} from the shards "
        f"({after / before:.1f} times)"
    )


def read_files_config(options: Namespace) -> DataConfig:
    """Return the section `data` for commands that only read files. Raises `UsageError` for other options."""
    from rin_video.datasets.hub import is_hub

    for override in options.overrides:
        if not override.startswith("data."):
            raise UsageError(f"{override}: {options.command} does not train, so it only takes data.key=value")
    if is_hub(options.data):
        raise UsageError(f"{options.data}: {options.command} takes files and shards; only train and preview take hf:")
    return load_config(None, options.overrides).data
