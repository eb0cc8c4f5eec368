"""Pictures of a training that runs: one that cannot be drawn, encoded or written is a warning, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from rin_video.errors import first_line
from rin_video.media import can_be_picture, contact_sheet, save_samples

log = logging.getLogger("rin_video")


@contextmanager
def harmless(what: object) -> Iterator[None]:
    """Turns any error within the block into a warning that `what` could not be made."""
    try:
        yield
    except Exception as error:
        log.warning("%s could not be made, and the run goes on: %s", what, first_line(error))


def write_previews(samples: Tensor, name: Path, fps: float) -> None:
    """Write samples (B, C, *grid) as `name`.png; clips as `name`.mp4 and, a row for each, .png; else .safetensors."""
    picture = name.with_suffix(".png" if can_be_picture(samples.shape) else ".safetensors")
    with harmless(picture):
        name.parent.mkdir(parents=True, exist_ok=True)
        if samples.ndim == 5 and picture.suffix == ".png":
            contact_sheet(samples, picture)
        else:
            save_samples(samples, picture)
    if samples.ndim == 5 and samples.shape[1] in (1, 3):
        clip = name.with_suffix(".mp4")
        with harmless(clip):
            save_samples(samples, clip, fps=fps)
