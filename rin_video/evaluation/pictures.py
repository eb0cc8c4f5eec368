"""Pictures of an evaluation: samples, predictions under their truth, and the samples closest to training samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rin_video.evaluation.extraction import Measured
from rin_video.media import contact_sheet, write_image_grid
from rin_video.training.previews import harmless

ROWS = 8
LEAST_SIZE = 64  # pixels: smaller pictures are enlarged


def write_pictures(folder: Path, measured: Measured, given: int | None, name: str) -> None:
    """Write `samples.png`, and if there are predictions or training samples `predictions.png` and `closest.png`.

    `name` is that of the result; unless it is "scores", the names of the pictures begin with it.
    """
    prefix = "" if name in ("", "scores") else f"{name}-"
    samples, real, train = measured.samples, measured.real, measured.train
    count = min(ROWS, len(samples))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(
        [samples.read(i) for i in range(count)], [f"sample {i}" for i in range(count)], folder / f"{prefix}samples.png"
    )
    if given is not None:
        rows = [(real.read(i), samples.read(i)) for i in range(min(ROWS, len(real)))]
        titles = [title for i in range(len(rows)) for title in (f"truth {i}", f"prediction {i} (given {given})")]
        write_rows([clip for pair in rows for clip in pair], titles, folder / f"{prefix}predictions.png")
    if train is not None and measured.pairs:
        pairs = [(samples.read(i), train.read(j)) for i, j in measured.pairs]
        titles = [
            title for i, j in measured.pairs for title in (f"sample {i}", f"training {Path(train.file_of(j)).name}")
        ]
        write_rows([x for pair in pairs for x in pair], titles, folder / f"{prefix}closest.png")


def write_rows(pictures: Sequence[Tensor], titles: Sequence[str], path: Path) -> None:
    """Write clips as rows of frames, or images as a grid; a failure logs a warning."""
    upscale = max(1, LEAST_SIZE // pictures[0].shape[-1])
    with harmless(path):
        if pictures[0].ndim == 4:
            contact_sheet(pictures, path, upscale=upscale, titles=titles)
        else:
            write_image_grid(pictures, path, upscale=upscale, titles=titles, columns=2 * (len(pictures) > 2) or None)
