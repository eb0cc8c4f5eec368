"""Plots of metrics as PNG and SVG; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rin_video.files import atomic_write


def plot_metrics(rows: list[dict[str, Any]], path: Path, validation: Sequence[dict[str, Any]] = ()) -> None:
    """Plot the loss, the loss by noise level and the gradient norm of lines of a `metrics.jsonl` to an image file.

    If there are lines about the validation loss, another panel has its curve.
    """
    steps = [row["step"] for row in rows]
    with draw_figure(path, 4 if validation else 3) as (total, by_noise, gradient, *rest):
        for axes in rest:
            _plot_validation(axes, validation)
        total.plot(steps, [row["loss"] for row in rows])
        total.set(xlabel="step", title="loss", yscale="log")
        bins = len(rows[0]["loss_by_t"]) if rows else 0
        for i in range(bins):
            values = [row["loss_by_t"][i] for row in rows]
            shown = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
            by_noise.plot(*zip(*shown, strict=True) if shown else ([], []), color=f"{0.8 - 0.8 * i / bins:.2f}", lw=1)
        by_noise.set(xlabel="step", title="loss by noise level (black: noise, grey: clean)", yscale="log")
        gradient.plot(steps, [math.nan if row.get("grad_norm") is None else row["grad_norm"] for row in rows])
        gradient.set(xlabel="step", title="gradient norm", yscale="log")


def metrics_svg(rows: list[dict[str, Any]], points: int = 500) -> str:
    """Plot lines of a `metrics.jsonl` and return the SVG text; at most `points` lines are drawn.

    The panels are the loss, the loss by noise level, the gradient norm, the learning rate, the throughput and the time
    spent waiting for data.
    """
    rows = rows[:: max(1, math.ceil(len(rows) / points))]
    steps = [row["step"] for row in rows]
    panels = {
        "loss": "log",
        "grad_norm": "log",
        "lr": "linear",
        "samples_per_second": "linear",
        "data_wait": "linear",
    }
    figure, axes = _axes(2, 3)
    for (name, scale), plot in zip(panels.items(), [*axes[:1], *axes[2:]], strict=True):
        values = [row.get(name) for row in rows]
        plot.plot(steps, [math.nan if value is None else value for value in values])
        plot.set(xlabel="step", title=PANEL_TITLES.get(name, name), yscale=scale)
    table = [[math.nan if v is None else v for v in row["loss_by_t"]] for row in rows]
    heights = np.log10(np.maximum(np.array(table, dtype=float).T, 1e-12))
    picture = axes[1].pcolormesh(steps, np.linspace(0.05, 0.95, len(heights)), heights, shading="nearest")
    axes[1].set(xlabel="step", ylabel="t (1: noise)", title="log10 of the loss by noise level")
    figure.colorbar(picture, ax=axes[1])
    return _as_svg(figure)


PANEL_TITLES = {
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "samples_per_second": "samples per second",
    "data_wait": "share of time waiting for data",
}


def validation_svg(rows: Sequence[dict[str, Any]], points: int = 500) -> str:
    """Plot the lines about the validation loss and return the SVG text; at most `points` lines are drawn.

    The panels are the losses of held-out and of training samples, and the ratio of the two at each noise level.
    """
    rows = rows[:: max(1, math.ceil(len(rows) / points))]
    figure, (curve, ratio) = _axes(1, 2)
    _plot_validation(curve, rows)
    levels = len(rows[0]["validation_loss_by_t"]) if rows else 0
    for i in range(levels):
        pairs = [(row["validation_loss_by_t"][i], row["train_loss_fixed_by_t"][i]) for row in rows]
        values = [held / trained if trained > 0 else math.nan for held, trained in pairs]
        ratio.plot([row["step"] for row in rows], values, color=f"{0.8 - 0.8 * i / levels:.2f}", lw=1, marker=".")
    ratio.set(xlabel="step", title="validation loss / training loss by noise level (black: noise, grey: clean)")
    return _as_svg(figure)


def _plot_validation(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the losses of held-out and of training samples at the fixed noise levels."""
    for name, label in (("validation_loss", "held-out samples"), ("train_loss_fixed", "training samples")):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, marker=".")
    axes.set(xlabel="step", title="loss of the EMA weights at fixed noise levels", yscale="log")
    axes.legend()


def _as_svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]


def _import_matplotlib() -> None:
    """Import matplotlib even if MPLBACKEND names a backend that is not installed, as in a shell command on Colab.

    The backend is set after the import if it is available, so that other plots in this process use it.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        if backend is not None:
            with suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _axes(rows: int, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure that needs no display, and its axes."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@contextmanager
def draw_figure(path: Path, panels: int) -> Iterator[list[Any]]:
    """Yield `panels` axes side by side; write the figure to `path` atomically at the end of the block.

    This needs no display and does not change the global state of matplotlib.
    """
    figure, axes = _axes(1, panels)
    yield axes
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
