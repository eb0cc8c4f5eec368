"""`rin-video train`: trains a model on a folder, or resumes a run."""

from __future__ import annotations

import logging
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from rin_video.cli.options import DATA_HELP, add_data_options, choose_preset, read_config
from rin_video.config import Config
from rin_video.config_files import is_set
from rin_video.errors import UsageError
from rin_video.wording import counted, in_bytes

log = logging.getLogger("rin_video")


def add_parsers(commands: Any) -> None:
    """Add the parser of `train`."""
    command = commands.add_parser(
        "train",
        help="train on a folder of clips or images; the same command resumes",
        description="Train on a folder of clips or images. The same command resumes an interrupted run.",
        epilog="Any option of the configuration can be set as section.key=value: train.train_lr=3e-4 model.depth=4",
    )
    add = command.add_argument
    add("--data", required=True, metavar="DATA", help=DATA_HELP)
    add_data_options(command)
    add(
        "--validation",
        dest="data.validation",
        metavar="SHARE|DATA",
        help="held-out data, never trained on: a share of the files such as 0.05, or data of its own (default: the "
        "split val or test of DATA)",
    )
    add(
        "--embeddings",
        dest="data.embeddings",
        action="store_true",
        default=None,
        help="condition on embeddings in files beside the data (x.npy)",
    )
    add(
        "--text-encoder",
        dest="data.text_encoder",
        metavar="NAME|DIR",
        help="condition on captions in files beside the data (x.txt), encoded with this model",
    )
    add(
        "--init-from",
        dest="train.init_from",
        metavar="DIR",
        help="initialise the weights that fit from another model",
    )
    add(
        "--out",
        metavar="DIR",
        help="output folder (default: runs/NAME-OF-FOLDER, or runs/PARENT-NAME if that is a run on other data)",
    )
    add("--steps", dest="train.train_num_steps", type=int, metavar="N", help="number of training steps")
    add(
        "--time",
        dest="train.time",
        metavar="T",
        help="train for a time, such as 90s, 30m, 2h or 1d; without --config, with the model that is best in this time "
        "on this machine",
    )
    add(
        "--batch-size",
        type=batch_size,
        metavar="N|auto",
        help="samples per batch; auto: the largest batch that fits in memory",
    )
    command.set_defaults(run=train, overrides=[])


def batch_size(text: str) -> int | str:
    """Parse a batch size: an integer, or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text} is neither an integer nor auto") from None


def train(options: Namespace) -> None:
    """Train on a folder, or resume a run."""
    import torch

    from rin_video.cli.slow_run import SlowRunHint
    from rin_video.cli.time_budget import check_length, choose_config, config_of_run, set_length
    from rin_video.cli.trained import check_sampling
    from rin_video.datasets.open import INDEX, open_sides
    from rin_video.diffusion.process import GaussianDiffusion
    from rin_video.model.info import describe, model_info
    from rin_video.model.rin import RIN
    from rin_video.training.distributed import first_then_others, use_launcher_precision
    from rin_video.training.identity import run_folder
    from rin_video.training.memory import training_memory
    from rin_video.training.provenance import device_name
    from rin_video.training.trainer import Trainer

    if isinstance(options.batch_size, int):
        options.overrides.append(f"train.train_batch_size={options.batch_size}")
    timed = check_length(options.overrides)
    folder = Path(options.out or run_folder(options.data))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: use a folder")
    preset = first_then_others(lambda: choose_preset(options))
    resumed = config_of_run(folder, timed) if options.config is None else None
    preset = resumed or preset
    config = read_config(options, preset)
    set_length(config, options.overrides)
    if config.train.time is None and not is_set("train.warmup_steps", None, options.overrides):
        shorten_warmup(config)
    shape, seed, index = model_info(config.model).shape, config.train.seed, folder / INDEX
    sides = first_then_others(lambda: open_sides(options.data, shape, config.data, seed=seed, index=index))
    dataset = sides.train
    suit_conditions(config, dataset, preset, options.overrides)
    always_known = bool(config.diffusion.known) and not config.diffusion.known.get("none")
    check_sampling(config, always_known=always_known)

    about = dataset.describe().splitlines() + ([f"validation: {sides.note}"] if sides.note else [])
    log.info("data\n%s", "\n".join(f"  {line}" for line in about))
    if timed and options.config is None and resumed is None:

        def complete(size: Config) -> None:
            suit_conditions(size, dataset, None, options.overrides)
            use_launcher_precision(size.train)

        config = choose_config(options, config, complete, len(dataset))
        check_sampling(config, always_known=always_known)
    log.info("model\n%s", describe(config.model))
    use_launcher_precision(config.train)
    if options.batch_size == "auto":
        config.train.train_batch_size = choose_batch(config, folder, len(dataset))
    torch.manual_seed(config.train.seed)
    diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
    hint = SlowRunHint(steps_given=is_set("train.train_num_steps", None, options.overrides))
    trainer = Trainer(
        diffusion, dataset, validation=sides.validation, results_folder=folder, config=config, callbacks=[hint]
    )
    steps = counted(config.train.train_num_steps, "step")
    log.info(
        "training\n  on %s, about %s, %s of %s, into %s",
        device_name(trainer.accelerator.device),
        in_bytes(training_memory(config, num_processes=trainer.accelerator.num_processes)),
        steps if config.train.time is None else f"steps for {config.train.time}",
        counted(config.train.train_batch_size * config.train.gradient_accumulate_every, "sample"),
        folder,
    )
    trainer.train()
    log.info("done: rin-video sample %s", folder)


def shorten_warmup(config: Config) -> None:
    """Limit the warm-up of a preset to half of the steps, and log it."""
    wanted, most = config.train.warmup_steps, config.train.train_num_steps // 2
    if wanted > most:
        log.info(
            "warm-up: %s, half of the training, instead of %d (train.warmup_steps=%d keeps it)",
            counted(most, "step"),
            wanted,
            wanted,
        )
        config.train.warmup_steps = most


def suit_conditions(config: Config, dataset: Any, preset: str | None, overrides: list[str]) -> None:
    """Set the number of classes and the shape of embeddings to those of the data, unless an option sets them."""
    from rin_video.datasets.embeddings import embedding_shape

    config.data.classes = list(dataset.classes)  # labels may be class names
    if not is_set("model.num_classes", preset, overrides):
        config.model.num_classes = len(dataset.classes)
    shape = embedding_shape(dataset)
    if shape is not None and not is_set("model.embedding_dim", preset, overrides):
        config.model.embedding_tokens, config.model.embedding_dim = shape


def choose_batch(config: Config, folder: Path, num_samples: int) -> int:
    """Return the largest batch size that fits in all processes, or that of the run to resume.

    A resumed run keeps its batch size, because the order of the data depends on it.
    """
    from rin_video.training.distributed import in_all, join_process_group
    from rin_video.training.memory import largest_batch
    from rin_video.training.provenance import device_name
    from rin_video.training.state import newest_state

    state = join_process_group()

    def choose() -> int:
        if newest := newest_state(folder):
            return newest[1]["config"]["train"]["train_batch_size"]
        return largest_batch(config, state.device, num_processes=state.num_processes, limit=num_samples)

    size = min(in_all(choose))
    log.info("batch size %d on %s (--batch-size auto)", size, device_name(state.device))
    return size
