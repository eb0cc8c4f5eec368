"""`rin-video train --time`: which option sets the length of the training, and the choice of a model for a time."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rin_video.cli.options import read_config
from rin_video.config import Config, PrecisionOption
from rin_video.config_checks import read_duration
from rin_video.config_files import load_config, read_overrides
from rin_video.errors import UsageError
from rin_video.files import CONFIG
from rin_video.model.info import model_info
from rin_video.training.budget import expected_end
from rin_video.training.distributed import first_precision, in_all, join_process_group
from rin_video.training.memory import USABLE, free_memory, is_out_of_memory, training_memory
from rin_video.training.provenance import device_name
from rin_video.training.sizes import SIZES, Size, choose_size, overrides_of
from rin_video.training.state import saved_states
from rin_video.training.step_time import measure_step
from rin_video.wording import counted, in_seconds, scaled

log = logging.getLogger("rin_video")

MEASURED, LEAST, MOST = 0.005, 0.3, 2.0  # time to measure a model: this fraction of all time, within limits in seconds

GAIN = 1.1  # bf16 must be faster than float32 by this factor, because a short measurement is not precise


class Plan(NamedTuple):
    """What a model does in the time, as far as it is known before training."""

    params: int
    precision: PrecisionOption
    samples_per_second: float
    steps: int
    samples: int


def check_length(overrides: list[str]) -> bool:
    """Return whether the overrides set a time. Raises `UsageError` if they also set the number of steps."""
    given = read_overrides(overrides).get("train", {})
    timed = given.get("time") is not None
    if timed and "train_num_steps" in given:
        raise UsageError(
            f"--time {given['time']} and --steps {given['train_num_steps']} both set the length of the training: "
            "leave out one of them"
        )
    return timed


def set_length(config: Config, overrides: list[str]) -> None:
    """Drop the time in a file if an override sets the number of steps."""
    if "train_num_steps" in read_overrides(overrides).get("train", {}):
        config.train.time = None


def config_of_run(run: Path, timed: bool) -> str | None:
    """Return the configuration file of a run to resume, if it has the model that was chosen for a time, or else None.

    With `timed`, the run may have been started without a time.
    """
    path = run / CONFIG
    if not saved_states(run) or not path.is_file():
        return None
    return str(path) if timed or load_config(path).train.time is not None else None


def choose_config(options: Namespace, base: Config, complete: Callable[[Config], None], num_samples: int) -> Config:
    """Return the configuration of the size that is best in the time of `base`, for its shape; log the choice.

    `options` are those of the command. `complete` sets what depends on the data, which has `num_samples` samples. Must
    be called by all processes. Raises `UsageError` if not even the smallest size can be trained.
    """
    state, seconds = join_process_group(), read_duration("train.time", base.train.time)
    configs: list[Config] = []
    sizes: list[Size] = []
    for size in SIZES:
        config = read_size(options, base, overrides_of(size, base.model.frames, base.model.height_width))
        complete(config)
        fit_batch(config, options.overrides, state.num_processes, num_samples)
        if all(config.model != other.model for other in configs):  # options of the command may make sizes equal
            configs.append(config)
            sizes.append(size)

    least = [size.least_samples for size in sizes]
    choice = choose_size(least, lambda place: measure_size(configs[place], seconds), lambda plan: plan.samples)
    plan, config = choice.measured[choice.chosen], configs[choice.chosen]
    if plan is None:
        raise UsageError("not even the smallest model fits into memory: set a smaller --batch-size or --size")
    config.train.train_num_steps, config.train.mixed_precision = plan.steps, plan.precision
    lines = [
        f"{sizes[choice.chosen].name}: {plan.params:,} parameters, batches of {config.train.train_batch_size}"
        + ("" if plan.precision == "no" else f", in {plan.precision}"),
        f"measured: {scaled(plan.samples_per_second)} samples/s; expected: about {counted(plan.steps, 'step')}, "
        f"{plan.samples:,} samples" + (f" (best from {least[choice.chosen]:,})" if choice.chosen else ""),
        "the next larger size: none",
    ]
    if choice.larger is not None:
        name, larger = sizes[choice.larger].name, choice.measured[choice.larger]
        lines[-1] = f"the next larger size, {name}: " + (
            "does not fit into memory"
            if larger is None
            else f"{larger.params:,} parameters, {scaled(larger.samples_per_second)} samples/s, "
            f"{larger.samples:,} samples (best from {least[choice.larger]:,})"
        )
    where = device_name(state.device)
    log.info("model for %s on %s\n%s", in_seconds(seconds), where, "\n".join(f"  {line}" for line in lines))
    return config


def read_size(options: Namespace, base: Config, overrides: list[str]) -> Config:
    """Return the configuration of a size with the shape of `base`; options of the command take precedence."""
    height, width = base.model.height_width
    shape = [f"model.frames={base.model.frames or 'null'}", f"model.image_size=[{height},{width}]"]
    overrides = [*shape, *overrides, *options.overrides]
    return read_config(Namespace(**{**vars(options), "overrides": overrides}), None)


def fit_batch(config: Config, overrides: list[str], num_processes: int, num_samples: int) -> None:
    """Reduce the batch size of a size to the number of samples, in equal parts for all processes."""
    if "train_batch_size" not in read_overrides(overrides).get("train", {}):
        each = min(config.train.train_batch_size, num_samples) // num_processes
        config.train.train_batch_size = max(each, 1) * num_processes


def measure_size(config: Config, seconds: float) -> Plan | None:
    """Measure a step of a model in all processes, and return what it does in a time; None if it does not fit.

    The precision "auto" is the faster one for this model: bf16 does not pay for narrow layers on a CPU. Must be called
    by all processes.
    """
    precisions = [config.train.mixed_precision]
    if precisions == ["auto"]:
        precisions = ["no", "bf16"] if first_precision() == "bf16" else ["no"]
    found = []
    for precision in precisions:
        train = replace(config.train, mixed_precision=precision)
        plans = in_all(partial(measure_here, replace(config, train=train), seconds))
        usable = [plan for plan in plans if plan is not None]
        if len(usable) == len(plans):
            found.append(min(usable, key=lambda plan: plan.samples))
    return max(found, key=lambda plan: plan.samples_per_second * (GAIN if plan is found[0] else 1), default=None)


def measure_here(config: Config, seconds: float) -> Plan | None:
    """Measure a step of a model in this process, and return what it does in a time; None if it does not fit."""
    state = join_process_group()
    device, num_processes = state.device, state.num_processes
    kind = "cuda" if device.type == "cuda" else "cpu"
    if training_memory(config, device=kind, num_processes=num_processes) > USABLE * free_memory(device):
        return None
    try:
        enough = min(max(MEASURED * seconds, LEAST), MOST)
        step_seconds = measure_step(config, device, num_processes=num_processes, enough=enough)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    params = model_info(config.model).params
    per_step = config.train.train_batch_size * config.train.gradient_accumulate_every
    validated = config.data.validation is not None
    end = sum(expected_end(config, params, step_seconds, validated=validated).values())
    steps = max(round(max(seconds - end, seconds / 2) / step_seconds), 1)
    return Plan(params, config.train.mixed_precision, per_step / step_seconds, steps, steps * per_step)
