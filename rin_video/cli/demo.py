"""`rin-video demo`: generates data, trains a small model and samples clips, in a few minutes on a CPU."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rin_video.config_files import load_config
from rin_video.wording import counted, in_hours

log = logging.getLogger("rin_video")

# The preset itself holds nothing out and has no guidance, because it is also used for a few files without classes.
HELD_OUT = ("data.validation=0.1", "train.validate_every=200", "train.validation_samples=16")
GUIDANCE = ("sample.guidance=1", "sample.guidance_interval=[0.1,1]")
TIME = "train.time=4m"  # making the clips and sampling take the rest of five minutes


def add_parsers(commands: Any) -> None:
    """Add the parser of `demo`."""
    command = commands.add_parser(
        "demo", help="generate clips, train a tiny model on them and sample; takes a few minutes on a CPU"
    )
    command.add_argument("--out", default="runs/demo", metavar="DIR", help="output folder (default: runs/demo)")
    command.set_defaults(run=demo, overrides=[])


def demo(options: Namespace) -> None:
    """Run the demo."""
    run_demo(Path(options.out), options.overrides)


def run_demo(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Write a demo set of clips to `folder`, train the preset `demo` on it, and sample.

    Writes `data/`, `run/`, `sample.mp4` and `contact_sheet.png` in `folder`. The training takes four minutes, unless
    `overrides` set its steps. A second call resumes it.
    """
    import torch

    from rin_video.datasets.demo import SHAPES, write_demo_set
    from rin_video.datasets.open import open_sides
    from rin_video.diffusion.process import GaussianDiffusion
    from rin_video.media import DEFAULT_FPS, contact_sheet, save_samples
    from rin_video.model.info import describe
    from rin_video.model.rin import RIN
    from rin_video.training.trainer import Trainer

    start = time.perf_counter()
    length = () if any(override.startswith("train.train_num_steps=") for override in overrides) else (TIME,)
    config = load_config("demo", [*HELD_OUT, *GUIDANCE, *length, *overrides])
    config.data.path = str(folder / "data")
    clips = write_demo_set(folder / "data")
    sides = open_sides(folder / "data", (3, config.model.frames or 0, *config.model.height_width), config.data)
    kinds = ", ".join(SHAPES)
    log.info("1. %s of moving shapes (%s): %s; %s", counted(len(clips), "clip"), kinds, folder / "data", sides.note)
    log.info("2. training a small model on them\n%s", describe(config.model))
    torch.manual_seed(config.train.seed)
    diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
    trainer = Trainer(diffusion, sides.train, validation=sides.validation, results_folder=folder / "run", config=config)
    trainer.train()
    log.info("3. sampling new clips, one column per class")
    samples = trainer.averaged().sample(config.sample, seed=0, progress=True)
    save_samples(samples, folder / "sample.mp4", fps=config.sample.fps or DEFAULT_FPS)
    contact_sheet(samples, folder / "contact_sheet.png")
    log.info(
        "done in %s. Look at\n"
        "  %s (with any browser or player)\n"
        "  %s (one row per clip, time from left to right)\n"
        "Next: rin-video evaluate %s, or rin-video train --data YOUR_CLIPS --frames 16",
        in_hours(time.perf_counter() - start),
        folder / "sample.mp4",
        folder / "contact_sheet.png",
        folder / "run",
    )
