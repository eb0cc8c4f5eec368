"""The command line `rin-video`: `main` parses and runs a command."""

from rin_video.cli.parser import main

__all__ = ["main"]
