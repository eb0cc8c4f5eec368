"""The loss of the EMA weights on held-out data while training, an alarm when it rises, and the best weights so far."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rin_video.config import Config
from rin_video.datasets.adapters import draw, without_augmentation
from rin_video.datasets.batch import collate
from rin_video.datasets.epochs import name_of
from rin_video.datasets.held_out import spread
from rin_video.diffusion.fixed_levels import FixedBatch, fix_batch, losses_at_levels
from rin_video.diffusion.precision import running_in
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.diffusion.sampling import evaluating, sampling_precision
from rin_video.errors import UsageError, first_line
from rin_video.files import CONFIG, WEIGHTS, atomic_write, remove_file
from rin_video.tensor_files import contributing, write_tensors
from rin_video.training.distributed import in_all, rows_of
from rin_video.training.metrics import VALIDATION_LEVELS
from rin_video.weights import save_weights

log = logging.getLogger("rin_video")

LARGEST_BATCH = 16
ATTEMPTS = 16  # samples that are tried in place of one that cannot be read
RISE = 1.02  # an alarm requires that the loss exceeds the lowest one by this factor,
AGAIN = 3  # in this number of measurements in a row, after which it cannot be a fluctuation
BEST, RECORD = "best", "best.json"


class FixedSamples:
    """The same samples of a dataset at every measurement, without augmentation, spread evenly over its files.

    This process reads the rows of its rank once and keeps them. A sample that cannot be read is replaced by a later one
    of the dataset, with a warning.
    """

    def __init__(self, dataset: Any, num: int, *, rank: int, num_ranks: int) -> None:
        self.dataset = without_augmentation(dataset)
        self.places = spread(self.dataset, num)
        self.rows = rows_of(len(self.places), rank, num_ranks)
        self.items: list[Mapping[str, Any]] | None = None

    def losses(self, diffusion: GaussianDiffusion, max_batch: int) -> Tensor:
        """Return the loss of each sample of this process at each level, (samples, levels) float64 on the CPU."""
        found = torch.zeros(len(self.rows), VALIDATION_LEVELS, dtype=torch.float64)
        for batch in self._batches(diffusion, max_batch):
            losses = losses_at_levels(diffusion, batch, VALIDATION_LEVELS)
            found[[number - self.rows.start for number in batch.numbers]] = losses
        return found

    def _batches(self, diffusion: GaussianDiffusion, max_batch: int) -> Iterator[FixedBatch]:
        """Yield batches of samples of one shape."""
        if self.items is None:
            self.items = [self._read(*self.places[row]) for row in self.rows]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(self.items):
            by_shape.setdefault(tuple(item["x"].shape), []).append(place)
        for places in by_shape.values():
            for start in range(0, len(places), max_batch):
                chosen = places[start : start + max_batch]
                batch = collate([self.items[place] for place in chosen])
                yield fix_batch(batch, [self.rows.start + place for place in chosen], diffusion)

    def _read(self, index: int, epoch: int) -> Mapping[str, Any]:
        length = len(self.dataset)
        for attempt in range(ATTEMPTS):
            try:
                item: Mapping[str, Any] = draw(self.dataset, (index + attempt) % length, epoch)
                if attempt:
                    log.warning("%s is measured instead", name_of(self.dataset, (index + attempt) % length))
                return item
            except Exception as error:  # noqa: PERF203
                log.warning("%s cannot be measured: %s", name_of(self.dataset, (index + attempt) % length),
                            first_line(error))  # fmt: skip
        raise UsageError(f"{ATTEMPTS} samples in a row cannot be read for the validation loss: see the warnings above")


class Validator:
    """Measures held-out samples and as many training samples, and knows the measurements so far.

    All processes must call `measure` with the same weights; each measures its share.
    """

    def __init__(self, train: Any, held: Any, config: Config, *, batch_size: int, rank: int, num_ranks: int) -> None:
        num = config.train.validation_samples
        self.held, self.trained = (FixedSamples(data, num, rank=rank, num_ranks=num_ranks) for data in (held, train))
        self.max_batch, self.keep_best = min(batch_size, LARGEST_BATCH), config.train.keep_best
        self.history: list[dict[str, Any]] = []
        self.best_loss = math.inf

    @property
    def last(self) -> dict[str, Any] | None:
        """The last measurement, or None."""
        return self.history[-1] if self.history else None

    def resume(self, history: Sequence[dict[str, Any]], record: Mapping[str, Any], step: int) -> None:
        """Continue after the measurements in `history`; `record` is that of the best weights, if there are some."""
        self.history = list(history)
        self.best_loss = math.inf
        if record and record.get("step", 0) <= step:
            self.best_loss = record["validation_loss"]
        elif record:  # written after the checkpoint, so that training will write it again
            self.best_loss = min((line["validation_loss"] for line in history), default=math.inf)

    def measure(self, diffusion: GaussianDiffusion, step: int) -> dict[str, Any]:
        """Measure the weights of a diffusion; return the line for `metrics.jsonl`."""
        device = next(diffusion.parameters()).device
        precision = sampling_precision(None, diffusion.precision, device)

        def measure() -> list[Tensor]:
            with evaluating(diffusion), running_in(precision, device):
                return [part.losses(diffusion, self.max_batch) for part in (self.held, self.trained)]

        held, trained = (torch.cat(parts).mean(0) for parts in zip(*in_all(measure), strict=True))
        return {
            "step": step,
            "validation_loss": held.mean().item(),
            "validation_loss_by_t": held.tolist(),
            "train_loss_fixed": trained.mean().item(),
            "train_loss_fixed_by_t": trained.tolist(),
        }

    def add(self, line: dict[str, Any]) -> bool:
        """Add a measurement, log an alarm if it is the first that shows overfitting; return whether it is the best."""
        before = find_overfitting(self.history)
        self.history.append(line)
        now = find_overfitting(self.history)
        if now is not None and before is None:
            log.warning("%s", now.describe(kept=self.keep_best))
        is_best = line["validation_loss"] < self.best_loss
        self.best_loss = min(self.best_loss, line["validation_loss"])
        return is_best


class Overfitting(NamedTuple):
    """The measurement with the lowest validation loss, and the last one."""

    best: dict[str, Any]
    last: dict[str, Any]

    def describe(self, *, kept: bool = False) -> str:
        """Return the finding with its numbers and the remedies; `kept`: the weights with the lowest loss are saved."""
        best, last = self
        rise = last["validation_loss"] / best["validation_loss"] - 1
        wanted = "best/ has" if kept else "train.keep_best=true keeps"
        return (
            f"overfitting: the validation loss was lowest at step {best['step']} ({best['validation_loss']:.4g}). "
            f"At step {last['step']} it is {rise:.0%} higher ({last['validation_loss']:.4g}), while the loss of "
            f"training samples at the same noise levels fell from {best['train_loss_fixed']:.4g} to "
            f"{last['train_loss_fixed']:.4g}. Use more data, augmentation (data.augment_horizontal_flip, crop_scale), "
            f"model.drop_path or model.dropout, a smaller model, or stop here; {wanted} the weights of "
            f"step {best['step']}"
        )


def find_overfitting(history: Sequence[dict[str, Any]]) -> Overfitting | None:
    """Return the overfitting that the last measurements show, or None.

    The last `AGAIN` validation losses must all exceed the lowest one by the factor `RISE`, while the training loss at
    the same levels is lower than at the lowest one. Samples and noise are the same every time, so that a difference
    comes from the weights alone. Three rises in a row exclude a single bad measurement, and the falling training loss
    excludes a training that diverges.
    """
    if not history:
        return None
    number = min(range(len(history)), key=lambda i: history[i]["validation_loss"])
    best, recent = history[number], history[number + 1 :][-AGAIN:]
    if len(recent) < AGAIN:
        return None
    rose = all(line["validation_loss"] > RISE * best["validation_loss"] for line in recent)
    fell = all(line["train_loss_fixed"] < best["train_loss_fixed"] for line in recent)
    return Overfitting(best, recent[-1]) if rose and fell else None


def save_best(
    run: Path, weights: Mapping[str, Tensor], config: Config, line: Mapping[str, Any], *, write: bool
) -> None:
    """Write the weights with the lowest validation loss to `run`/best, from which samples can be drawn.

    `best.json` has the step and the losses. If the weights are sharded, all processes must call this; those without
    `write` only contribute their shards. The folder is replaced atomically.
    """
    if not write:
        write_tensors(None, weights)
        return
    with atomic_write(run / BEST, remove=_remove_best) as temporary:
        with contributing(weights):
            _remove_best(temporary)  # left by a process that was killed
            temporary.mkdir(parents=True)
        save_weights(temporary, weights, config)
        (temporary / RECORD).write_text(json.dumps(line) + "\n", encoding="utf-8")


def _remove_best(folder: Path) -> None:
    if folder.is_dir():
        for name in (RECORD, CONFIG, WEIGHTS):
            remove_file(folder / name)
        for left in folder.glob(".*.tmp*"):
            remove_file(left)
        folder.rmdir()
