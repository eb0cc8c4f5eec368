"""The parser of the command line `rin-video`; torch is imported only when a command runs, not for --help."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn, cast

from rin_video.cli import data, demo, evaluate, inspect, sample, share, train
from rin_video.config import Config
from rin_video.config_checks import types_of
from rin_video.errors import ReportedError, Stopped, UsageError, first_line, one_line
from rin_video.ranks import is_first

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")
BARE_KEY = re.compile(r"([A-Za-z_]\w*)=")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line and records its options and commands."""

    def __init__(self, **options: Any) -> None:
        self.nargs: dict[str, Any] = {}  # number of values of each option: 0, None (one), or +
        self.positionals: list[str] = []
        self.commands: dict[str, Parser] = {}
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument as `argparse` does, and record it."""
        action = super().add_argument(*names, **options)
        self.nargs |= dict.fromkeys(action.option_strings, action.nargs)
        self.positionals += [] if action.option_strings else [action.dest]
        return action

    def add_subparsers(self, **options: Any) -> Any:
        """Add subparsers as `argparse` does, and record the commands."""
        commands = super().add_subparsers(**options)
        self.commands = cast(dict[str, Parser], commands.choices)
        return commands

    def error(self, message: str) -> NoReturn:
        """Print an error in one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def make_parser() -> Parser:
    """Create the parser of all commands."""
    parser = Parser(prog="rin-video", description="Train and sample Recurrent Interface Networks on images and video.")
    parser.add_argument("--version", action="version", version=f"rin-video {version('rin-video')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (train, data, sample, evaluate, inspect, share, demo):
        module.add_parsers(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0; 2 for an error; 75 after a stop by a signal; 130 after Ctrl-C."""
    try:
        options = read_options(sys.argv[1:] if argv is None else argv)
        level = logging.INFO if is_first() else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our own error reports its retries
        options.run(options)
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


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command.

    `overrides` in the result contains the key=value arguments, followed by the flags that mean key=value, which take
    precedence. Such a flag has the key as its `dest`: `--steps 10` means `train.train_num_steps=10`. Raises
    `UsageError` for invalid arguments.
    """
    parser = make_parser()
    arguments, overrides = split_overrides(parser, argv)
    options = parser.parse_args(arguments)
    if overrides and "overrides" not in options:
        raise UsageError(f"{options.command} takes no key=value argument: {overrides[0]}")
    flags = [f"{key}={value}" for key, value in vars(options).items() if "." in key and value is not None]
    options.overrides = [*overrides, *flags]
    return options


def split_overrides(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those for `argparse` and those of the form `section.key=value`.

    The latter may be anywhere, except in place of the value of an option. Raises `UsageError` for an unknown command,
    option or key; the message names the nearest known one.
    """
    arguments: list[str] = []
    overrides: list[str] = []
    command, waits, several = parser, False, False  # whether the last option still needs a value, or takes several
    for word in argv:
        if not waits and OVERRIDE.match(word):
            overrides.append(word)
            continue
        if waits:
            waits = False
        elif word.startswith("--") and len(word) > 2:
            name, equals, _ = word.partition("=")
            nargs = command.nargs[find_option(command, name)]
            waits, several = nargs != 0 and not equals, nargs == "+"
        elif several or word.startswith("-"):
            pass
        elif command.commands:
            if word not in command.commands:
                names = ", ".join(command.commands)
                raise UsageError(f"unknown command {word}{nearest(word, command.commands) or f': choose {names}'}")
            command = command.commands[word]
        elif (key := BARE_KEY.match(word)) and not os.path.exists(word):
            raise UsageError(f"{word}{nearest_key(key[1], word)}")
        elif not command.positionals and "--data" in command.nargs:
            raise UsageError(f"{word} is not an option: did you mean --data {word}?")
        arguments.append(word)
    if not arguments:
        raise UsageError(f"the command is missing: use one of {', '.join(parser.commands)} (rin-video --help)")
    return arguments, overrides


def find_option(command: Parser, name: str) -> str:
    """Return the option with this name or prefix. Raises `UsageError` if there is none, or more than one."""
    known = command.nargs
    begun = [name] if name in known else [option for option in known if option.startswith(name)]
    if len(begun) > 1:
        raise UsageError(f"option {name} is ambiguous: use {' or '.join(begun)}")
    if not begun:
        if command.commands:
            raise UsageError(f"unknown option {name}{nearest(name, known) or ': options follow the command'}")
        near = nearest(name, known) or nearest_key(name.lstrip("-"), "=...", else_=f": see {command.prog} --help")
        raise UsageError(f"unknown option {name}{near}")
    return begun[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean X?`, or an empty text if no known name is near."""
    found = difflib.get_close_matches(name, {*known} - {"--help"}, n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else ""


def nearest_key(name: str, word: str, else_: str = ": write section.key=value") -> str:
    """Return the text of `nearest` for the options of all sections, with the value in `word`, or `else_`."""
    keys = {field: section for section, kind in types_of(Config).items() for field in types_of(kind)}
    ends = [key for key in sorted(keys, key=len) if key == name or key.endswith(f"_{name}")]
    found = ends or difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    if not found:
        return else_
    return f": did you mean {keys[found[0]]}.{found[0]}={word.partition('=')[2]}?"
