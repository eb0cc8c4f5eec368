"""Callbacks of the training loop: they observe a run, or evaluate its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor

from rin_video.config import Config
from rin_video.diffusion.process import GaussianDiffusion


class Run(Protocol):
    """The part of the `Trainer` interface that callbacks use."""

    step: int  # number of completed optimizer steps
    folder: Path  # the output folder
    config: Config
    accelerator: Accelerator


class Callback:
    """Base class of callbacks; override the methods you need and pass it as `Trainer(..., callbacks=[MyCallback()])`.

    Callbacks run in the main process only. Random numbers drawn in a callback do not change the training.
    """

    def on_start(self, trainer: Run) -> None:
        """Called before the first step of `train()`."""

    def on_step(self, trainer: Run, loss: Tensor) -> None:
        """Called after every step.

        `loss` is the mean over the samples of this process, a scalar on the device. Reading it makes the host wait for
        the GPU.
        """

    def on_log(self, trainer: Run, line: dict[str, Any]) -> None:
        """Called after every line of `metrics.jsonl`, with its values."""

    def on_validation(self, trainer: Run, line: dict[str, Any]) -> None:
        """Called after every measurement of the validation loss, with its line of `metrics.jsonl`."""

    def on_checkpoint(self, trainer: Run, folder: Path) -> None:
        """Called after a checkpoint has been written to `folder`."""

    def on_sample(self, trainer: Run, samples: Tensor, paths: list[Path]) -> None:
        """Called after samples (B, C, *grid) in [0, 1] have been drawn and written to `paths`."""

    def evaluate(self, trainer: Run, diffusion: GaussianDiffusion) -> dict[str, float] | None:
        """Return scores of the EMA weights by name; called after each sampling, and written to `evaluations.jsonl`."""

    def on_end(self, trainer: Run) -> None:
        """Called when `train()` ends, also after an error or a signal."""


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
