"""The training loop: it is given a diffusion and a dataset, and orchestrates."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from rin_video.config import Config, ModelConfig, SampleConfig, trainer_config
from rin_video.config_files import nest_parameters, to_dict
from rin_video.datasets.adapters import ADAPTED, BatchCheck, adapt_for
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.embeddings import embedding_shape
from rin_video.datasets.epochs import EpochDataset, unpack
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.mixed import MixedDataset
from rin_video.datasets.open import INDEX, open_dataset
from rin_video.datasets.steady import frame_rate
from rin_video.diffusion.masks import draw_known
from rin_video.diffusion.noise import BatchRNG, derive_seed, seeded_generators
from rin_video.diffusion.precision import tf32_products
from rin_video.diffusion.process import GaussianDiffusion, LossTerms
from rin_video.errors import Stopped, UsageError
from rin_video.files import disk_full_handler
from rin_video.media import DEFAULT_FPS
from rin_video.model.transfer import transfer_weights
from rin_video.port import trainer_options
from rin_video.tensor_files import full_tensor
from rin_video.training.callbacks import Callback, append_line
from rin_video.training.distributed import (
    any_rank,
    first_then_others,
    in_all,
    is_sharded,
    load_full_state_dict,
    load_optimizer_state,
    make_accelerator,
    no_sync,
    optimizer_state,
    per_process_batch,
    shard_module_like,
)
from rin_video.training.ema import make_ema, make_power_emas, save_snapshot
from rin_video.training.identity import check_same_data, identify
from rin_video.training.locking import lock_run
from rin_video.training.memory import checkpoint_blocks, out_of_memory
from rin_video.training.metrics import Metrics, trim_lines
from rin_video.training.optimizers import make_lr_schedule, make_optimizer
from rin_video.training.parallel_sampling import sample_distributed
from rin_video.training.plots import plot_metrics
from rin_video.training.previews import harmless, write_previews
from rin_video.training.provenance import write_provenance
from rin_video.training.signals import StopSignals, ignore_signals
from rin_video.training.state import load_state, newest_state, remove_state, save_state, saved_states
from rin_video.training.tracking import Tracking, check_trackers
from rin_video.weights import save_weights

log = logging.getLogger("rin_video")

# What must not change when a run is resumed (empty: the whole section). All other options take effect as given.
KEPT: dict[str, tuple[str, ...]] = {"model": (), "diffusion": (), "train": ("optimizer", "ema_sigma_rel", "seed")}


class Trainer:
    """Trains a `GaussianDiffusion` on a folder or a dataset, and writes everything below `results_folder`.

    `data` is a folder of images or clips (which of the two follows from the model's shape), or any `Dataset` of
    tensors (C, *grid), of (tensor, label) pairs, or of dicts with "x", "label" and "embedding"; values in [0, 1] or
    uint8. The other options are the fields of `TrainConfig` and `DataConfig`, and those of the PyTorch port
    (`rin_video.port`). `callbacks` observe and measure. `train()` resumes from the last complete checkpoint in
    `results_folder`; a signal ends it with `Stopped`, after a checkpoint.

    Written there: `metrics.jsonl` and its curves, `metrics.png`; `samples/` (PNG grids, or MP4 and contact sheets);
    `model.safetensors` and `config.yaml` (averaged weights, for use); `averages/` (snapshots for other averages);
    `checkpoints/` (the state to resume from); `run.json` (versions, hardware). The first of several processes writes.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion | None = None,
        data: str | os.PathLike[str] | Dataset[Any] | None = None,
        *,
        results_folder: str | os.PathLike[str] = "./results",
        num_samples: int = 16,
        config: Config | None = None,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> None:
        diffusion = options.pop("diffusion_model", None) if diffusion is None else diffusion
        given = [data, *(options.pop(name, None) for name in ("dataset", "folder"))]  # the port takes these two
        if sum(one is not None for one in given) > 1:
            raise UsageError("the data is given twice: give one of data, dataset and folder")
        data = next((one for one in given if one is not None), None)
        if diffusion is None or data is None:
            missing = "a GaussianDiffusion" if diffusion is None else "data: a folder, or a Dataset"
            raise UsageError(f"Trainer(diffusion, data) was given no {missing}")
        is_folder = isinstance(data, str | os.PathLike)
        if config is None:
            channels = (diffusion.shape or (3,))[0]
            train, reading = trainer_config(**trainer_options(options, channels=channels, is_folder=is_folder))
            steps = diffusion.config.timesteps or SampleConfig.steps
            sampler = diffusion.sampler or SampleConfig.sampler
            config = Config(
                model=getattr(diffusion.model, "config", ModelConfig()),
                diffusion=diffusion.config,
                data=reading,
                train=train,
                sample=SampleConfig(num_samples=num_samples, steps=steps, sampler=sampler),
            )
        elif options:
            raise UsageError(f"give either config or the options {', '.join(options)}, not both")
        self.config, self.options = config, config.train
        self.folder = Path(results_folder)
        self.progress = progress
        several_kinds = len(getattr(diffusion.model, "shapes", ())) > 1
        check_trackers(self.options.trackers)
        self.accelerator = make_accelerator(self.options, self.folder, partial=several_kinds)
        self.batch_size = per_process_batch(self.options.train_batch_size, self.accelerator.num_processes)
        if isinstance(data, str | os.PathLike):
            config.data.path = config.data.path or os.fspath(data)
            root, shape, index = data, diffusion.shape, self.folder / INDEX
            data = first_then_others(
                lambda: open_dataset(root, shape, config.data, seed=self.options.seed, index=index)
            )
        else:
            data = adapt_for(diffusion, data)
        self.dataset: Any = data
        check_kinds(diffusion, data)
        check_classes(diffusion, data)
        check_embeddings(diffusion, data)
        num_classes = getattr(diffusion.model, "num_classes", 0)
        if num_classes:
            diffusion.classes = config.data.classes = list(getattr(data, "classes", []))
        self.check_batch = BatchCheck(num_classes)

        config.sample.fps = config.sample.fps or frame_rate(data)
        if len(data) < self.options.train_batch_size:  # type: ignore[arg-type]
            log.warning(
                "the data are %d samples, a batch is %d: every step sees some of them more than once",
                len(data),  # type: ignore[arg-type]
                self.options.train_batch_size,
            )
        if self.options.init_from is not None:
            self.start_from(self.options.init_from, diffusion)
        diffusion.precision = self.options.mixed_precision
        device = self.accelerator.device
        self.optimizer = make_optimizer(diffusion, config)
        self.schedule = make_lr_schedule(self.optimizer, config)
        self.ema = make_ema(diffusion.model, self.options, device)
        self.power_emas = make_power_emas(diffusion.model, self.options, device)
        checkpoint_blocks(diffusion.model, self.options.gradient_checkpointing)
        self.diffusion, self.optimizer = self.accelerator.prepare(diffusion, self.optimizer)
        for average in (self.ema, *self.power_emas):
            shard_module_like(average.ema_model, self.unwrapped.model)
        self.compiling, self.compiled = self.options.compile, False
        if self.compiling:
            self.unwrapped.model.compile()
        self.callbacks = [*([Tracking()] if self.options.trackers else []), *callbacks]
        self.identity = identify(data, config)
        self.step, self.loaded = 0, False
        self.pending: dict[str, Tensor] | None = None

    @property
    def unwrapped(self) -> GaussianDiffusion:
        """The diffusion without what accelerate put around it."""
        return self.accelerator.unwrap_model(self.diffusion, keep_torch_compile=False)

    def train(self) -> None:
        """Train up to `train_num_steps`, from the last checkpoint where there is one.

        Raises `Stopped` after SIGTERM, SIGINT or SIGUSR1, and `UsageError` where a loss is not a number, memory runs
        out, the disk is full, or another process trains in the same folder.
        """
        with ExitStack() as locked:

            def lock() -> None:
                if self.accelerator.is_main_process:
                    locked.enter_context(lock_run(self.folder))

            in_all(lock)
            self._train()

    def _train(self) -> None:
        """`train`, for a process that has the folder to itself."""
        if not self.loaded:
            self.resume()
        main = self.accelerator.is_main_process
        sampled = not self.is_due(self.options.save_and_sample_every) or self.is_sampled()
        if any_rank(main and not sampled, self.accelerator):
            self.sample()  # it was stopped between the checkpoint and its pictures
        if self.step >= self.options.train_num_steps:
            log.info("%s is trained to step %d already", self.folder, self.step)
            return
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_provenance(self.folder, self.config, self.accelerator)
        metrics = Metrics(
            self.folder / "metrics.jsonl" if main else None,
            self.step,
            state=self.pending,
            gather=self.accelerator.gather,
        )
        bar = tqdm(
            total=self.options.train_num_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (self.progress and main),
        )
        self.call("on_start")
        try:
            with (
                StopSignals() as signals,
                bar,
                disk_full_handler(self.folder),
                out_of_memory(self.config, self.accelerator.device, self.accelerator.num_processes),
                self.batches() as batches,
            ):
                while self.step < self.options.train_num_steps:
                    with tf32_products(self.options.mixed_precision):
                        metrics.add(*self.train_step(batches))
                    loss = metrics.terms[-1].loss[-1]
                    bar.update()
                    self.call("on_step", loss.mean())
                    saving = self.is_due(self.options.save_and_sample_every)
                    logging_ = self.is_due(self.options.log_every)
                    stopping = signals.received is not None
                    if self.accelerator.num_processes > 1:  # which have to wait for each other to decide it
                        stopping = (logging_ or saving) and any_rank(stopping, self.accelerator)
                    if logging_ or saving or stopping:
                        self.check(metrics)
                    if logging_:
                        line = metrics.write(self.step, lr=self.optimizer.param_groups[0]["lr"])
                        bar.set_postfix_str(describe_line(line))
                        self.call("on_log", line)
                    if self.is_due(self.options.ema_snapshot_every):
                        self.snapshot()
                    if saving or stopping:
                        metrics.sync()
                        self.pending = metrics.state()
                        self.save()
                    if saving:
                        self.sample()
                        metrics.restart_clock()
                    if stopping and self.step < self.options.train_num_steps:
                        raise Stopped(
                            f"stopped by {signals.received or 'a signal to another process'} at step {self.step}, "
                            f"checkpoint written: the same command goes on"
                        )
        finally:
            self.call("on_end")

    def is_due(self, every: int) -> bool:
        """Whether the present step is a multiple of `every`, or the last one."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.options.train_num_steps)

    def call(self, name: str, *arguments: Any) -> None:
        """Call all callbacks, in the first process."""
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                getattr(callback, name)(self, *arguments)

    def train_step(self, batches: TrainLoader) -> tuple[list[LossTerms], Tensor, float, list[list[int]]]:
        """One optimizer step over `gradient_accumulate_every` batches.

        Returns the loss of each, the norm of the gradient, the seconds without data, and the indices of the samples.
        """
        seed_step(self.options.seed, self.step, self.accelerator.process_index)  # of dropout: each process has its own
        self.diffusion.train()
        terms, indices, waited = [], [], 0.0
        count = self.options.gradient_accumulate_every
        for micro in range(count):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            indices.append(batches.indices)
            last = micro == count - 1
            with nullcontext() if last else no_sync(self.diffusion, self.accelerator):
                terms.append(self.accumulate(batch, micro))
        limit = self.options.max_grad_norm or float("inf")
        grad_norm = full_tensor(self.accelerator.clip_grad_norm_(self.diffusion.parameters(), limit))
        self.step += 1
        self.schedule.step_update(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in (self.ema, *self.power_emas):
            average.update()
        return terms, grad_norm, waited, indices

    def rng(self, micro: int) -> BatchRNG:
        """The random numbers of this process's samples in a forward pass of the present step."""
        rank, size = self.accelerator.process_index, self.batch_size
        rows, total = range(rank * size, (rank + 1) * size), self.options.train_batch_size
        return BatchRNG((self.options.seed, self.step, micro), rows, total, self.accelerator.device)

    def accumulate(self, batch: Any, micro: int) -> LossTerms:
        """The loss of one batch, and its gradient, which is added to what is there."""
        x, label = self.unpack(batch)
        embedding = batch.get("embedding") if isinstance(batch, dict) else None
        embedding = None if embedding is None else embedding.to(x.device, non_blocking=True)
        fresh = not self.compiling or all(parameter.grad is None for parameter in self.diffusion.parameters())
        term: LossTerms | None = None
        try:
            with self.accelerator.autocast():
                term = self.diffusion(x, label, embedding=embedding, rng=self.rng(micro), per_sample=True)
            self.accelerator.backward(term.loss.mean() / self.options.gradient_accumulate_every)
        except Exception as error:
            known = self.compiled and not is_compiler_error(error)  # it has worked: this may fail for another reason
            begun = term is not None and not fresh  # gradients of earlier batches may hold a part of this one's
            if not self.compiling or isinstance(error, torch.OutOfMemoryError) or known or begun:
                raise
            log.warning("torch.compile failed, training goes on without it: %s", str(error).strip().splitlines()[0])
            self.compiling = False
            self.unwrapped.model._compiled_call_impl = None
            if fresh:
                self.optimizer.zero_grad()
                seed_step(self.options.seed, self.step, self.accelerator.process_index)
            return self.accumulate(batch, micro)
        self.compiled = self.compiling
        return LossTerms(term.loss.detach(), term.t)

    def batches(self) -> TrainLoader:
        """Batches without end, from where the present step stands. What they hold follows from seed and step alone."""
        return TrainLoader(
            self.dataset,
            self.config.data,
            self.batch_size,
            seed=self.options.seed,
            first_batch=self.step * self.options.gradient_accumulate_every,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            group=self.options.gradient_accumulate_every,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """A batch of any accepted form as (x, label) on the device; labels only where the model has classes."""
        x, label = unpack(batch)
        self.check_batch(x, label)
        device = self.accelerator.device
        classes = getattr(self.unwrapped.model, "num_classes", 0)
        if label is not None:
            label = label.to(device, non_blocking=True) if classes else None
        return x.to(device, non_blocking=True), label

    def check(self, metrics: Metrics) -> None:
        """Raises `UsageError` where a loss is not a number, before it can spoil a checkpoint."""
        failure = metrics.failure(check_gradient=self.accelerator.scaler is None)
        if failure is None:
            return
        files = getattr(self.dataset, "files", None)
        name_of = getattr(self.dataset, "name_of", files.__getitem__ if files else "sample {}".format)
        names = [str(name_of(index)) for index in failure.samples]
        last = self.checkpoints[-1] if self.checkpoints else "none"
        named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UsageError(
            f"the {'loss' if failure.of_loss else 'gradient'} of step {failure.step} is not a number. It came with "
            f"{named}. The last good checkpoint is {last}: look at these files; if they are sound, "
            "lower train.train_lr, raise train.warmup_steps, or use train.mixed_precision=bf16 instead of fp16"
        )

    def sample(self) -> None:
        """Write samples of the averaged weights: the same seed and classes every time, so that pictures compare."""
        averaged, images = self.averaged(), None
        mixed = isinstance(self.dataset, MixedDataset)
        samples = self.preview(averaged, self.dataset.clips if mixed else self.dataset)
        if mixed:
            channels, _, *size = averaged.shape or ()
            images = self.preview(averaged, self.dataset.images, shape=(channels, *size))
        if not self.accelerator.is_main_process:
            return
        if (self.folder / "metrics.jsonl").exists():
            with harmless(self.folder / "metrics.png"):
                plot_metrics(self.folder / "metrics.jsonl", self.folder / "metrics.png")
        evaluations = self.folder / "evaluations.jsonl"
        trim_lines(evaluations, self.step - 1)
        for callback in self.callbacks:
            scores = callback.evaluate(self, averaged)
            if scores:
                append_line(evaluations, {"step": self.step, **scores})
        name = self.folder / "samples" / f"step-{self.step:08d}"
        fps = self.config.sample.fps or DEFAULT_FPS
        if images is not None:
            write_previews(images, name.with_name(f"{name.name}-images"), fps)
        write_previews(samples, name, fps)
        self.call("on_sample", samples, self.pictures())

    def preview(self, averaged: GaussianDiffusion, data: Any, **options: Any) -> Tensor:
        """Samples as the configuration says, of the kind of `data`: each process draws a part of them."""
        return sample_distributed(
            averaged,
            self.config.sample,
            seed=self.options.seed,
            max_batch=self.batch_size,
            progress=self.progress and self.accelerator.is_main_process,
            **self.given(data),
            **options,
        )

    def given(self, data: Any) -> dict[str, Tensor]:
        """What samples are given: embeddings where there are some, cells where training always gives some.

        They are those of the data's first samples, the same every time.
        """
        kinds, count = self.config.diffusion.known, self.config.sample.num_samples
        always = bool(kinds) and not kinds.get("none")
        if not always and not self.config.model.embedding_dim:
            return {}
        batch = default_collate([EpochDataset(data)[0, i % len(data)] for i in range(count)])
        given = {}
        if isinstance(batch, dict) and "embedding" in batch:
            given["embedding"] = batch["embedding"]
        if always:
            context, _ = unpack(batch)
            generators = seeded_generators(self.options.seed, range(count))
            frames = self.config.diffusion.known_frames
            known = draw_known(kinds, frames, count, context.shape[2:], generators)
            if known.any():  # images take fewer kinds than clips
                given |= {"context": context, "known": known}
        return given

    def pictures(self) -> list[Path]:
        """What `sample` wrote at the present step."""
        return sorted((self.folder / "samples").glob(f"step-{self.step:08d}[.-]*"))

    def is_sampled(self) -> bool:
        """Whether `sample` came to its end at the present step: the clip is not the last file that it writes."""
        return any(path.stem == f"step-{self.step:08d}" and path.suffix != ".mp4" for path in self.pictures())

    def averaged(self) -> GaussianDiffusion:
        """The diffusion with the averaged weights. To be called by all processes."""
        if not is_sharded(self.unwrapped):
            return self.unwrapped.with_model(self.ema.ema_model)
        model = type(self.unwrapped.model)(self.config.model).to(self.accelerator.device)
        own = model.state_dict()
        for name, value in self.ema.ema_model.state_dict().items():  # one at a time: all of them are a second model
            own[name].copy_(full_tensor(value))
        return self.unwrapped.with_model(model)

    # ---- stopping and going on

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the states that can be resumed from, oldest first."""
        return saved_states(self.folder)

    def save(self, milestone: int | str | None = None) -> None:
        """Write the averaged weights for use, then the state to resume from; old states are dropped.

        A `milestone` is a state of its own, which stays until it is saved again, and which `load(milestone)` reads.
        No process leaves before the first one has finished writing; if that fails, all of them end.
        """
        in_all(lambda: self._save(milestone))

    def _save(self, milestone: int | str | None) -> None:
        scaler, write = self.accelerator.scaler, self.accelerator.is_main_process
        state = {
            "step": self.step,
            "config": to_dict(self.config),
            "model": self.unwrapped.model.state_dict(),
            "ema": self.ema.state_dict(),
            "tracks": [track.state_dict() for track in self.power_emas],
            "optimizer": optimizer_state(self.optimizer, self.unwrapped.model),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "metrics": self.pending,
            "data": self.identity,
        }
        save_weights(self.folder, self.ema.ema_model.state_dict(), self.config, write=write)
        folder = self.milestone(f"step-{self.step:08d}" if milestone is None else f"milestone-{milestone}")
        save_state(folder, state, write=write)
        if not write:
            return
        every, steps = self.options.keep_every, {old: int(old.name.removeprefix("step-")) for old in self.checkpoints}
        ahead = [old for old, step in steps.items() if step > self.step]  # of what `load` went back from
        behind = [old for old in steps if old not in ahead][: -self.options.keep_checkpoints]
        for old in ahead + [old for old in behind if not every or steps[old] % every]:
            remove_state(old)
        self.call("on_checkpoint", folder)

    def load(self, milestone: int | str) -> None:
        """Go back to what `save(milestone)` wrote: `train()` goes on from there. `UsageError` where there is none."""
        folder = self.milestone(f"milestone-{milestone}")
        if not folder.is_dir():
            there = sorted(p.name.removeprefix("milestone-") for p in folder.parent.glob("milestone-*"))
            raise UsageError(
                f"{self.folder} has no milestone {milestone}: {', '.join(there) or 'none was saved'} (checkpoints of "
                "other packages, model-N.pt, do not fit this network)"
            )
        self.restore(folder, load_state(folder))
        self.loaded = True

    def milestone(self, name: str) -> Path:
        """The folder of a state."""
        return self.folder / "checkpoints" / name

    def snapshot(self) -> None:
        """Write down the averages of all lengths, for `rin-video ema`."""
        if self.power_emas:
            lengths, write = self.options.ema_sigma_rel, self.accelerator.is_main_process
            in_all(lambda: save_snapshot(self.folder, self.step, lengths, self.power_emas, write=write))

    def start_from(self, source: str, diffusion: GaussianDiffusion) -> None:
        """Bring the weights of another model, and say which; a run that goes on has its own."""
        if self.checkpoints:
            log.info("%s goes on with its own weights: those of %s are not read again", self.folder, source)
            return
        moved = transfer_weights(source, diffusion.model).describe()
        log.info("weights from %s\n  %s", source, moved.replace("\n", "\n  "))

    def resume(self) -> None:
        """Go on from the last whole checkpoint. Raises `UsageError` where it is of another model."""
        newest = newest_state(self.folder)
        if newest is not None:
            self.restore(*newest)

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take up a state. Raises `UsageError` where it is of another model, or of other data."""
        check_same_data(self.folder, state.get("data"), self.identity)
        for section, keys in KEPT.items():
            then, now = nest_parameters(section, state["config"][section]), to_dict(getattr(self.config, section))
            for key in keys or now:
                if key in then and then[key] != now[key]:
                    raise UsageError(
                        f"{self.folder} was trained with {section}.{key}={then[key]}, now it is {now[key]}: "
                        "use the same, or another folder (--out)"
                    )
        begun_with = state["config"]["train"].get("init_from")
        if self.options.init_from not in (None, begun_with):
            raise UsageError(
                f"{self.folder} began with train.init_from={begun_with}, now it is {self.options.init_from}: leave it "
                "out, or use another folder (--out)"
            )
        self.options.init_from = begun_with
        load_full_state_dict(self.unwrapped.model, state["model"])
        load_full_state_dict(self.ema, state["ema"])
        for track, values in zip(self.power_emas, state["tracks"], strict=True):
            load_full_state_dict(track, values)
        load_optimizer_state(self.optimizer, self.unwrapped.model, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.pending = state["step"], state["metrics"]
        log.info("going on from step %d in %s", self.step, folder)


def describe_line(line: dict[str, Any]) -> str:
    """A line of the metrics for the progress bar; waiting for data is said where it costs something."""
    text = f"loss {line['loss']:.4f}, {line['samples_per_second']:.1f} samples/s"
    return text + (f", {line['data_wait']:.0%} waiting for data" if line["data_wait"] >= 0.05 else "")


def check_kinds(diffusion: GaussianDiffusion, data: Any) -> None:
    """Clips and images together need a model with a tokenizer for each."""
    if isinstance(data, MixedDataset) and {3, 4} - {len(shape) for shape in getattr(diffusion.model, "shapes", ())}:
        raise UsageError("clips are mixed with images, and the model takes one kind: set model.tokenizer=tube+image")


def check_classes(diffusion: GaussianDiffusion, data: Any) -> None:
    """A model with classes needs as many as the data has."""
    expected = getattr(diffusion.model, "num_classes", 0)
    classes = getattr(data, "classes", None)
    unnamed = not classes and isinstance(data, ADAPTED)  # labels are looked at batch by batch
    if expected and classes is not None and len(classes) != expected and not unnamed:
        raise UsageError(
            f"the model has {expected} classes, the data {len(classes)}: set model.num_classes={len(classes)}"
        )


def check_embeddings(diffusion: GaussianDiffusion, data: Any) -> None:
    """What comes with the samples must fit the model, and come where the model waits for it."""
    config = getattr(diffusion.model, "config", None)
    shape, wanted = embedding_shape(data), getattr(config, "embedding_dim", 0)
    if shape is None and wanted and isinstance(data, ImageFolder | ClipFolder | MixedDataset):
        raise UsageError(
            f"model.embedding_dim is {wanted}, and nothing comes with the samples: use data.embeddings=true (files) or "
            "data.text_encoder=NAME (captions)"
        )
    if shape is not None and (wanted != shape[1] or getattr(config, "embedding_tokens", 0) < shape[0]):
        raise UsageError(
            f"the samples come with {shape[0]} vectors of {shape[1]}, the model takes "
            f"{getattr(config, 'embedding_tokens', 0) if wanted else 0} of {wanted}: set "
            f"model.embedding_tokens={shape[0]} model.embedding_dim={shape[1]}"
        )


def is_compiler_error(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is of torch.compile and what it calls."""
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "triton")):
            return True
        error = error.__cause__ or error.__context__
    return False


def seed_step(seed: int, step: int, rank: int) -> None:
    """Everything random in a training step follows from these three numbers, so nothing random has to be saved."""
    number = derive_seed(seed, step, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
