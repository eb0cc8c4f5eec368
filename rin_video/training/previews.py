"""Preview samples during training; a file that cannot be written logs a warning, and training continues."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rin_video.config import Config
from rin_video.datasets.batch import collate
from rin_video.datasets.epochs import EpochDataset
from rin_video.datasets.mixed import MixedDataset
from rin_video.diffusion.masks import draw_known
from rin_video.diffusion.noise import seeded_generators
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import first_line
from rin_video.media import can_be_picture, contact_sheet, save_samples
from rin_video.training.parallel_sampling import sample_distributed

log = logging.getLogger("rin_video")


@contextmanager
def harmless(what: object) -> Iterator[None]:
    """Convert any error within the block to a warning that `what` could not be written."""
    try:
        yield
    except Exception as error:
        log.warning("%s could not be written, training continues: %s", what, first_line(error))


def write_previews(samples: Tensor, images: Tensor | None, run: Path, step: int, fps: float) -> list[Path]:
    """Write the samples of a step, and `images` if training mixes clips and images; return the written files."""
    name = run / "samples" / f"step-{step:08d}"
    if images is not None:
        write_preview(images, name.with_name(f"{name.name}-images"), fps)
    write_preview(samples, name, fps)
    return previews_of(run, step)


def write_preview(samples: Tensor, name: Path, fps: float) -> None:
    """Write samples (B, C, *grid) in [0, 1].

    Images become `name`.png. Clips become `name`.mp4 and a contact sheet `name`.png with a row for each clip. Other
    samples become `name`.safetensors.
    """
    picture = name.with_suffix(".png" if can_be_picture(samples.shape) else ".safetensors")
    with harmless(picture):
        if samples.ndim == 5 and picture.suffix == ".png":
            contact_sheet(samples, picture)
        else:
            save_samples(samples, picture)
    if samples.ndim == 5 and samples.shape[1] in (1, 3):
        clip = name.with_suffix(".mp4")
        with harmless(clip):
            save_samples(samples, clip, fps=fps)


def draw_previews(
    averaged: GaussianDiffusion, data: Any, config: Config, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Draw samples as configured in `sample`; return them, and images if training mixes clips and images.

    The seed and the conditions are the same every time, so that previews are comparable. Must be called by all
    processes.
    """

    def draw(part: Any, **more: Any) -> Tensor:
        conditions = preview_conditions(part, config)
        return sample_distributed(averaged, config.sample, seed=config.train.seed, **conditions, **options, **more)

    if not isinstance(data, MixedDataset):
        return draw(data), None
    channels, _, *size = averaged.shape or ()
    return draw(data.clips), draw(data.images, shape=(channels, *size))


def preview_conditions(data: Any, config: Config) -> dict[str, Tensor]:
    """Return the conditions of previews, taken from the first samples of the data.

    These are the embeddings, if the model uses them, and the known pixels, if every training sample has some.
    """
    kinds, count = config.diffusion.known, config.sample.num_samples
    always = bool(kinds) and not kinds.get("none")
    if not always and not config.model.embedding_dim:
        return {}
    batch, conditions = collate([EpochDataset(data)[0, i % len(data)] for i in range(count)]), {}
    if batch.embedding is not None:
        conditions["embedding"] = batch.embedding
    if always:
        generators = seeded_generators(config.train.seed, range(count))
        known = draw_known(kinds, config.diffusion.known_frames, count, batch.x.shape[2:], generators)
        if known.any():  # images take fewer kinds than clips
            conditions |= {"context": batch.x, "known": known}
    return conditions


def previews_of(run: Path, step: int) -> list[Path]:
    """Return the samples that were written at a step."""
    return sorted((run / "samples").glob(f"step-{step:08d}[.-]*"))


def is_previewed(run: Path, step: int) -> bool:
    """Return whether the samples of a step were written as an image or as arrays; a clip alone is not sufficient."""
    return any(path.stem == f"step-{step:08d}" and path.suffix != ".mp4" for path in previews_of(run, step))
