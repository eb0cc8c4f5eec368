"""`metrics.jsonl`: accumulates metrics over steps and processes, also across an interruption, and reads the file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rin_video.config_checks import is_number
from rin_video.diffusion.process import LossTerms
from rin_video.files import sync, write_text

NOISE_BINS = 10
VALIDATION_LEVELS = 8  # fixed noise levels of the validation loss


class Failure(NamedTuple):
    """A step whose loss or gradient is not finite, and its samples by index in the dataset.

    With `of_loss`, the loss of these samples is not finite. Otherwise only the gradient is not finite, and `samples`
    has all samples of the step.
    """

    step: int
    samples: list[int]
    of_loss: bool


class Metrics:
    """Accumulates loss, loss by noise level, gradient norm and rates between lines of `metrics.jsonl`.

    Values are copied from the device only when a line is due. Lines after `step`, left by an interrupted run, are
    removed. Accumulation continues from `state`, which comes from the checkpoint. So the file of a resumed run has each
    line once, as without an interruption. `gather` concatenates tensors (1, ...) of all processes. Only the process
    with a `path` writes.
    """

    def __init__(
        self,
        path: Path | None,
        step: int,
        *,
        state: dict[str, Tensor] | None = None,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.path, self.gather = path, gather
        if path is not None:
            trim_lines(path, step)
        self.restart(step)
        self.before.update(state or {})

    def restart(self, step: int) -> None:
        """Discard the accumulated values; the next ones are those of step `step` + 1."""
        self.step = step  # the last step before `terms`
        # Values from before the interruption.
        self.before = {name: torch.empty(0) for name in ("loss", "t", "grad_norm")}
        self.terms: list[LossTerms] = []
        self.indices: list[Tensor] = []
        self.grad_norms: list[Tensor] = []
        self.waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time so far (sampling, saving) from the rates."""
        self.clock, self.counted, self.waited = time.perf_counter(), len(self.terms), 0.0

    def add(
        self, terms: list[LossTerms], grad_norm: Tensor, waited: float = 0.0, indices: list[list[int]] | None = None
    ) -> None:
        """Add a step.

        `terms` has the loss of each forward pass, `waited` the seconds spent waiting for data, and `indices` the
        samples of each pass by their index in the dataset.
        """
        self.indices.append(torch.tensor(indices or [[-1] * len(term.loss) for term in terms]))
        self.terms.append(LossTerms(*(torch.stack(column) for column in zip(*terms, strict=True))))
        self.grad_norms.append(torch.as_tensor(grad_norm))
        self.waited += waited

    def gathered(self) -> dict[str, Tensor]:
        """Gather losses and times t (processes, steps, passes, samples) and gradient norms (steps,) on the CPU."""
        loss, t, _ = (torch.stack(column).float() for column in zip(*self.terms, strict=True))
        return {
            "loss": self.gather(loss[None]).cpu(),
            "t": self.gather(t[None]).cpu(),
            "grad_norm": torch.stack(self.grad_norms).float().cpu(),
        }

    def state(self) -> dict[str, Tensor]:
        """Return the accumulated values of the next line, flat, for a checkpoint."""
        if not self.terms:
            return self.before
        new = self.gathered()
        return {name: torch.cat([self.before[name], new[name].flatten()]) for name in self.before}

    def failure(self, *, check_gradient: bool = True) -> Failure | None:
        """Return the first step whose loss, or with `check_gradient` gradient, is not finite; None if there is none."""
        if not self.terms:
            return None
        new = self.gathered()
        bad = ~new["loss"].isfinite()
        steps = bad.any(3).any(2).any(0)
        if check_gradient:
            steps |= ~new["grad_norm"].isfinite()
        if not steps.any():
            return None
        index = int(steps.nonzero()[0])
        # (processes, passes, samples), as the losses are
        samples = self.gather(self.indices[index][None].to(self.terms[0].loss.device)).cpu()
        of_loss = bool(bad[:, index].any())
        chosen = samples[bad[:, index]] if of_loss else samples
        return Failure(self.step + index + 1, sorted(set(chosen.flatten().tolist())), of_loss)

    def write(self, step: int, lr: float) -> dict[str, Any]:
        """Write a line for the steps since the last one; return it in all processes. `lr` is the learning rate."""
        new, seconds = self.gathered(), max(time.perf_counter() - self.clock, 1e-9)
        loss, t, grad_norm = (torch.cat([self.before[name], new[name].flatten()]) for name in self.before)
        bins = (t * NOISE_BINS).long().clamp(max=NOISE_BINS - 1)
        by_noise = [loss[bins == i].mean().item() if (bins == i).any() else None for i in range(NOISE_BINS)]
        samples = new["loss"][:, self.counted :].numel()
        line = {
            "step": step,
            "loss": loss.mean().item(),
            "loss_by_t": by_noise,
            "grad_norm": grad_norm.mean().item()
            if grad_norm.isfinite().all()
            else None,  # not finite while the scaler of fp16 adapts its range
            "lr": lr,
            "samples_per_second": samples / seconds,
            "data_wait": min(self.waited / seconds, 1.0),
        }
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.restart(step)
        return line

    def sync(self) -> None:
        """Wait until the lines are stored on the disk; a checkpoint relies on them."""
        if self.path is not None and self.path.exists():
            sync(self.path)


def describe_line(line: dict[str, Any], validation: dict[str, Any] | None = None) -> str:
    """Format a line of the metrics, and the last validation loss, for the progress bar.

    It includes the wait for data from 5% of the time.
    """
    text = f"loss {line['loss']:.4f}"
    text += f", validation {validation['validation_loss']:.4f}" if validation else ""
    text += f", {line['samples_per_second']:.1f} samples/s"
    return text + (f", {line['data_wait']:.0%} waiting for data" if line["data_wait"] >= 0.05 else "")


def trim_lines(path: Path, step: int) -> None:
    """Remove lines after `step` and incomplete lines from a JSON-lines file."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines about training in a `metrics.jsonl`; incomplete lines and all others are skipped."""
    return [line for line in _read_all(path) if is_line(line)]


def read_validation(path: Path) -> list[dict[str, Any]]:
    """Read the lines about the validation loss in a `metrics.jsonl`; incomplete lines and all others are skipped."""
    return [line for line in _read_all(path) if is_validation_line(line)]


def _read_all(path: Path) -> list[Any]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return lines


def is_validation_line(line: Any) -> bool:
    """Return whether a line of a `metrics.jsonl` is about the validation loss, with valid numbers."""
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return False
    names = ("validation_loss", "train_loss_fixed")
    rows: list[Any] = [line.get(f"{name}_by_t") for name in names]
    if not all(isinstance(row, list) and len(row) == VALIDATION_LEVELS for row in rows):
        return False
    values: list[Any] = [line.get(name) for name in names] + [value for row in rows for value in row]
    return all(is_number(value) and value >= 0 for value in values)


def is_line(line: Any) -> bool:
    """Return whether a line of a `metrics.jsonl` has the entries that the report shows, with valid numbers."""
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return False
    by_t, rest = line.get("loss_by_t"), [line.get(name) for name in ("grad_norm", "lr", "data_wait")]
    if not isinstance(by_t, list) or len(by_t) != NOISE_BINS:
        return False
    return all(map(is_number, (line.get("loss"), line.get("samples_per_second")))) and all(
        value is None or is_number(value) for value in (*by_t, *rest)
    )
