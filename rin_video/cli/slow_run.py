"""A hint where a training takes very long."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from rin_video.training.callbacks import Callback, Run
from rin_video.wording import counted, in_hours

log = logging.getLogger("rin_video")

LONG = 6 * 3600  # seconds
MEASURED = 10.0  # seconds of training that an estimate needs
SHORT = 2 * 3600  # seconds: of the number of steps that is proposed


class SlowRunHint(Callback):
    """Logs once how long the steps that are left take on a CPU, and what takes less, where that is hours."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None  # a step, which is not measured, and when it was done
        self.done = False

    def on_step(self, trainer: Run, loss: Tensor) -> None:
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
                "%s left take about %s on this CPU, %.2g s each: use a GPU, a small model (--config demo), or fewer "
                "steps (--steps %d takes %s)",
                counted(left, "step"),
                in_hours(seconds * left),
                seconds,
                fewer,
                in_hours(seconds * (fewer - trainer.step)),
            )
