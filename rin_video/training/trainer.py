"""The training loop: `Trainer` takes a diffusion and a dataset and coordinates the other modules."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rin_video.config import Config
from rin_video.config_checks import read_duration
from rin_video.config_files import to_dict
from rin_video.datasets.adapters import BatchCheck
from rin_video.datasets.batch import Batch
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.steady import frame_rate
from rin_video.diffusion.noise import BatchRNG, derive_seed
from rin_video.diffusion.precision import tf32_products
from rin_video.diffusion.process import GaussianDiffusion, LossTerms
from rin_video.errors import Stopped, UsageError
from rin_video.files import disk_full_handler
from rin_video.media import DEFAULT_FPS
from rin_video.model.transfer import transfer_weights
from rin_video.progress import progress_bar
from rin_video.tensor_files import full_tensor
from rin_video.training.budget import Budget, expected_end
from rin_video.training.callbacks import Callback, append_line
from rin_video.training.checkpoints import TrainingState, check_same_options, remove_old_states
from rin_video.training.checks import check_data, not_finite_error
from rin_video.training.compiling import Compiler
from rin_video.training.distributed import (
    any_rank,
    from_main,
    in_all,
    make_accelerator,
    no_sync,
    per_process_batch,
    shard_module_like,
)
from rin_video.training.ema import full_model, make_ema, make_power_emas, save_snapshot
from rin_video.training.identity import check_same_data, identify
from rin_video.training.locking import lock_run
from rin_video.training.memory import checkpoint_blocks, out_of_memory
from rin_video.training.metrics import Metrics, describe_line, read_lines, read_validation, trim_lines
from rin_video.training.optimizers import make_lr_schedule, make_optimizer
from rin_video.training.plots import plot_metrics
from rin_video.training.previews import draw_previews, harmless, is_previewed, write_previews
from rin_video.training.provenance import read_json, write_provenance
from rin_video.training.setup import find_inputs, make_config, open_data
from rin_video.training.signals import StopSignals, ignore_signals
from rin_video.training.state import CHECKPOINTS, load_milestone, newest_state, save_state, saved_states
from rin_video.training.tracking import Tracking, check_trackers
from rin_video.training.validation import BEST, RECORD, Validator, save_best
from rin_video.weights import save_weights

log = logging.getLogger("rin_video")

METRICS = "metrics.jsonl"


class Trainer:
    """Trains a `GaussianDiffusion` on a folder or a dataset, and writes all results to `results_folder`.

    `data` is a folder of images or clips (the model's shape determines which), or a `Dataset` of tensors (C, *grid), of
    (tensor, label) pairs, or of dicts with "x", "label" and "embedding". Values are in [0, 1] or uint8. `validation` is
    the held-out data in the same forms, or the share of `data` to hold out; its loss is measured while training, and
    nothing is trained on it (by default `data.validation`, or the split `val` or `test` of the data). `options` are
    fields of `TrainConfig` and `DataConfig`, or options of the PyTorch port (`rin_video.port`); `config` replaces them.
    `callbacks` observe the run and evaluate its weights. Raises `UsageError` for invalid options, or if the data does
    not fit the model.

    `train()` resumes from the last complete checkpoint in `results_folder`. After a signal, it writes a checkpoint and
    raises `Stopped`. With the option `time` ("30m", "1h30m") it ends after that time instead of `train_num_steps`.

    `results_folder` contains:

    - `model.safetensors` and `config.yaml`: the EMA weights and the configuration, for use
    - `checkpoints/`: the states to resume from
    - `averages/`: snapshots for post-hoc EMAs
    - `best/`: the EMA weights with the lowest validation loss, with `train.keep_best`
    - `metrics.jsonl` and `metrics.png`: metrics and their plots
    - `samples/`: PNG grids, or MP4 clips and contact sheets
    - `run.json`: versions and hardware

    Only the main process writes.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion | None = None,
        data: str | os.PathLike[str] | Dataset[Any] | None = None,
        *,
        validation: float | str | os.PathLike[str] | Dataset[Any] | None = None,
        results_folder: str | os.PathLike[str] = "./results",
        num_samples: int = 16,
        config: Config | None = None,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> None:
        diffusion, data = find_inputs(diffusion, data, options)
        if config is None:
            config = make_config(diffusion, data, num_samples, options)
        elif options:
            raise UsageError(f"pass either config or the options {', '.join(options)}, not both")
        self.config, self.options = config, config.train
        self.folder, self.progress = Path(results_folder), progress

        check_trackers(self.options.trackers)
        several_kinds = len(getattr(diffusion.model, "shapes", ())) > 1
        self.accelerator = make_accelerator(self.options, self.folder, partial=several_kinds)
        self.batch_size = per_process_batch(self.options.train_batch_size, self.accelerator.num_processes)

        self.dataset: Any
        self.dataset, held = open_data(diffusion, data, validation, config, self.folder)
        check_data(diffusion, self.dataset, self.options.train_batch_size)
        self.validator = None if held is None else self.make_validator(held)
        self.num_classes = getattr(diffusion.model, "num_classes", 0)
        if self.num_classes:
            diffusion.classes = config.data.classes = list(getattr(self.dataset, "classes", []))
        self.check_batch = BatchCheck(self.num_classes)
        config.sample.fps = config.sample.fps or frame_rate(self.dataset)
        self.identity = identify(self.dataset, config, held)

        if self.options.init_from is not None:
            self.start_from(self.options.init_from, diffusion)
        diffusion.precision = self.options.mixed_precision
        self.optimizer = make_optimizer(diffusion, config)
        self.budget = self.make_budget(diffusion)
        fraction = None if (budget := self.budget) is None else lambda: budget.pace.fraction
        self.schedule = make_lr_schedule(self.optimizer, config, fraction)
        self.ema = make_ema(diffusion.model, self.options, self.accelerator.device)
        self.power_emas = make_power_emas(diffusion.model, self.options, self.accelerator.device)
        checkpoint_blocks(diffusion.model, self.options.gradient_checkpointing)
        self.diffusion, self.optimizer = self.accelerator.prepare(diffusion, self.optimizer)
        for ema in (self.ema, *self.power_emas):
            shard_module_like(ema.ema_model, self.unwrapped.model)
        self.compiler = Compiler(self.unwrapped.model, self.options.compile)

        self.callbacks = [*([Tracking()] if self.options.trackers else []), *callbacks]
        self.step, self.loaded = 0, False
        self.pending: dict[str, Tensor] | None = None  # accumulated metrics of the next line, from a checkpoint

    @property
    def unwrapped(self) -> GaussianDiffusion:
        """The diffusion without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.diffusion, keep_torch_compile=False)

    @property
    def state(self) -> TrainingState:
        """Everything that training steps change, for saving and loading."""
        scaler, balance = self.accelerator.scaler, self.unwrapped.balance
        return TrainingState(self.unwrapped.model, self.ema, self.power_emas, self.optimizer, scaler, balance)

    def train(self) -> None:
        """Train up to step `train_num_steps` or for `time`, from the last checkpoint if there is one.

        Raises `Stopped` after SIGTERM, SIGINT or SIGUSR1. Raises `UsageError` if a loss is not finite, memory runs out,
        the disk is full, or another process trains in the same folder.
        """
        with ExitStack() as locked:

            def lock() -> None:
                if self.accelerator.is_main_process:
                    locked.enter_context(lock_run(self.folder))

            in_all(lock)
            self._train()

    def _train(self) -> None:
        """Train while the folder is locked."""
        if not self.loaded:
            self.resume()
        if self.budget is not None:
            self.options.train_num_steps = self.step + (not self.budget.is_over)
        main, num_processes = self.accelerator.is_main_process, self.accelerator.num_processes
        sampled = not self.is_due(self.options.save_and_sample_every) or is_previewed(self.folder, self.step)
        if any_rank(main and not sampled, self.accelerator):
            self.sample()  # the run was stopped between the checkpoint and its samples
        if self.step >= self.options.train_num_steps:
            done = f"to step {self.step}: a larger --steps"
            if self.budget is not None:
                done = f"for {self.options.time} (to step {self.step}): a larger --time"
            log.info("%s is already trained %s trains for longer", self.folder, done)
            return
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_provenance(self.folder, self.config, self.accelerator)
        path = self.folder / METRICS if main else None
        metrics = Metrics(path, self.step, state=self.pending, gather=self.accelerator.gather)
        self.resume_validation()
        steps, shown = self.options.train_num_steps, self.progress and main
        if self.budget is not None:
            self.budget.start(self.step)
        self.call("on_start")
        try:
            with (
                StopSignals() as signals,
                progress_bar(steps, "training", "step", initial=self.step, disable=not shown) as bar,
                disk_full_handler(self.folder),
                out_of_memory(self.config, self.accelerator.device, num_processes),
                self.batches() as batches,
            ):
                while self.step < self.options.train_num_steps:
                    with tf32_products(self.options.mixed_precision):
                        metrics.add(*self.train_step(batches))
                    bar.total = self.options.train_num_steps
                    bar.update()
                    self.call("on_step", metrics.terms[-1].loss[-1].mean())
                    self.after_step(metrics, bar, signals)
        finally:
            if self.budget is not None:
                self.budget.stop()
            self.call("on_end")

    def after_step(self, metrics: Metrics, bar: Any, signals: StopSignals) -> None:
        """Log, save and sample if they are due. Raises `Stopped` after a signal."""
        logging_ = self.is_due(self.options.log_every)
        saving = self.is_due(self.options.save_and_sample_every) or (self.budget is not None and self.budget.pace.saves)
        every = self.options.validate_every
        validating = self.validator is not None and (saving if every is None else self.is_due(every))
        stopping = signals.received is not None
        if self.accelerator.num_processes > 1:  # a collective decision, so only when all processes wait anyway
            stopping = (logging_ or saving) and any_rank(stopping, self.accelerator)
        if logging_ or saving or stopping or validating:
            self.check(metrics)
        if logging_:
            line = metrics.write(self.step, lr=self.optimizer.param_groups[0]["lr"])
            bar.set_postfix_str(describe_line(line, self.validator.last if self.validator else None))
            self.call("on_log", line)
        if validating:
            with self.measuring("validation"):
                self.validate()
            if logging_:
                bar.set_postfix_str(describe_line(line, self.validator.last if self.validator else None))
            metrics.restart_clock()
        if self.is_due(self.options.ema_snapshot_every):
            with self.measuring("snapshot"):
                self.snapshot()
        if saving or stopping:
            metrics.sync()
            self.pending = metrics.state()
            with self.measuring("checkpoint"):
                self.save()
        if saving:
            with self.measuring("samples"):
                self.sample()
            metrics.restart_clock()
        if stopping and self.step < self.options.train_num_steps:
            raise Stopped(
                f"stopped by {signals.received or 'a signal to another process'} at step {self.step}, "
                f"checkpoint written: the same command resumes"
            )

    def make_budget(self, diffusion: GaussianDiffusion) -> Budget | None:
        """Create the object that follows the clock if the length of the training is a time."""
        if self.options.time is None:
            return None
        num_params = sum(parameter.numel() for parameter in diffusion.model.parameters())
        several = self.accelerator.num_processes > 1
        return Budget(
            read_duration("train.time", self.options.time),
            expected=partial(expected_end, self.config, num_params, validated=self.validator is not None),
            share=partial(from_main, accelerator=self.accelerator) if several else None,
        )

    def measuring(self, part: str) -> AbstractContextManager[None]:
        """Measure how long a part of the end takes, if the length of the training is a time."""
        return nullcontext() if self.budget is None else self.budget.measuring(part)

    def make_validator(self, held: Any) -> Validator:
        """Create the object that measures the validation loss."""
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        return Validator(self.dataset, held, self.config, batch_size=self.batch_size, rank=rank, num_ranks=num_ranks)

    def resume_validation(self) -> None:
        """Read the validation losses up to the current step, in the main process for all."""
        if self.validator is None:
            return

        def read() -> Any:
            if not self.accelerator.is_main_process:
                return None
            return read_validation(self.folder / METRICS), read_json(self.folder / BEST / RECORD)

        history, record = in_all(read)[0]
        self.validator.resume(history, record, self.step)

    def validate(self) -> None:
        """Measure the validation loss of the EMA weights, and write its line; keep the best weights if that is wanted.

        This precedes the checkpoint of the step, so that a resumed run has the line once.
        """
        assert self.validator is not None
        write = self.accelerator.is_main_process
        line = self.validator.measure(self.averaged(), self.step)
        if write:
            append_line(self.folder / METRICS, line)
        if self.validator.add(line) and self.options.keep_best:
            weights = self.ema.ema_model.state_dict()
            in_all(lambda: save_best(self.folder, weights, self.config, line, write=write))
        self.call("on_validation", line)

    def is_due(self, every: int) -> bool:
        """Return whether the current step is a multiple of `every`, or the last one."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.options.train_num_steps)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a method of all callbacks, in the main process only."""
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                getattr(callback, name)(self, *arguments)

    def train_step(self, batches: TrainLoader) -> tuple[list[LossTerms], Tensor, float, list[list[int]]]:
        """Make an optimizer step over `gradient_accumulate_every` batches.

        Returns the loss terms of each batch, the gradient norm before clipping, the seconds spent waiting for data, and
        the dataset indices of the samples of each batch.
        """
        seed_step(
            self.options.seed, self.step, self.accelerator.process_index
        )  # for dropout, which differs between processes
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
        if self.budget is not None:
            self.options.train_num_steps = self.budget.advance(self.step).num_steps
            if self.accelerator.is_main_process and (warning := self.budget.warning()):
                log.warning("%s", warning)
        self.schedule.step_update(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for ema in (self.ema, *self.power_emas):
            ema.update()
        return terms, grad_norm, waited, indices

    def rng(self, micro: int) -> BatchRNG:
        """Return the RNG of this process's samples for a forward pass of the current step."""
        rank, size = self.accelerator.process_index, self.batch_size
        rows, total = range(rank * size, (rank + 1) * size), self.options.train_batch_size
        return BatchRNG((self.options.seed, self.step, micro), rows, total, self.accelerator.device)

    def accumulate(self, batch: Batch, micro: int) -> LossTerms:
        """Compute the loss of a batch, and add its gradient to the accumulated one; return the loss terms."""
        self.check_batch(batch.x, batch.label)
        x, label, embedding = batch.to(self.accelerator.device)
        label = label if self.num_classes else None
        fresh = not self.compiler.on or all(parameter.grad is None for parameter in self.diffusion.parameters())
        term: LossTerms | None = None
        try:
            with self.accelerator.autocast(), self.compiler.stance():
                term = self.diffusion(x, label, embedding=embedding, rng=self.rng(micro), per_sample=True)
            self.accelerator.backward(term.objective.mean() / self.options.gradient_accumulate_every)
        except Exception as error:
            begun = term is not None and not fresh  # the accumulated gradient may contain a part of this batch's
            if begun or not self.compiler.is_to_blame(error):
                raise
            self.compiler.stop(error)
            if fresh:
                self.optimizer.zero_grad()
                seed_step(self.options.seed, self.step, self.accelerator.process_index)
            return self.accumulate(batch, micro)
        self.compiler.worked = self.compiler.on
        return LossTerms(term.loss.detach(), term.t, term.objective.detach())

    def batches(self) -> TrainLoader:
        """Return endless batches, starting with those of the current step; they depend on seed and step only."""
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

    def check(self, metrics: Metrics) -> None:
        """Raise `UsageError` if a loss is not finite, so that no checkpoint contains such a step."""
        failure = metrics.failure(check_gradient=self.accelerator.scaler is None)
        if failure is not None:
            last = self.checkpoints[-1] if self.checkpoints else None
            raise not_finite_error(failure, self.dataset, last)

    def sample(self) -> None:
        """Write samples of the EMA weights; the seed and the conditions are the same every time, for comparison."""
        averaged, main = self.averaged(), self.accelerator.is_main_process
        samples, images = draw_previews(
            averaged, self.dataset, self.config, max_batch=self.batch_size, progress=self.progress and main
        )
        if not main:
            return
        if (self.folder / METRICS).exists():
            with harmless(self.folder / "metrics.png"):
                lines, validation = (read(self.folder / METRICS) for read in (read_lines, read_validation))
                plot_metrics(lines, self.folder / "metrics.png", validation)
        self.evaluate(averaged)
        paths = write_previews(samples, images, self.folder, self.step, self.config.sample.fps or DEFAULT_FPS)
        self.call("on_sample", samples, paths)

    def evaluate(self, averaged: GaussianDiffusion) -> None:
        """Write the scores of the callbacks to `evaluations.jsonl`."""
        evaluations = self.folder / "evaluations.jsonl"
        trim_lines(evaluations, self.step - 1)
        for callback in self.callbacks:
            scores = callback.evaluate(self, averaged)
            if scores:
                append_line(evaluations, {"step": self.step, **scores})

    def averaged(self) -> GaussianDiffusion:
        """Return the diffusion with the EMA weights. Must be called by all processes."""
        model = full_model(self.ema.ema_model, self.config.model, self.accelerator.device)
        return self.unwrapped.with_model(model)

    # ---- checkpoints

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the states to resume from, oldest first."""
        return saved_states(self.folder)

    def save(self, milestone: int | str | None = None) -> None:
        """Write the EMA weights for use, then the state to resume from; delete old states.

        With a `milestone`, the state is kept under that name until it is saved again; `load(milestone)` reads it. Must
        be called by all processes, which wait until the main process has written. If writing fails, all of them raise.
        """
        in_all(lambda: self._save(milestone))

    def _save(self, milestone: int | str | None) -> None:
        write = self.accelerator.is_main_process
        state = {
            "step": self.step,
            "config": to_dict(self.config),
            **self.state.state_dict(),
            "metrics": self.pending,
            "data": self.identity,
            **({} if self.budget is None else {"time": self.budget.state()}),
        }
        save_weights(self.folder, self.ema.ema_model.state_dict(), self.config, write=write)
        name = f"step-{self.step:08d}" if milestone is None else f"milestone-{milestone}"
        folder = self.folder / CHECKPOINTS / name
        save_state(folder, state, write=write)
        if write:
            keep, keep_every = self.options.keep_checkpoints, self.options.keep_every
            remove_old_states(self.checkpoints, self.step, keep=keep, keep_every=keep_every)
            self.call("on_checkpoint", folder)

    def load(self, milestone: int | str) -> None:
        """Load what `save(milestone)` wrote; `train()` resumes from there. Raises `UsageError` if it does not exist."""
        self.restore(*load_milestone(self.folder, milestone))
        self.loaded = True

    def snapshot(self) -> None:
        """Save a snapshot of the power-function EMAs, for `rin-video ema`."""
        if self.power_emas:
            lengths, write = self.options.ema_sigma_rel, self.accelerator.is_main_process
            in_all(lambda: save_snapshot(self.folder, self.step, lengths, self.power_emas, write=write))

    def start_from(self, source: str, diffusion: GaussianDiffusion) -> None:
        """Load the weights of another model and log which ones were loaded; a resumed run keeps its own weights."""
        if self.checkpoints:
            log.info("%s resumes with its own weights: those of %s are not loaded again", self.folder, source)
            return
        moved = transfer_weights(source, diffusion.model).describe()
        log.info("weights from %s\n  %s", source, moved.replace("\n", "\n  "))

    def resume(self) -> None:
        """Resume from the last complete checkpoint, if there is one. Raises `UsageError` as `restore` does."""
        newest = newest_state(self.folder)
        if newest is not None:
            self.restore(*newest)

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Load a state. Raises `UsageError` if it belongs to another model or other data."""
        check_same_data(self.folder, state.get("data"), self.identity)
        check_same_options(self.folder, state["config"], self.config)
        self.options.init_from = state["config"]["train"].get("init_from")
        self.state.load_state_dict(state)
        self.step, self.pending = state["step"], state["metrics"]
        if self.budget is not None:
            self.budget.load_state(state.get("time"))
        log.info("resuming from step %d in %s", self.step, folder)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all global generators for a step; so a checkpoint needs no state of a generator."""
    number = derive_seed(seed, step, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
