"""What a training run calls besides training: look on, or measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor

from rin_video.config import Config
from rin_video.diffusion.process import GaussianDiffusion


class Run(Protocol):
    """What a callback sees of a `Trainer`."""

    step: int  # optimizer steps done
    folder: Path  # where everything is written
    config: Config
    accelerator: Accelerator


class Callback:
    """Override what you need and give it to the Trainer: `Trainer(..., callbacks=[Mine()])`.

    Only the first of several processes calls. Random numbers drawn here change nothing in the training.
    """

    def on_start(self, trainer: Run) -> None:
        """Before the first step of `train()`."""

    def on_step(self, trainer: Run, loss: Tensor) -> None:
        """After every step; `loss` is a scalar on the device (this process's samples): reading it waits for a GPU."""

    def on_log(self, trainer: Run, line: dict[str, Any]) -> None:
        """After every line of `metrics.jsonl`."""

    def on_checkpoint(self, trainer: Run, folder: Path) -> None:
        """After a checkpoint is on the disk."""

    def on_sample(self, trainer: Run, samples: Tensor, paths: list[Path]) -> None:
        """After samples (B, C, *grid) in [0, 1] were drawn and written to `paths`."""

    def evaluate(self, trainer: Run, diffusion: GaussianDiffusion) -> dict[str, float] | None:
        """Scores of the averaged weights, each time after sampling; written to `evaluations.jsonl`."""

    def on_end(self, trainer: Run) -> None:
        """When `train()` ends, in whatever way."""


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
