"""Runs tiny trainings in a process of its own: `python tiny_run.py FOLDER key=value ... [-- FOLDER key=value ...]`.

The files they write depend on the options alone. `STEP_SECONDS` sets the duration of a step.
"""

import json
import os
import sys
import time
import weakref
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils.data import Dataset

from rin_video import RIN, GaussianDiffusion, Trainer, tensor_files
from rin_video.config import Config, train_config
from rin_video.datasets.adapters import Adapted
from rin_video.datasets.mixed import MixedDataset
from rin_video.tensor_files import full_tensor
from rin_video.training.callbacks import Callback
from rin_video.training.distributed import is_sharded, leave_process_group

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
    """Static clips of four frames."""

    def __getitem__(self, index):
        return {"x": self.x[index][:, None].expand(-1, 4, -1, -1)}


class TwoShapes(Adapted):
    """Clips of two shapes and two classes in buckets, so that every batch has one shape."""

    buckets = SimpleNamespace(shapes=((4, 8, 8), (4, 8, 16)))

    def __init__(self) -> None:
        self.x = torch.rand(29, 3, 4, 8, 16, generator=torch.Generator().manual_seed(4))
        super().__init__(self.x)
        self.classes, self.bucket_of = ["left", "right"], [index % 2 for index in range(29)]

    def draw(self, index, epoch):
        return {"x": self.x[index][..., : 16 if index % 2 else 8], "label": index // 2 % 2}


class Gathered:
    """Gathers sharded tensors, and counts the bytes of those that are alive at the same time."""

    def __init__(self) -> None:
        self.now = self.peak = self.total = 0

    def __call__(self, tensor):
        full = full_tensor(tensor)
        if full is not tensor:
            self.now, self.total = self.now + full.nbytes, self.total + full.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(full.untyped_storage(), self.free, full.nbytes)
        return full

    def free(self, size: int) -> None:
        self.now -= size


class CountedSaves(Trainer):
    """Writes the bytes that a checkpoint temporarily takes in each process, of its shard and of the largest tensor."""

    def save(self, milestone=None):
        states = [self.unwrapped.model, self.ema, *self.power_emas]
        held = [value for state in states for value in state.state_dict().values()]
        held += [value for values in self.optimizer.state.values() for value in values.values()]
        local = [value.to_local() if hasattr(value, "to_local") else value for value in held]
        gathered = Gathered()
        with mock.patch.object(tensor_files, "full_tensor", gathered):
            super().save(milestone)
        found = {
            "peak": gathered.peak,
            "in_all": gathered.total,
            "is_sharded": is_sharded(self.unwrapped),
            "shard": sum(x.nbytes for x in local),
            "largest": max(x.nbytes for x in held),
        }
        path = self.folder / f"save-{self.accelerator.process_index}.json"
        path.write_text(json.dumps(found))


class Slow(Callback):
    def on_step(self, trainer, loss):
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))


def make_trainer(
    folder: str | Path, model: dict | None = None, callbacks=(), data=None, num_workers=0, **options
) -> Trainer:
    torch.manual_seed(0)
    if options.pop("mixture", False):
        model = {"tokenizer": "tube+image", "frames": 4, "patch_size": (2, 4, 4)}
        data = MixedDataset(Still(), Noise(), 0.4)
    if options.pop("convolutions", False):
        model = {"conv_width": 4}
    diffusing: dict = {}
    if options.pop("conditions", False):  # everything that is drawn per sample
        model = {"frames": 4, "patch_size": (2, 4, 4), "position": "sincos", "known_mask": True, "num_classes": 2}
        diffusing = {"known": {"none": 1, "first": 1, "frames": 1, "boxes": 1}, "label_dropout": 0.5,
                     "time_sampling": "low_discrepancy", "self_cond_gap": 0.1}  # fmt: skip
        data = TwoShapes()
    kind = CountedSaves if options.pop("counted", False) else Trainer
    held = None
    if options.pop("validated", False):  # an odd number of held-out samples, which two processes share
        held = Noise().x[:5].flip(-1)
        options = {"validate_every": 4, "keep_best": True, "validation_samples": 7} | options
    defaults = {"train_num_steps": 20, "train_batch_size": 8, "train_lr": 1e-3, "log_every": 1,
                "save_and_sample_every": 10, "ema_snapshot_every": 5}  # fmt: skip
    diffusion = GaussianDiffusion(RIN(**TINY | (model or {})), timesteps=3, **diffusing)
    config = Config(diffusion.model.config, diffusion.config, train=train_config(**defaults | options))
    config.data.num_workers = num_workers
    config.sample.num_samples, config.sample.steps = 2, 2
    where = {"results_folder": folder, "config": config, "progress": False, "callbacks": callbacks}
    return kind(diffusion, data or Noise(), validation=held, **where)


def main(folder: str, *overrides: str) -> None:
    options = {}
    for override in overrides:
        key, value = override.split("=")
        options[key] = json.loads(value) if value[:1] in "0123456789[tf" and key not in ("sharding", "time") else value
    trainer = make_trainer(folder, callbacks=[Slow()], **options)
    trainer.train()
    if trainer.accelerator.is_main_process:
        print("trained to", trainer.step, flush=True)  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _, words in groupby(sys.argv[1:], "--".__eq__):
        if (run := list(words)) != ["--"]:
            if run[0] == "together":
                import together

                together.main(*run[1:])
            else:
                main(*run)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until no process needs this one any more
        leave_process_group()
