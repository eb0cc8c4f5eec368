"""Commands that hand results to others: `rin-video push` and `export`."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from rin_video.cli.options import RUN_HELP

log = logging.getLogger("rin_video")


def add_parsers(commands: Any) -> None:
    command = commands.add_parser("push", help="share a model on the Hugging Face hub, with a card made from the run")
    add = command.add_argument
    add("model", metavar="DIR", help=RUN_HELP)
    add("repo", metavar="USER/NAME", help="made where it does not exist")
    add("--private", action="store_true", help="for you only, where it is made now")
    add("--license", metavar="ID", help="for the card: mit, cc-by-4.0 ... (default: none chosen)")
    add("--new-card", action="store_true", help="replace a card that is there (default: it stays)")
    command.set_defaults(run=push)

    command = commands.add_parser(
        "export", help="arrays, frames, GIF or MP4 to an MP4 that plays in browsers, GIF or PNG"
    )
    add = command.add_argument
    add("input", metavar="INPUT", help=".npy, .safetensors, a folder of frames, or any clip")
    add("output", metavar="OUTPUT", help=".mp4, .gif or .png")
    add("--fps", type=float, metavar="N", help="frames per second (default: the source's, else 8)")
    command.set_defaults(run=export)


def push(options: Namespace) -> None:
    """Upload a model and its card."""
    from rin_video.reports.card import push_to_hub

    url = push_to_hub(
        options.model, options.repo, private=options.private, license=options.license, new_card=options.new_card
    )
    log.info("%s: rin-video sample %s", url, options.repo)


def export(options: Namespace) -> None:
    """Convert a file."""
    from rin_video.cli.convert import export as convert

    log.info(convert(options.input, options.output, fps=options.fps))
