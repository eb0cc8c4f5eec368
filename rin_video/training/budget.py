"""Training for a given time (`train.time`): what the clock says about steps, checkpoints and the end.

The learning rate and the end follow the fraction of the time that is spent. The time for steps is the budget without a
reserve for the end: a last validation, checkpoint and preview. How long these take is measured whenever they happen,
and estimated from the time of a step before that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rin_video.config import Config
from rin_video.config_checks import split_parameters
from rin_video.training.metrics import VALIDATION_LEVELS
from rin_video.wording import counted, in_seconds

SAVES = 10  # checkpoints and previews in a run, if
SAVING = 0.1  # they take at most this fraction of the time
RECENT = 32  # steps whose mean time is the expected one
RESERVED, FIRST = 0.2, 3  # a reserve above this fraction of the time logs a warning after this step
FEW = 10  # fewer steps log a warning
BETWEEN = 1.0  # seconds between broadcasts of the clock, so that processes seldom wait for each other

# Estimates of the end before its parts are measured.
BACKWARD = 2.0  # duration of a backward pass, in forward passes
WRITING = 2e8  # bytes per second of writing a checkpoint
PLOTTING = 1.0  # seconds to plot metrics and write samples


class Pace(NamedTuple):
    """What all processes know about the time at the end of a step."""

    step: int = 0
    fraction: float = 0.0  # of the time for steps that is spent, in [0, 1]; 1: this is the last step
    per_step: float = 0.0  # this fraction for one step
    num_steps: int = 0  # expected number of steps of the run; `step` if this is the last one
    saves: bool = False  # whether it is time for a checkpoint and samples
    until: int = 0  # step at which the clock is read again

    @property
    def is_last(self) -> bool:
        """Whether the time is over."""
        return self.num_steps == self.step


class Budget:
    """The time of a run, counted over all its starts; the time between two starts does not count.

    `seconds` is the time of the run. `expected` returns the seconds that the parts of the end take, by name, for the
    seconds of a step. With several processes, `share` returns the numbers of the main process in all of them. All
    processes must call `advance` after every step.
    """

    def __init__(
        self,
        seconds: float,
        *,
        expected: Callable[[float], Mapping[str, float]] = lambda step_seconds: {},
        share: Callable[[Sequence[float]], Sequence[float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self.expected, self.share, self.clock = seconds, expected, share, clock
        self.pace = Pace()
        self.before = 0.0  # seconds of earlier starts
        self.parts: dict[str, float] = {}  # measured seconds of the parts of the end
        self.began: float | None = None
        self.last_save = 0.0  # `spent` at the last checkpoint
        self.restart(0)

    def restart(self, step: int) -> None:
        """Forget the time of steps; the next one is step `step` + 1."""
        self.pace = Pace(step, num_steps=step + 1)
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.num_steps = 0  # in this start
        self.mark = self.clock()  # the end of the last step, moved by the time of what is no step

    def start(self, step: int) -> None:
        """Begin to count, before step `step` + 1."""
        self.began, self.last_save = self.clock(), self.before
        self.restart(step)

    def stop(self) -> None:
        """End the count. After the last step, all of the time is spent, also if the end was faster than expected."""
        self.before = max(self.spent, self.seconds) if self.pace.is_last else self.spent
        self.began = None

    @property
    def spent(self) -> float:
        """The seconds spent in training, over all starts."""
        return self.before + (0.0 if self.began is None else self.clock() - self.began)

    @property
    def is_over(self) -> bool:
        """Whether an earlier start has used all of the time."""
        return self.spent >= self.seconds

    @property
    def step_seconds(self) -> float:
        """The mean time of recent steps, in seconds; 0 before the first one."""
        return sum(self.recent) / len(self.recent) if self.recent else 0.0

    @property
    def reserve(self) -> float:
        """The seconds that the end is expected to take: as long as the last time, if there was one."""
        return sum({**self.expected(self.step_seconds), **self.parts}.values())

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Measure a part of the end; its time is not part of a step."""
        start = self.clock()
        yield
        self.parts[part] = self.clock() - start
        self.mark += self.parts[part]
        if part == "checkpoint":
            self.last_save = self.spent

    def advance(self, step: int) -> Pace:
        """Return the pace at the end of step `step`.

        The clock is read at every step. With several processes it is that of the main process, which is broadcast about
        once a second; in between, the pace continues with the measured time of a step.
        """
        now = self.clock()
        if self.num_steps == 1:
            self.recent.clear()  # the first step contains the start of the data loader, and compilation
        self.recent.append(now - self.mark)
        self.mark, self.num_steps = now, self.num_steps + 1
        if step < self.pace.until:
            fraction = min(self.pace.fraction + self.pace.per_step, 1.0)
            self.pace = self.pace._replace(step=step, fraction=fraction, saves=False)
        else:
            pace = self._read(step)
            self.pace = pace if self.share is None else Pace(*self._types(self.share([float(n) for n in pace])))
        return self.pace

    def _read(self, step: int) -> Pace:
        """Return the pace by the clock of this process."""
        spent, reserve, step_seconds = self.spent, self.reserve, max(self.step_seconds, 1e-6)
        usable = max(self.seconds - reserve, self.seconds / 2)
        left = (usable - spent) / step_seconds  # steps
        per_step = min(step_seconds / usable, 1.0)
        if left < 0.5:  # the end is as near as possible to that of the budget
            return Pace(step, 1.0, per_step, step, True, step)
        num_steps = step + max(round(left), 1)
        interval = max(self.seconds / SAVES, reserve / SAVING)
        saves = spent - self.last_save >= interval and usable - spent >= interval / 2
        steps = 1 if self.share is None else min(max(int(BETWEEN / step_seconds), 1), num_steps - step)
        return Pace(step, min(spent / usable, 1.0), per_step, num_steps, saves, step + steps)

    @staticmethod
    def _types(numbers: Sequence[float]) -> tuple[int, float, float, int, bool, int]:
        step, fraction, per_step, num_steps, saves, until = numbers
        return round(step), fraction, per_step, round(num_steps), bool(saves), round(until)

    def warning(self) -> str | None:
        """Return a warning if this is the time for one: little time for training, or very few steps."""
        if self.num_steps == FIRST and self.reserve > RESERVED * self.seconds:
            return (
                f"the last validation, checkpoint and samples will take about {in_seconds(self.reserve)} of the "
                f"{in_seconds(self.seconds)}: a smaller sample.num_samples or sample.steps leaves more for training"
            )
        if self.pace.is_last and self.pace.step < FEW:
            return (
                f"only {counted(self.pace.step, 'step')} of {in_seconds(self.step_seconds)} fitted into "
                f"{in_seconds(self.seconds)}: use more time, a smaller model or smaller batches"
            )
        return None

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint that is written now; in that of the last step, all time is spent."""
        spent = max(self.spent, self.seconds) if self.pace.is_last else self.spent
        return {"spent": spent, "parts": dict(self.parts)}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Continue from the state in a checkpoint; None: one of a run without a budget, whose time does not count."""
        state = state or {"spent": 0.0, "parts": {}}
        self.before, self.parts, self.began = float(state["spent"]), dict(state["parts"]), None


def expected_end(config: Config, num_params: int, step_seconds: float, *, validated: bool) -> dict[str, float]:
    """Estimate the seconds of the last validation, checkpoint and preview from the seconds of a training step.

    A step contains a forward and a backward pass of each sample, and a first pass of those that are self-conditioned.
    Samples are assumed to take equally long in any batch.
    """
    train, sample, first_pass = config.train, config.sample, config.diffusion.train_prob_self_cond
    forwards = train.train_batch_size * train.gradient_accumulate_every * (1 + BACKWARD + first_pass)
    forward = step_seconds / forwards  # seconds of a sample
    calls = sample.steps * (1 + (split_parameters(sample.sampler)[0] == "heun")) * (1 + bool(sample.guidance))
    passes = 2 * train.validation_samples * VALIDATION_LEVELS * (1 + bool(first_pass))
    copies = 5 + len(train.ema_sigma_rel)  # weights, EMA in the state and for use, two moments
    return {
        "validation": passes * forward if validated else 0.0,
        "checkpoint": 4 * copies * num_params / WRITING,
        "samples": sample.num_samples * calls * forward + PLOTTING,
    }
