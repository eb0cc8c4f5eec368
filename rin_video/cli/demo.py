"""`rin-video demo`: from nothing to a clip in a few minutes on a CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rin_video.config_files import load_config
from rin_video.datasets.demo import SHAPES, write_demo_set
from rin_video.datasets.open import open_dataset
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.media import DEFAULT_FPS, contact_sheet, save_samples
from rin_video.model.info import describe
from rin_video.model.rin import RIN
from rin_video.training.trainer import Trainer

log = logging.getLogger("rin_video")


def run_demo(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Write a demo set of clips, train the preset `demo` on it, and sample; all below `folder`.

    Leaves `folder/data`, `folder/run`, `folder/sample.mp4` and `folder/contact_sheet.png`. Run again, it goes on where
    it stopped.
    """
    start = time.perf_counter()
    config = load_config("demo", overrides)
    clips = write_demo_set(folder / "data")
    dataset = open_dataset(folder / "data", (3, config.model.frames or 0, *config.model.height_width), config.data)
    log.info("1. %d clips of moving shapes (%s): %s", len(clips), ", ".join(SHAPES), folder / "data")
    log.info("2. training a small model on them\n%s", describe(config.model))
    torch.manual_seed(config.train.seed)
    diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
    trainer = Trainer(diffusion, dataset, results_folder=folder / "run", config=config)
    trainer.train()
    log.info("3. sampling new clips, a column for each class")
    samples = trainer.averaged().sample(config.sample, seed=0, progress=True)
    save_samples(samples, folder / "sample.mp4", fps=config.sample.fps or DEFAULT_FPS)
    contact_sheet(samples, folder / "contact_sheet.png")
    minutes = (time.perf_counter() - start) / 60
    log.info(
        "done in %.1f minutes. Look at\n"
        "  %s (any browser or player)\n"
        "  %s (a row for each clip, time from left to right)\n"
        "Next: rin-video train --data YOUR_CLIPS --frames 16",
        minutes,
        folder / "sample.mp4",
        folder / "contact_sheet.png",
    )
