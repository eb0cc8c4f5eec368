"""The command line `rin-video`. Parsing only: torch is imported when a command runs, not for --help."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, get_args

from rin_video.config import (
    DataKind,
    DecoderOption,
    FrameKind,
    GuidanceDropName,
    SamplerName,
    ScheduleName,
    SpacingName,
)
from rin_video.errors import ReportedError, Stopped, UsageError, first_line, one_line
from rin_video.ranks import is_first

FLAGS = (  # without a value
    "--json", "--strict", "--embeddings", "--carry-latents", "--key-frames", "--interpolate-positions", "--private",
    "--new-card",
)  # fmt: skip
OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.\w+)+=")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake, 75 for a signal that was heeded, 130 for Ctrl-C."""
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(arguments)
    if overrides and "overrides" not in options:
        print(f"rin-video: error: {options.command} takes no key=value: {overrides[0]}", file=sys.stderr)
        return 2
    options.overrides = overrides
    logging.basicConfig(level=logging.INFO if is_first() else logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        from rin_video.cli import commands

        getattr(commands, options.command)(options)
    except ReportedError:
        return 2
    except UsageError as error:
        print(f"rin-video: error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        reason = (error.strerror or first_line(error)).lower()
        print(f"rin-video: error: {one_line(error.filename)} cannot be read or written: {reason}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"rin-video: {stop}", file=sys.stderr)
        return Stopped.CODE
    except KeyboardInterrupt:
        print("rin-video: stopped", file=sys.stderr)
        return 130
    return 0


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`section.key=value` may stand anywhere, but not where an option waits for its value."""
    arguments: list[str] = []
    overrides: list[str] = []
    for word in argv:
        last = arguments[-1] if arguments else ""
        waits = last.startswith("--") and "=" not in last and last not in FLAGS
        (overrides if OVERRIDE.match(word) and not waits else arguments).append(word)
    return arguments, overrides


def batch_size(text: str) -> int | str:
    """A number, or auto."""
    return text if text == "auto" else int(text)


def one_of(kind: Any) -> str:
    """The names that an option takes, for its help."""
    return ", ".join(get_args(kind))


DATA_HELP = "a folder of clips or images (sub-folders are classes), one file, shards 'x/{000..123}.tar', or hf:NAME"


def add_data_options(command: argparse.ArgumentParser) -> None:
    """What decides which samples are made of the data; the same for `train` and `peek`."""
    command.add_argument(
        "--frames", type=int, metavar="N", help="frames of a clip; 0 for images (default: by what is in DATA)"
    )
    command.add_argument("--size", metavar="N|HxW", help="height and width, in pixels")
    command.add_argument("--images", metavar="DATA", help="images to mix with the clips, data.image_ratio of the steps")
    command.add_argument("--config", metavar="NAME|FILE", help="a preset, or a YAML file (default: by frames and size)")
    command.add_argument("--image-column", metavar="NAME", help="of a Hugging Face set (default: by type)")
    command.add_argument("--label-column", metavar="NAME", help="of a Hugging Face set (default: by type)")
    add_reading_options(command)


def add_reading_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--decoder", metavar="NAME", help=f"data.decoder: {one_of(DecoderOption)}")
    command.add_argument("--strict", action="store_true", help="refuse to start where a file cannot be used")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rin-video", description="Train and sample Recurrent Interface Networks on images and video."
    )
    parser.add_argument("--version", action="version", version=f"rin-video {version('rin-video')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train on a folder of clips or images; the same command again goes on",
        description="Train on a folder of clips or images. The same command again goes on where it stopped.",
        epilog="Any option of the configuration can be set as section.key=value: train.train_lr=3e-4 model.depth=4",
    )
    train.add_argument("--data", required=True, metavar="DATA", help=DATA_HELP)
    add_data_options(train)
    train.add_argument("--embeddings", action="store_true", help="vectors beside the files are conditions (x.npy)")
    train.add_argument("--text-encoder", metavar="NAME|DIR", help="captions (x.txt) through it are conditions")
    train.add_argument("--init-from", metavar="DIR", help="start with the weights of another model, where they fit")
    train.add_argument(
        "--out",
        metavar="DIR",
        help="where everything is written (default: runs/NAME-OF-FOLDER, runs/PARENT-NAME where that is taken)",
    )
    train.add_argument("--steps", type=int, metavar="N", help="train.train_num_steps")
    train.add_argument(
        "--batch-size", type=batch_size, metavar="N|auto", help="train.train_batch_size; auto: the largest that fits"
    )
    train.set_defaults(overrides=[])

    index = commands.add_parser("index", help="look into every file once: what can be used, what cannot and why")
    index.add_argument("data", metavar="DATA", help=DATA_HELP)
    index.add_argument("--kind", metavar="NAME", help=f"{one_of(DataKind)} (default: by what is in DATA)")
    index.add_argument("--out", metavar="FILE", help="the index (default: runs/NAME-OF-FOLDER/index.jsonl, as train)")
    add_reading_options(index)
    index.set_defaults(overrides=[])

    peek = commands.add_parser("peek", help="what training will see: a sheet of samples, and statistics")
    peek.add_argument("data", metavar="DATA", help=DATA_HELP)
    add_data_options(peek)
    peek.add_argument("--num", type=int, default=12, metavar="N", help="samples on the sheet (12)")
    peek.add_argument("--out", metavar="FILE", help=".png, or .mp4 where they play (default: print only)")
    peek.set_defaults(overrides=[])

    prepare = commands.add_parser("prepare", help="transcode and crop once, into shards that load fast; resumes")
    prepare.add_argument("data", metavar="DATA", help=DATA_HELP)
    prepare.add_argument("--size", required=True, metavar="N|HxW", help="height and width, in pixels")
    prepare.add_argument("--fps", type=float, metavar="N", help="resample clips to this rate (default: their own)")
    prepare.add_argument("--kind", metavar="NAME", help=f"{one_of(FrameKind)} (default: by what is in DATA)")
    prepare.add_argument("--out", required=True, metavar="DIR", help="for the shards")
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    add_reading_options(prepare)
    prepare.set_defaults(overrides=[])

    sample = commands.add_parser("sample", help="draw clips or images from a trained model")
    sample.add_argument("model", metavar="DIR", help="the folder that training wrote, or a hub id user/name")
    sample.add_argument("--num", type=int, metavar="N", help="how many")
    sample.add_argument("--steps", type=int, metavar="N", help="sampling steps")
    sample.add_argument("--sampler", metavar="NAME", help=one_of(SamplerName))
    sample.add_argument("--spacing", metavar="NAME", help=f"of the steps: {one_of(SpacingName)}; null: by sampler")
    sample.add_argument(
        "--schedule", metavar="NAME", help=f"another noise schedule than that of training: {one_of(ScheduleName)}"
    )
    sample.add_argument("--class", dest="label", metavar="NAME|N", help="one class, or all in turn (default)")
    sample.add_argument("--caption", nargs="+", metavar="TEXT", help="what the samples are to show; several in turn")
    sample.add_argument("--embedding", nargs="+", metavar="FILE", help="the same as vectors, .npy or .safetensors")
    sample.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance; 0: none")
    sample.add_argument(
        "--guidance-drop",
        metavar="WHAT",
        help=f"what guidance does without: {one_of(GuidanceDropName)}, or several joined by +",
    )
    sample.add_argument("--frames", type=int, metavar="N", help="frames of a clip, any number; 0: images")
    sample.add_argument("--size", metavar="N|HxW", help="height and width, where the positions allow it")
    sample.add_argument("--context", metavar="FILE", help="a clip that the samples go on from, or a folder of them")
    sample.add_argument("--context-frames", type=int, metavar="N", help="how many of its frames are given (all)")
    sample.add_argument("--fill", metavar="A:B", help="frames to invent of the clip --context; the others are given")
    sample.add_argument("--image", metavar="FILE", help="an image that the samples start with")
    sample.add_argument("--window", type=int, metavar="N", help="frames of one pass (default: the model's)")
    sample.add_argument("--overlap", type=int, metavar="N", help="frames that a window is given of the one before")
    sample.add_argument("--carry-latents", action="store_true", help="windows hand on latents too")
    sample.add_argument("--key-frames", action="store_true", help="frames far apart first, then those between them")
    sample.add_argument("--interpolate-positions", action="store_true", help="learned positions at other sizes")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same samples")
    sample.add_argument("--max-batch", type=int, metavar="N", help="how many at a time (less memory)")
    sample.add_argument("--fps", type=float, metavar="N", help="of the clips that are written")
    sample.add_argument("--out", metavar="FILE", help=".mp4 .gif .png .npy .safetensors, or a folder for one file each")
    sample.epilog = (
        "More options as sample.key=value: sampler.eta=0.5, time_difference=1, guidance_interval=[0.1,0.9], "
        "guidance_rescale=0.7, clip_x0=dynamic"
    )
    sample.set_defaults(overrides=[])

    diagnose = commands.add_parser("diagnose", help="why samples look as they do: loss by noise level, pictures, words")
    diagnose.add_argument("model", metavar="DIR", help="the folder that training wrote")
    diagnose.add_argument("--data", metavar="FOLDER", help="clips or images (default: those of the training)")
    diagnose.add_argument("--num", type=int, default=64, metavar="N", help="samples of the data to measure on (64)")
    diagnose.add_argument("--out", metavar="DIR", help="for the pictures (default: DIR/diagnosis)")
    diagnose.set_defaults(overrides=[])

    ema = commands.add_parser("ema", help="averaged weights of other lengths, without training again")
    ema.add_argument("model", metavar="DIR", help="the folder that training wrote")
    ema.add_argument(
        "--sigma-rel",
        type=float,
        nargs="+",
        required=True,
        metavar="S",
        help="lengths, as a share of the training: 0.05 0.1 0.15",
    )
    ema.add_argument("--out", metavar="DIR", help="for a folder ema-S each (default: DIR)")

    report = commands.add_parser("report", help="one HTML page on a run: curves, samples, options, versions")
    report.add_argument("model", metavar="DIR", help="the folder that training wrote")
    report.add_argument("--out", metavar="FILE", help="the page (default: DIR/report.html)")

    push = commands.add_parser("push", help="share a model on the Hugging Face hub, with a card made from the run")
    push.add_argument("model", metavar="DIR", help="the folder that training wrote")
    push.add_argument("repo", metavar="USER/NAME", help="made where it does not exist")
    push.add_argument("--private", action="store_true", help="for you only, where it is made now")
    push.add_argument("--license", metavar="ID", help="for the card: mit, cc-by-4.0 ... (default: none chosen)")
    push.add_argument("--new-card", action="store_true", help="replace a card that is there (default: it stays)")

    export = commands.add_parser(
        "export", help="arrays, frames, GIF or MP4 to an MP4 that plays in browsers, GIF or PNG"
    )
    export.add_argument("input", metavar="INPUT", help=".npy, .safetensors, a folder of frames, or any clip")
    export.add_argument("output", metavar="OUTPUT", help=".mp4, .gif or .png")
    export.add_argument("--fps", type=float, metavar="N", help="frames per second (default: the source's, else 8)")

    info = commands.add_parser("info", help="the presets, or what one model costs")
    info.add_argument("model", nargs="?", metavar="DIR", help="the folder of a run")
    info.add_argument("--config", metavar="NAME|FILE", help="a preset, or a YAML file")
    info.add_argument("--json", action="store_true", help="print params, tokens, latents, gflops as JSON")
    info.set_defaults(overrides=[])

    demo = commands.add_parser("demo", help="make clips, train a tiny model on them, sample: a few minutes on a CPU")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything is written (runs/demo)")
    demo.set_defaults(overrides=[])
    return parser
