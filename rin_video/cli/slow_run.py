"""A warning about a training that takes very long on this machine."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from rin_video.training.callbacks import Callback, Run
from rin_video.wording import counted, in_hours

log = logging.getLogger("rin_video")

LONG = 6 * 3600  # seconds on a CPU; other devices, and numbers of steps that the user sets:
WEEK = 7 * 86400
MEASURED, MEASURED_GPU = 10.0, 30.0  # seconds of training to measure for an estimate
SHORT = 2 * 3600  # seconds that the proposed number of steps takes


class SlowRunHint(Callback):
    """Warns once if the remaining steps take hours on a CPU or a week on a GPU, and lists faster alternatives.

    With `steps_given`, the user has set the number of steps: then a GPU may take any time. A run of a given time is
    never too long.
    """

    def __init__(self, steps_given: bool = False) -> None:
        self.steps_given = steps_given
        self.first: tuple[int, float] | None = None  # the first step, which is not measured, and the time of its end
        self.done = False

    def on_step(self, trainer: Run, loss: Tensor) -> None:
        """Measure steps, and log the warning when the estimate is ready."""
        now, on_cpu = time.monotonic(), trainer.accelerator.device.type == "cpu"
        if self.done or trainer.config.train.time is not None or (self.steps_given and not on_cpu):
            return
        if self.first is None:
            self.first = trainer.step, now
            return
        step, start = self.first
        if now - start < (MEASURED if on_cpu else MEASURED_GPU):
            return
        self.done = True
        seconds = (now - start) / (trainer.step - step)
        left = trainer.config.train.train_num_steps - trainer.step
        if seconds * left > (LONG if on_cpu else WEEK):
            fewer = trainer.step + max(round(SHORT / seconds), 1)
            log.warning(
                "the remaining %s will take about %s on this %s, %.2g s each: use --time 2h in a new folder (--out), "
                "which chooses a model that is good in this time, a %s, a small model (--config demo), or fewer steps "
                "(--steps %d takes %s)",
                counted(left, "step"),
                in_hours(seconds * left),
                "CPU" if on_cpu else "device",
                seconds,
                "GPU" if on_cpu else "faster GPU",
                fewer,
                in_hours(seconds * (fewer - trainer.step)),
            )
