"""Tiny trainings in a process of their own: `python tiny_run.py FOLDER key=value ... [-- FOLDER key=value ...]`.

What they write depends on the options alone. `STEP_SECONDS` makes every step take that long.
"""

import json
import os
import sys
import time
from itertools import groupby
from pathlib import Path

import torch
from torch.utils.data import Dataset

from rin_video import RIN, GaussianDiffusion, Trainer
from rin_video.callbacks import Callback
from rin_video.config import Config, train_config
from rin_video.datasets.mixture import Mixture

TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 2, "num_heads": 2, "latent_num_heads": 2,
        "image_size": 8, "patch_size": 4}  # fmt: skip


class Noise(Dataset):
    def __init__(self) -> None:
        self.x = torch.rand(29, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index]}


class Still(Noise):
    """Clips: four times the same frame."""

    def __getitem__(self, index):
        return {"x": self.x[index][:, None].expand(-1, 4, -1, -1)}


class Slow(Callback):
    def on_step(self, trainer, loss):
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))


def make_trainer(
    folder: str | Path, model: dict | None = None, callbacks=(), data=None, num_workers=0, **options
) -> Trainer:
    torch.manual_seed(0)
    if options.pop("mixture", False):
        model = {"tokenizer": "tube+image", "frames": 4, "patch_size": (2, 4, 4)}
        data = Mixture(Still(), Noise(), 0.4)
    if options.pop("convolutions", False):
        model = {"conv_width": 4}
    defaults = {"train_num_steps": 20, "train_batch_size": 8, "train_lr": 1e-3, "log_every": 1,
                "save_and_sample_every": 10, "ema_snapshot_every": 5}  # fmt: skip
    diffusion = GaussianDiffusion(RIN(**TINY | (model or {})), timesteps=3)
    config = Config(diffusion.model.config, diffusion.config, train=train_config(**defaults | options))
    config.data.num_workers = num_workers
    config.sample.num_samples, config.sample.steps = 2, 2
    return Trainer(
        diffusion, data or Noise(), results_folder=folder, config=config, progress=False, callbacks=callbacks
    )


def main(folder: str, *overrides: str) -> None:
    options = {}
    for override in overrides:
        key, value = override.split("=")
        options[key] = json.loads(value) if value[:1] in "0123456789[tf" and value != "fsdp2" else value
    trainer = make_trainer(folder, callbacks=[Slow()], **options)
    trainer.train()
    if trainer.accelerator.is_main_process:
        print("trained to", trainer.step, flush=True)  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _, words in groupby(sys.argv[1:], "--".__eq__):
        if (run := list(words)) != ["--"]:
            main(*run)
