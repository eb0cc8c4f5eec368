"""A warning about a training that takes very long on a CPU."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from rin_video.training.callbacks import Callback, Run
from rin_video.wording import counted, in_hours

log = logging.getLogger("rin_video")

LONG = 6 * 3600  # seconds
MEASURED = 10.0  # seconds of training to measure for an estimate
SHORT = 2 * 3600  # seconds that the proposed number of steps takes


class SlowRunHint(Callback):
    """Warns once if the remaining steps take hours on a CPU, and lists faster alternatives."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None  # the first step, which is not measured, and the time of its end
        self.done = False

    def on_step(self, trainer: Run, loss: Tensor) -> None:
        """Measure steps, and log the warning when the estimate is ready."""
        now = time.monotonic()
        if self.done or trainer.accelerator.device.type != "cpu":
            return
        if self.first is None:
            self.first = trainer.step, now
            return
        step, start = self.first
        if now - start < MEASURED:
            return
        self.done = True
        seconds = (now - start) / (trainer.step - step)
        left = trainer.config.train.train_num_steps - trainer.step
        if seconds * left > LONG:
            fewer = trainer.step + max(round(SHORT / seconds), 1)
            log.warning(
                "the remaining %s will take about %s on this CPU, %.2g s each: use a GPU, a small model (--config "
                "demo), or fewer steps (--steps %d takes %s)",
                counted(left, "step"),
                in_hours(seconds * left),
                seconds,
                fewer,
                in_hours(seconds * (fewer - trainer.step)),
            )
