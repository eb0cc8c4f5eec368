"""Commands to share results: `rin-video push` and `export`."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from rin_video.cli.options import RUN_HELP

log = logging.getLogger("rin_video")


def add_parsers(commands: Any) -> None:
    """Add the parsers of `push` and `export`."""
    command = commands.add_parser("push", help="upload a model to the Hugging Face hub, with a model card of the run")
    add = command.add_argument
    add("model", metavar="DIR", help=RUN_HELP)
    add("repo", metavar="USER/NAME", help="repository on the hub; created if it does not exist")
    add("--private", action="store_true", help="make the repository private if it is created")
    add("--license", metavar="ID", help="license for the card: mit, cc-by-4.0, ... (default: not chosen)")
    add("--new-card", action="store_true", help="replace an existing card (default: keep it)")
    command.set_defaults(run=push)

    command = commands.add_parser(
        "export", help="convert arrays, frames or any clip to GIF, PNG, or an MP4 that plays in browsers"
    )
    add = command.add_argument
    add("input", metavar="INPUT", help="input: .npy, .safetensors, a folder of frames, or any clip")
    add("output", metavar="OUTPUT", help="output: .mp4, .gif or .png")
    add("--fps", type=float, metavar="N", help="frames per second (default: those of the input, or 8)")
    command.set_defaults(run=export)


def push(options: Namespace) -> None:
    """Upload a model and its model card."""
    from rin_video.reports.card import push_to_hub

    url = push_to_hub(
        options.model, options.repo, private=options.private, license=options.license, new_card=options.new_card
    )
    log.info("%s: rin-video sample %s", url, options.repo)


def export(options: Namespace) -> None:
    """Convert a file, and log a report."""
    from rin_video.cli.convert import export as convert

    log.info(convert(options.input, options.output, fps=options.fps))
