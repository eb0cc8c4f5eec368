"""Curves as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rin_video.checkpoint import replacing

if TYPE_CHECKING:
    from rin_video.diagnose import Diagnosis


def plot_losses(diagnosis: Diagnosis, path: Path) -> None:
    """Loss at each noise level, beside the trivial predictors."""
    lines = {
        "always zero": (diagnosis.loss_zero, "--"),
        "copy of the input": (diagnosis.loss_copy, ":"),
        "first pass, no memory": (diagnosis.loss_first_pass, "-"),
        "second pass": (diagnosis.loss, "-o"),
        "second pass, weights not averaged": (diagnosis.loss_raw, "-"),
    }
    with _figure(path, 1) as (axes,):
        for name, (values, style) in lines.items():
            if values is not None:
                axes.plot(diagnosis.t, values, style, label=name)
        axes.set(
            xlabel="t (0: clean, 1: noise)", ylabel="loss, not weighted", yscale="log", title="loss by noise level"
        )
        axes.legend()


def plot_metrics(metrics: Path, path: Path) -> None:
    """The loss, in all and by noise level, and the gradient norm of a `metrics.jsonl`."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows]
    with _figure(path, 3) as (total, by_noise, gradient):
        total.plot(steps, [row["loss"] for row in rows])
        total.set(xlabel="step", title="loss", yscale="log")
        bins = len(rows[0]["loss_by_t"]) if rows else 0
        for i in range(bins):
            values = [row["loss_by_t"][i] for row in rows]
            shown = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
            by_noise.plot(*zip(*shown, strict=True) if shown else ([], []), color=f"{0.8 - 0.8 * i / bins:.2f}", lw=1)
        by_noise.set(xlabel="step", title="loss by noise level (black: noise, grey: clean)", yscale="log")
        gradient.plot(steps, [row["grad_norm"] for row in rows])
        gradient.set(xlabel="step", title="gradient norm", yscale="log")


@contextmanager
def _figure(path: Path, panels: int) -> Iterator[list[Any]]:
    """Axes side by side; written atomically when the block ends. Needs no display and leaves no state behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    yield list(figure.subplots(1, panels, squeeze=False)[0])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
