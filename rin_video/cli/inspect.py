"""Commands for models and runs: `rin-video info`, `diagnose`, `report` and `ema`."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from rin_video.cli.options import RUN_HELP, open_known, say
from rin_video.config_files import load_config, presets
from rin_video.errors import ShortClipError, UsageError
from rin_video.files import CONFIG
from rin_video.wording import counted, in_bytes

log = logging.getLogger("rin_video")


def add_parsers(commands: Any) -> None:
    """Add the parsers of `info`, `diagnose`, `report` and `ema`."""
    command = commands.add_parser("info", help="list the presets, or show the size and cost of a model")
    add = command.add_argument
    add("model", nargs="?", metavar="DIR", help=RUN_HELP)
    add("--config", metavar="NAME|FILE", help="preset or YAML file")
    add("--memory", action="store_true", help="also show the memory of training, which takes seconds to compute")
    add("--json", action="store_true", help="print params, tokens, latents and gflops as JSON")
    command.set_defaults(run=info, overrides=[])

    command = commands.add_parser(
        "diagnose", help="find out why samples look wrong: loss by noise level, images, findings"
    )
    add = command.add_argument
    add("model", metavar="DIR", help=RUN_HELP)
    add("--data", metavar="FOLDER", help="clips or images (default: those of training)")
    add("--num", type=int, default=64, metavar="N", help="number of samples of the data to measure on (default: 64)")
    add("--out", metavar="DIR", help="output folder (default: DIR/diagnosis)")
    command.set_defaults(run=diagnose, overrides=[])

    command = commands.add_parser("report", help="write a run as one HTML page: curves, samples, options, versions")
    add = command.add_argument
    add("model", metavar="DIR", help=RUN_HELP)
    add("--out", metavar="FILE", help="file of the page (default: DIR/report.html)")
    command.set_defaults(run=report)

    command = commands.add_parser("ema", help="compute post-hoc EMAs of other lengths, without training again")
    add = command.add_argument
    add("model", metavar="DIR", help=RUN_HELP)
    add(
        "--sigma-rel",
        type=float,
        nargs="+",
        required=True,
        metavar="S",
        help="lengths, as fractions of the training in [0.01, 0.28]: 0.05 0.1 0.15",
    )
    add("--out", metavar="DIR", help="folder in which a folder ema-S is written for each length (default: DIR)")
    command.set_defaults(run=ema)


def info(options: Namespace) -> None:
    """Print the size and cost of the presets, or of one model."""
    from rin_video.model.info import describe, model_info

    if options.model and options.config:
        raise UsageError("pass the folder of a run or --config, not both")
    if options.overrides and not (options.model or options.config):
        raise UsageError(f"{options.overrides[0]} has no model to change: add --config NAME")
    if not (options.model or options.config):
        rows = {name: model_info(load_config(name).model) for name in presets()}
        if options.json:
            say(json.dumps({name: _counts(row) for name, row in rows.items()}, indent=2))
            return
        say(f"{'preset':<20}{'sample':<14}{'tokens':>8}{'latents':>9}{'parameters':>13}{'GFLOPs':>9}")
        for name, row in rows.items():
            size = "x".join(map(str, row.shape[1:]))
            say(f"{name:<20}{size:<14}{row.tokens:>8}{row.latents:>9}{row.params:>13,}{row.gflops:>9.2f}")
        say("details of one preset: rin-video info --config NAME")
        return
    config = load_config(find_config(options.model) if options.model else options.config, options.overrides)
    if options.json:
        say(json.dumps(_counts(model_info(config.model))))
        return
    say(describe(config.model))
    if options.memory:
        from rin_video.training.memory import training_memory

        batch = config.train.train_batch_size
        say(f"  {'training':<11}about {in_bytes(training_memory(config))} at batch size {batch}")


def find_config(model: str) -> Path:
    """Return the path of the configuration of a run or a model on the hub; for a folder, torch is not imported."""
    local = Path(model) / CONFIG
    if local.is_file():
        return local
    from rin_video.weights import find_model

    return find_model(model) / CONFIG


def diagnose(options: Namespace) -> None:
    """Measure a model on data, and print the losses and findings."""
    from rin_video.cli.trained import allow_only, check_sampling, own_folder
    from rin_video.datasets.open import INDEX
    from rin_video.diffusion.process import GaussianDiffusion
    from rin_video.reports.diagnose import diagnose_run
    from rin_video.training.parallel_sampling import sampling_device
    from rin_video.weights import find_model

    folder = find_model(options.model)
    config = load_config(folder / CONFIG, options.overrides)
    allow_only(options.overrides, "data.", "sample.")
    check_sampling(config)
    data = options.data or config.data.path
    if data is None:
        raise UsageError(f"{folder / CONFIG} does not name the data of training: add --data FOLDER")
    if options.num < 2:
        raise UsageError(f"--num is {options.num}: it must be at least 2")
    diffusion = GaussianDiffusion.from_pretrained(folder, device=sampling_device())
    try:
        dataset = open_known(data, diffusion.shape, config, None if options.data else folder / INDEX)
    except ShortClipError as error:
        raise UsageError(f"{error.problem}: use longer clips (--data FOLDER)") from None
    out = Path(options.out or own_folder(options.model) / "diagnosis")
    diagnosis = diagnose_run(folder, diffusion, dataset, config, out, num=options.num)
    samples = counted(min(options.num, len(dataset)), "sample")
    say(f"unweighted loss ({config.diffusion.objective}), mean over {samples} of {data}")
    say(diagnosis.table())
    for finding in diagnosis.findings() or ["nothing looks wrong: every noise level is learned, and no latent is dead"]:
        say(f"- {finding}")
    say(f"images: {out / 'loss.png'}, {out / 'trajectory.png'} (one row per sample, steps from left to right)")


def report(options: Namespace) -> None:
    """Write the HTML page of a run."""
    from rin_video.reports.page import write_report

    run = Path(options.model)
    log.info("%s", write_report(run, Path(options.out or run / "report.html")))


def ema(options: Namespace) -> None:
    """Write post-hoc EMAs of other lengths."""
    from rin_video.training.ema import write_post_hoc_emas
    from rin_video.weights import find_model

    run = find_model(options.model)
    for folder, error in write_post_hoc_emas(run, options.sigma_rel, Path(options.out) if options.out else None):
        log.info("%s (error of the profile: %.1g): rin-video sample %s", folder, round(error, 4), folder)
        if error > 0.01:
            log.warning("this error is large: more snapshots (lower train.ema_snapshot_every) reduce it")


def _counts(row: object) -> dict[str, object]:
    return {key: getattr(row, key) for key in ("params", "tokens", "latents", "gflops")}
