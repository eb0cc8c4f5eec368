"""The training loop: it is given a diffusion and a dataset, and orchestrates."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ema_pytorch import EMA
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from rin_video.checkpoint import load_state, save_model, save_state, saved_states, write_text
from rin_video.config import Config, ModelConfig, SampleConfig, train_config
from rin_video.datasets.draws import unpack
from rin_video.datasets.loading import Batches
from rin_video.datasets.open import INDEX, open_dataset
from rin_video.diffusion import GaussianDiffusion, LossTerms, spread_seed
from rin_video.errors import UsageError
from rin_video.export import contact_sheet, save_samples
from rin_video.plots import plot_metrics

log = logging.getLogger("rin_video")

NOISE_BINS = 10


class Trainer:
    """Trains a `GaussianDiffusion` on a folder or a dataset, and writes everything below `results_folder`.

    `data` is a folder of images or clips (which of the two follows from the model's shape), or any `Dataset` of
    tensors (C, *grid), of (tensor, label) pairs, or of dicts with "x" and "label"; values in [0, 1] or uint8. The
    other options are the fields of `TrainConfig`. `train()` goes on from the last checkpoint in `results_folder`.

    Written there: `metrics.jsonl` and its curves, `metrics.png`; `samples/` (PNG grids, or MP4 and contact sheets);
    `model.safetensors` and `config.yaml` (averaged weights, for use); `checkpoints/` (the state to resume from).
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        data: str | os.PathLike[str] | Dataset[Any],
        *,
        results_folder: str | os.PathLike[str] = "./results",
        num_samples: int = 16,
        config: Config | None = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        if config is None:
            config = Config(
                model=getattr(diffusion.model, "config", ModelConfig()),
                diffusion=diffusion.config,
                train=train_config(**options),
                sample=SampleConfig(num_samples=num_samples, steps=min(SampleConfig.steps, diffusion.config.timesteps)),
            )
        elif options:
            raise UsageError(f"give either config or the options {', '.join(options)}, not both")
        self.config, self.options = config, config.train
        self.folder = Path(results_folder)
        self.progress = progress
        self.accelerator = make_accelerator(self.options.mixed_precision)
        if isinstance(data, str | os.PathLike):
            data = open_dataset(data, diffusion.shape, config.data, seed=self.options.seed, index=self.folder / INDEX)
        self.dataset = data
        check_classes(diffusion, data)
        if getattr(diffusion.model, "num_classes", 0):
            config.data.classes = list(getattr(data, "classes", []))

        self.optimizer = make_optimizer(diffusion, config)
        self.schedule = make_lr_schedule(self.optimizer, config)
        self.ema = EMA(
            diffusion.model,
            beta=self.options.ema_decay,
            update_after_step=0,
            update_every=self.options.ema_update_every,
            include_online_model=False,
            use_foreach=True,
        ).to(self.accelerator.device)
        self.diffusion, self.optimizer = self.accelerator.prepare(diffusion, self.optimizer)
        self.step = 0

    def train(self) -> None:
        """Train up to `train_num_steps`, from the last checkpoint where there is one."""
        self.resume()
        if self.step >= self.options.train_num_steps:
            log.info("%s is trained to step %d already", self.folder, self.step)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics = Metrics(self.folder / "metrics.jsonl", self.step)
        batches = self.batches()
        bar = tqdm(
            total=self.options.train_num_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (self.progress and self.accelerator.is_main_process),
        )
        with bar:
            while self.step < self.options.train_num_steps:
                terms, grad_norm = self.train_step(batches)
                metrics.add(terms, grad_norm)
                bar.update()
                if self.step % self.options.log_every == 0 or self.step == self.options.train_num_steps:
                    line = metrics.write(self.step, lr=self.optimizer.param_groups[0]["lr"])
                    bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['samples_per_second']:.1f} samples/s")
                if self.step % self.options.save_and_sample_every == 0 or self.step == self.options.train_num_steps:
                    self.save()
                    self.sample()
                    metrics.restart_clock()

    def train_step(self, batches: Iterator[Any]) -> tuple[list[LossTerms], Tensor]:
        """One optimizer step over `gradient_accumulate_every` batches."""
        seed_step(self.options.seed, self.step, self.accelerator.process_index)
        self.diffusion.train()
        terms = []
        count = self.options.gradient_accumulate_every
        for micro in range(count):
            x, label = self.unpack(next(batches))
            last = micro == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self.diffusion), self.accelerator.autocast():
                term: LossTerms = self.diffusion(x, label, per_sample=True)
                self.accelerator.backward(term.loss.mean() / count)
            terms.append(LossTerms(term.loss.detach(), term.t))
        limit = self.options.max_grad_norm or float("inf")
        grad_norm = self.accelerator.clip_grad_norm_(self.diffusion.parameters(), limit)
        self.step += 1
        self.schedule.step_update(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return terms, grad_norm

    def batches(self) -> Iterator[Any]:
        """Batches without end, from where the present step stands. What they hold follows from seed and step alone."""
        return Batches(
            self.dataset,
            self.config.data,
            self.options.train_batch_size,
            seed=self.options.seed,
            first_batch=self.step * self.options.gradient_accumulate_every,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """A batch of any accepted form as (x, label) on the device; labels only where the model has classes."""
        x, label = unpack(batch)
        device = self.accelerator.device
        classes = getattr(self.accelerator.unwrap_model(self.diffusion).model, "num_classes", 0)
        if label is not None:
            label = label.to(device, non_blocking=True) if classes else None
        return x.to(device, non_blocking=True), label

    def sample(self) -> None:
        """Write samples of the averaged weights: the same seed and classes every time, so that pictures compare."""
        if not self.accelerator.is_main_process:
            return
        plot_metrics(self.folder / "metrics.jsonl", self.folder / "metrics.png")
        options = self.config.sample
        samples = self.averaged().sample_from_config(
            options, seed=self.options.seed, max_batch=self.options.train_batch_size, progress=self.progress
        )
        name = self.folder / "samples" / f"step-{self.step:08d}"
        name.parent.mkdir(parents=True, exist_ok=True)
        if samples.ndim == 5:
            save_samples(samples, name.with_suffix(".mp4"), fps=options.fps)
            contact_sheet(samples, name.with_suffix(".png"))
        else:
            save_samples(samples, name.with_suffix(".png" if samples.ndim == 4 else ".safetensors"))

    def averaged(self) -> GaussianDiffusion:
        """The diffusion with the averaged weights."""
        return self.accelerator.unwrap_model(self.diffusion).with_model(self.ema.ema_model)

    # ---- stopping and going on

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the states that can be resumed from, oldest first."""
        return saved_states(self.folder)

    def save(self) -> None:
        """Write the state to resume from, then the averaged weights for use; old states are dropped."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "model": self.accelerator.unwrap_model(self.diffusion).model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_state(self.folder / "checkpoints" / f"step-{self.step:08d}", state)
        save_model(self.folder, self.ema.ema_model, self.config)
        for old in self.checkpoints[: -self.options.keep_checkpoints]:
            remove_state(old)

    def resume(self) -> None:
        """Go on from the last checkpoint. Raises `UsageError` where it is of another model."""
        if not self.checkpoints:
            return
        folder = self.checkpoints[-1]
        state = load_state(folder)
        for section in ("model", "diffusion"):
            then, now = state["config"][section], json.loads(json.dumps(dataclasses.asdict(self.config)[section]))
            for key in now:
                if then.get(key) != now[key]:
                    raise UsageError(
                        f"{self.folder} was trained with {section}.{key}={then.get(key)}, now it is {now[key]}: "
                        "use the same, or another folder (--out)"
                    )
        self.accelerator.unwrap_model(self.diffusion).model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        log.info("going on from step %d in %s", self.step, folder)


class Metrics:
    """Gathers loss, loss by noise level, gradient norm and rate between lines of `metrics.jsonl`.

    Nothing is brought from the device before a line is due. Lines of a run that was cut off behind `step` are removed,
    so that a step stands in the file once.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
            write_text(path, "".join(f"{line}\n" for line in lines))
        self.restart()

    def restart(self) -> None:
        self.terms: list[LossTerms] = []
        self.grad_norms: list[Tensor] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what came before (sampling, saving) out of the rate."""
        self.clock, self.counted = time.perf_counter(), sum(len(term.t) for term in self.terms)

    def add(self, terms: list[LossTerms], grad_norm: Tensor) -> None:
        self.terms += terms
        self.grad_norms.append(grad_norm)

    def write(self, step: int, lr: float) -> dict[str, Any]:
        loss, t = (torch.cat(column).float().cpu() for column in zip(*self.terms, strict=True))
        bins = (t * NOISE_BINS).long().clamp(max=NOISE_BINS - 1)
        by_noise = [loss[bins == i].mean().item() if (bins == i).any() else None for i in range(NOISE_BINS)]
        line = {
            "step": step,
            "loss": loss.mean().item(),
            "loss_by_t": by_noise,
            "grad_norm": torch.stack([torch.as_tensor(g) for g in self.grad_norms]).float().mean().item(),
            "lr": lr,
            "samples_per_second": (len(t) - self.counted) / max(time.perf_counter() - self.clock, 1e-9),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.restart()
        return line


def make_accelerator(mixed_precision: str) -> Accelerator:
    """An `Accelerator`; fp16 without a GPU is a `UsageError`."""
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("train.mixed_precision=fp16 needs a CUDA GPU: use bf16, or no")
    AcceleratorState._reset_state()  # accelerate keeps the precision of the first Trainer of a process otherwise
    return Accelerator(mixed_precision=mixed_precision)


def make_optimizer(diffusion: GaussianDiffusion, config: Config) -> torch.optim.Optimizer:
    """AdamW, LAMB or (Nesterov) Muon; weight decay on matrices only, not on biases, norms and embeddings."""
    options = config.train
    extras: dict[str, dict[str, Any]] = {
        "adamw": {},
        "lamb": {"max_grad_norm": None},  # clipping is ours
        "muon": {"momentum": 0.95},
    }
    return create_optimizer_v2(
        diffusion.model,
        opt="nmuon" if options.optimizer == "muon" else options.optimizer,
        lr=options.train_lr,
        weight_decay=options.weight_decay,
        betas=tuple(options.betas),
        **extras[options.optimizer],
    )


def make_lr_schedule(optimizer: torch.optim.Optimizer, config: Config) -> CosineLRScheduler:
    """Linear warm-up, then a cosine (or a constant, which is a cosine that falls nowhere)."""
    options = config.train
    decay_steps = max(options.train_num_steps - options.warmup_steps, 1) / options.lr_cosine_portion
    return CosineLRScheduler(
        optimizer,
        t_initial=max(round(decay_steps), 1),
        lr_min=options.train_lr if options.lr_schedule == "constant" else 0.0,
        warmup_t=options.warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def check_classes(diffusion: GaussianDiffusion, data: Any) -> None:
    """A model with classes needs as many as the data has."""
    expected = getattr(diffusion.model, "num_classes", 0)
    classes = getattr(data, "classes", None)
    if expected and classes is not None and len(classes) != expected:
        raise UsageError(
            f"the model has {expected} classes, the data {len(classes)}: set model.num_classes={len(classes)}"
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Everything random in a training step follows from these three numbers, so nothing random has to be saved."""
    torch.manual_seed(spread_seed(seed, step, rank))


def remove_state(folder: Path) -> None:
    """Delete a state that is no longer kept: only the files that `save_state` wrote."""
    for name in ("state.safetensors", "state.json"):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
