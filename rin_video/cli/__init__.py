"""The command line `rin-video`; `main` parses the arguments and runs a command."""

from rin_video.cli.parser import main

__all__ = ["main"]
