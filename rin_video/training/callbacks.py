"""What a training run calls besides training: look on, or measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from rin_video.diffusion.process import GaussianDiffusion
    from rin_video.training.trainer import Trainer


class Callback:
    """Override what you need and give it to the Trainer: `Trainer(..., callbacks=[Mine()])`.

    Only the first of several processes calls. Random numbers drawn here change nothing in the training.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of `train()`."""

    def on_step(self, trainer: Trainer, loss: Tensor) -> None:
        """After every step; `loss` is a scalar on the device (this process's samples): reading it waits for a GPU."""

    def on_log(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """After every line of `metrics.jsonl`."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint is on the disk."""

    def on_sample(self, trainer: Trainer, samples: Tensor, paths: list[Path]) -> None:
        """After samples (B, C, *grid) in [0, 1] were drawn and written to `paths`."""

    def evaluate(self, trainer: Trainer, diffusion: GaussianDiffusion) -> dict[str, float] | None:
        """Scores of the averaged weights, each time after sampling; written to `evaluations.jsonl`."""

    def on_end(self, trainer: Trainer) -> None:
        """When `train()` ends, in whatever way."""


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
