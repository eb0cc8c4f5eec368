"""`metrics.jsonl`: what is gathered between two lines of it, over all processes, and across a stop."""

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

from rin_video.diffusion.process import LossTerms
from rin_video.files import sync, write_text

NOISE_BINS = 10


class Failure(NamedTuple):
    """A step whose loss or gradient is not finite, and its samples by index in the dataset.

    `of_loss`: those whose loss is not finite; else, if only the gradient is not, all of the step.
    """

    step: int
    samples: list[int]
    of_loss: bool


class Metrics:
    """Gathers loss, loss by noise level, gradient norm and rates between lines of `metrics.jsonl`.

    Nothing is brought from the device before a line is due. Lines of a run that was cut off behind `step` are removed,
    and what was gathered when a checkpoint was written (`state`) is taken up again: each line stands in the file once,
    as if there had been no stop. `gather` brings together tensors (1, ...) of all processes.
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
        self.step = step  # the last one that is not in `terms`
        # From before the last stop.
        self.before = {name: torch.empty(0) for name in ("loss", "t", "grad_norm")}
        self.terms: list[LossTerms] = []
        self.indices: list[Tensor] = []
        self.grad_norms: list[Tensor] = []
        self.waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what came before (sampling, saving) out of the rates."""
        self.clock, self.counted, self.waited = time.perf_counter(), len(self.terms), 0.0

    def add(
        self, terms: list[LossTerms], grad_norm: Tensor, waited: float = 0.0, indices: list[list[int]] | None = None
    ) -> None:
        """One step: the terms of its forward passes, the seconds it waited for data, and which samples they were of."""
        self.indices.append(torch.tensor(indices or [[-1] * len(term.loss) for term in terms]))
        self.terms.append(LossTerms(*(torch.stack(column) for column in zip(*terms, strict=True))))
        self.grad_norms.append(torch.as_tensor(grad_norm))
        self.waited += waited

    def gathered(self) -> dict[str, Tensor]:
        """Losses and times (processes, steps, passes, samples) and gradient norms (steps,), on the CPU."""
        loss, t = (torch.stack(column).float() for column in zip(*self.terms, strict=True))
        return {
            "loss": self.gather(loss[None]).cpu(),
            "t": self.gather(t[None]).cpu(),
            "grad_norm": torch.stack(self.grad_norms).float().cpu(),
        }

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs, so that the line that is in the making comes out whole."""
        if not self.terms:
            return self.before
        new = self.gathered()
        return {name: torch.cat([self.before[name], new[name].flatten()]) for name in self.before}

    def failure(self, *, check_gradient: bool = True) -> Failure | None:
        """The first step whose loss (or gradient) is not a number."""
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
        """A line for the steps since the last one; all processes get it, the one with a path writes it."""
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
            else None,  # a scaler looks for its range
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
        """A checkpoint relies on the lines before it."""
        if self.path is not None and self.path.exists():
            sync(self.path)


def describe_line(line: dict[str, Any]) -> str:
    """A line of the metrics for the progress bar; waiting for data is said where it costs something."""
    text = f"loss {line['loss']:.4f}, {line['samples_per_second']:.1f} samples/s"
    return text + (f", {line['data_wait']:.0%} waiting for data" if line["data_wait"] >= 0.05 else "")


def trim_lines(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that lie behind `step`, and one that was cut short."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that is cut short, or is none that training writes, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if is_line(line):
                lines.append(line)
    return lines


def is_line(line: Any) -> bool:
    """Whether a line of a `metrics.jsonl` holds what the page shows, and numbers wherever it shows numbers."""
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return False
    by_t, rest = line.get("loss_by_t"), [line.get(name) for name in ("grad_norm", "lr", "data_wait")]
    if not isinstance(by_t, list) or len(by_t) != NOISE_BINS:
        return False
    return all(map(is_number, (line.get("loss"), line.get("samples_per_second")))) and all(
        value is None or is_number(value) for value in (*by_t, *rest)
    )


def is_number(value: Any) -> bool:
    with suppress(TypeError, OverflowError):
        return not isinstance(value, bool) and math.isfinite(value)
    return False
