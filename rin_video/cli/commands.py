"""What each command does. `options` is what `cli.make_parser` parsed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from rin_video.cli.rollout import extend_parts, parse_size, plan_pass, refuse_extension
from rin_video.config import Config, DataConfig, DataKind, FrameKind, SampleConfig
from rin_video.config_files import is_set, load_config, presets
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.diffusion.sampling import plan_steps
from rin_video.errors import UsageError
from rin_video.files import CONFIG
from rin_video.labels import class_index
from rin_video.model.info import describe, model_info
from rin_video.ranks import is_first, several_processes
from rin_video.training.identity import run_folder
from rin_video.training.memory import largest_batch, training_memory
from rin_video.training.parallel_sampling import sample_distributed
from rin_video.training.provenance import device_name
from rin_video.training.state import newest_state
from rin_video.weights import find_model

log = logging.getLogger("rin_video")


def train(options: Namespace) -> None:
    """`rin-video train`."""
    from rin_video.datasets.embeddings import embedding_shape
    from rin_video.datasets.open import INDEX, open_dataset
    from rin_video.model.rin import RIN
    from rin_video.training.distributed import first_then_others, heed_launcher
    from rin_video.training.trainer import Trainer

    preset = first_then_others(lambda: chosen_preset(options))
    config = read_config(options, preset)
    if options.steps is not None:
        config.train.train_num_steps = options.steps
    if options.batch_size not in (None, "auto"):
        config.train.train_batch_size = options.batch_size
    config.data.embeddings = options.embeddings or config.data.embeddings
    config.data.text_encoder = options.text_encoder or config.data.text_encoder
    config.data.__post_init__()
    config.train.init_from = options.init_from or config.train.init_from
    config.train.__post_init__()
    if not is_set("train.warmup_steps", None, options.overrides):
        shorten_warmup(config)

    folder = Path(options.out or run_folder(options.data))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: give a folder")
    shape = model_info(config.model).shape
    seed, index = config.train.seed, folder / INDEX
    dataset = first_then_others(lambda: open_dataset(options.data, shape, config.data, seed=seed, index=index))
    if not is_set("model.num_classes", preset, options.overrides):
        config.model.num_classes = len(dataset.classes)
    told = embedding_shape(dataset)
    if told is not None and not is_set("model.embedding_dim", preset, options.overrides):
        config.model.embedding_tokens, config.model.embedding_dim = told
    check_sampling(config, always_given=bool(config.diffusion.known) and not config.diffusion.known.get("none"))

    log.info("data\n%s", _indent(dataset.describe()))
    log.info("model\n%s", describe(config.model))
    heed_launcher(config.train)
    if options.batch_size == "auto":
        config.train.train_batch_size = choose_batch(config, folder, len(dataset))
    torch.manual_seed(config.train.seed)
    diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
    trainer = Trainer(diffusion, dataset, results_folder=folder, config=config)
    log.info(
        "training\n  on %s, about %.1f GB, %d steps of %d samples, into %s",
        device_name(trainer.accelerator.device),
        training_memory(config, num_processes=trainer.accelerator.num_processes) / 1e9,
        config.train.train_num_steps,
        config.train.train_batch_size * config.train.gradient_accumulate_every,
        folder,
    )
    trainer.train()
    log.info("done: rin-video sample %s", folder)


def shorten_warmup(config: Config) -> None:
    """Limits a preset's warm-up to half of the steps, and logs it."""
    wanted, most = config.train.warmup_steps, config.train.train_num_steps // 2
    if wanted > most:
        log.info(
            "warm-up: %d steps, half of the training, instead of %d (train.warmup_steps=%d keeps it)",
            most,
            wanted,
            wanted,
        )
        config.train.warmup_steps = most


def sample(options: Namespace) -> None:
    """`rin-video sample`."""
    from rin_video.cli.context import read_context_options, read_embedding_options
    from rin_video.media import DEFAULT_FPS, MAX_GIF_FPS, check_target, save_parts, save_samples

    folder = find_model(options.model)
    names = {name: getattr(options, name) for name in ("sampler", "spacing", "schedule")}  # where null is a choice
    chosen = [f"sample.{name}={value}" for name, value in names.items() if value is not None]
    config = load_config(folder / CONFIG, [*chosen, *options.overrides])
    wanted = config.sample
    for name in ("steps", "label", "guidance", "guidance_drop", "fps"):
        if getattr(options, name) is not None:
            setattr(wanted, name, getattr(options, name))
    wanted.num_samples = wanted.num_samples if options.num is None else options.num
    wanted.__post_init__()
    if wanted.label == "all":
        wanted.label = None
    fps = wanted.fps or DEFAULT_FPS
    if options.fps is None and str(options.out).lower().endswith(".gif"):
        fps = min(fps, MAX_GIF_FPS)
    check_sampling(config)
    if options.seed < 0:
        raise UsageError(f"--seed is {options.seed}: it must be at least 0")
    if options.max_batch is not None and options.max_batch < 1:
        raise UsageError(f"--max-batch is {options.max_batch}: it must be at least 1")
    allow_only(options.overrides, "sample.")
    device = best_device()
    if several_processes():
        from rin_video.training.distributed import meet

        device = meet().device
    diffusion = GaussianDiffusion.from_pretrained(folder, device=device)
    model: Any = diffusion.model
    if options.interpolate_positions:
        model.interpolate_positions()
    pass_ = plan_pass(model, options.frames, options.size, options.window)
    given = read_context_options(options, pass_, config) | read_embedding_options(options, config)
    out = Path(options.out or own_folder(options.model) / f"samples{'.mp4' if pass_.frames else '.png'}")
    check_target(out, rank=len(pass_.shape) + 1, fps=fps, channels=pass_.shape[0])
    start = time.perf_counter()
    titles = sample_titles(wanted, config, options.caption)
    common = given | {"seed": options.seed, "max_batch": options.max_batch or 16, "shape": pass_.shape}
    if pass_.extends:
        parts = extend_parts(diffusion, wanted, options, pass_, common)
        if not is_first():  # each draws a part of the samples, the first writes
            for _ in parts:
                pass
            return
        paths = save_parts(parts, out, fps, titles=titles)
    else:
        refuse_extension(options, pass_)
        samples = sample_distributed(diffusion, wanted, progress=is_first(), **common)
        if not is_first():
            return
        paths = save_samples(samples.cpu(), out, fps=fps, titles=titles)
    seconds = time.perf_counter() - start
    log.info("%d samples in %.1f s: %s", wanted.num_samples, seconds, paths[0] if len(paths) == 1 else out)


def sample_titles(wanted: SampleConfig, config: Config, captions: list[str] | None = None) -> list[str] | None:
    """The caption of every sample; else its class, by name where it has one."""
    if captions:
        return [captions[i % len(captions)] for i in range(wanted.num_samples)]
    classes = config.model.num_classes
    if not classes:
        return None
    names = config.data.classes or [str(i) for i in range(classes)]
    return [names[i % classes if wanted.label is None else int(wanted.label)] for i in range(wanted.num_samples)]


def diagnose(options: Namespace) -> None:
    """`rin-video diagnose`."""
    from rin_video.datasets.open import open_dataset
    from rin_video.reports.diagnose import diagnose_run

    folder = find_model(options.model)
    config = load_config(folder / CONFIG, options.overrides)
    allow_only(options.overrides, "data.", "sample.")
    check_sampling(config)
    data = options.data or config.data.path
    if data is None:
        raise UsageError(f"{folder / CONFIG} does not say what it was trained on: give --data FOLDER")
    if options.num < 2:
        raise UsageError(f"--num is {options.num}: it must be at least 2")
    diffusion = GaussianDiffusion.from_pretrained(folder, device=best_device())
    dataset = open_dataset(data, diffusion.shape, config.data, seed=config.train.seed)
    out = Path(options.out or own_folder(options.model) / "diagnosis")
    diagnosis = diagnose_run(folder, diffusion, dataset, config, out, num=options.num)
    _say(
        f"loss ({config.diffusion.objective}, not weighted), mean of {min(options.num, len(dataset))} samples of {data}"
    )
    _say(diagnosis.table())
    for finding in diagnosis.findings() or ["nothing looks wrong: every noise level is learnt, no latent is dead"]:
        _say(f"- {finding}")
    _say(f"pictures: {out / 'loss.png'}, {out / 'trajectory.png'} (a row for each sample, time from left to right)")


def ema(options: Namespace) -> None:
    """`rin-video ema`."""
    from rin_video.training.ema import write_averages

    run = find_model(options.model)
    for folder, error in write_averages(run, options.sigma_rel, Path(options.out) if options.out else None):
        log.info("%s (its profile is met within %.2g %%): rin-video sample %s", folder, 100 * error, folder)
        if error > 0.01:
            log.warning("that is far off: more snapshots (train.ema_snapshot_every) meet a length this short better")


def report(options: Namespace) -> None:
    """`rin-video report`."""
    from rin_video.reports.page import write_report

    run = Path(options.model)
    log.info("%s", write_report(run, Path(options.out or run / "report.html")))


def push(options: Namespace) -> None:
    """`rin-video push`."""
    from rin_video.reports.card import push_to_hub

    url = push_to_hub(
        options.model, options.repo, private=options.private, license=options.license, new_card=options.new_card
    )
    log.info("%s: rin-video sample %s", url, options.repo)


def index(options: Namespace) -> None:
    """`rin-video index`."""
    from rin_video.datasets.index import make_index
    from rin_video.datasets.open import INDEX

    data = read_files_config(options)
    kind = options.kind or kind_of(options.data, data)
    path = Path(options.out or run_folder(options.data) / INDEX)
    found = make_index(options.data, kind, data, path=path, progress=True)
    _say(found.describe())
    found.require_some(data.strict)
    _say(f"index: {path}")


def peek(options: Namespace) -> None:
    """`rin-video peek`."""
    from rin_video.datasets.open import INDEX, open_dataset
    from rin_video.datasets.preview import captions, check_sheet, draw_some, statistics, write_sheet
    from rin_video.datasets.steady import frame_rate
    from rin_video.media import DEFAULT_FPS

    if options.num < 1:
        raise UsageError(f"--num is {options.num}: it must be at least 1")
    config = read_config(options, chosen_preset(options))
    if options.out:
        check_sheet(Path(options.out))
    known = run_folder(options.data) / INDEX  # where training left it; nothing is written there
    dataset = open_dataset(
        options.data,
        model_info(config.model).shape,
        config.data,
        seed=config.train.seed,
        index=known if known.exists() else None,
    )
    samples, chosen = draw_some(dataset, options.num)
    _say(dataset.describe())
    for line in statistics(dataset, samples, chosen):
        _say(line)
    if options.out:
        write_sheet(samples, captions(dataset, chosen), options.out, frame_rate(dataset) or DEFAULT_FPS)
        _say(f"sheet: {options.out}")


def prepare(options: Namespace) -> None:
    """`rin-video prepare`."""
    from rin_video.datasets.clips import ClipFolder
    from rin_video.datasets.images import ImageFolder
    from rin_video.datasets.prepare import loading_speed
    from rin_video.datasets.prepare import prepare as write_shards

    data = read_files_config(options)
    if options.fps is not None:
        data.fps = options.fps
        data.__post_init__()
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers is {options.workers}: it must be at least 1")
    kind = options.kind or kind_of(options.data, data)
    if kind not in get_args(FrameKind):
        raise UsageError(
            f"prepare takes clips or images, {options.data} is of kind {kind}: "
            f"give --kind {' or '.join(get_args(FrameKind))}"
        )
    size = parse_size(options.size)
    H, W = (size, size) if isinstance(size, int) else size
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: give a folder")
    if out.exists() and out.resolve() == Path(options.data).resolve():
        raise UsageError(f"--out {out} is the data itself: give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made ({error.strerror}): give another folder") from error
    for line in write_shards(options.data, kind, out, (H, W), data, workers=options.workers or os.cpu_count() or 1):
        _say(line)
    frames = 0 if kind == "image" else 8
    while True:  # clips may be shorter: all is done by now, and nothing of it may be lost to a measurement
        try:
            before, after = (
                loading_speed(
                    ImageFolder(root, (H, W), index=index, config=dataclasses.replace(data, fps=rate))
                    if kind == "image"
                    else ClipFolder(root, (H, W), frames, index=index, config=dataclasses.replace(data, fps=rate))
                )
                for root, rate, index in (
                    (options.data, data.fps, out / "source.jsonl"),
                    (out, None, out / "index.jsonl"),
                )
            )
            what = f"clips of {frames} frames" if frames else "images"
            _say(f"{before:.1f} {what} a second before, {after:.1f} now ({after / before:.1f} times), in one process")
            break
        except UsageError as error:
            frames //= 2
            if not frames:
                _say(f"the speed of loading is not measured: {error}")
                break
    _say(f"next: rin-video train --data {out}")


def export(options: Namespace) -> None:
    """`rin-video export`."""
    from rin_video.cli.convert import export as convert

    log.info(convert(options.input, options.output, fps=options.fps))


def info(options: Namespace) -> None:
    """`rin-video info`."""
    if options.model and options.config:
        raise UsageError("give the folder of a run or --config, not both")
    if options.overrides and not (options.model or options.config):
        raise UsageError(f"{options.overrides[0]} changes no model: give --config NAME too")
    if not (options.model or options.config):
        rows = {name: model_info(load_config(name).model) for name in presets()}
        if options.json:
            _say(json.dumps({name: _counts(row) for name, row in rows.items()}, indent=2))
            return
        _say(f"{'preset':<20}{'sample':<14}{'tokens':>8}{'latents':>9}{'parameters':>13}{'GFLOPs':>9}")
        for name, row in rows.items():
            size = "x".join(map(str, row.shape[1:]))
            _say(f"{name:<20}{size:<14}{row.tokens:>8}{row.latents:>9}{row.params:>13,}{row.gflops:>9.2f}")
        _say("one in detail: rin-video info --config NAME")
        return
    source = find_model(options.model) / CONFIG if options.model else options.config
    config = load_config(source, options.overrides)
    if options.json:
        _say(json.dumps(_counts(model_info(config.model))))
        return
    _say(describe(config.model))
    batch = config.train.train_batch_size
    _say(f"  {'training':<11}about {training_memory(config) / 1e9:.1f} GB at batch size {batch}")


def demo(options: Namespace) -> None:
    """`rin-video demo`."""
    from rin_video.cli.demo import run_demo

    run_demo(Path(options.out), options.overrides)


def read_config(options: Namespace, preset: str) -> Config:
    """The configuration that the options on data, frames and size ask for."""
    if options.frames is not None and options.frames < 0:
        raise UsageError(f"--frames is {options.frames}: give the frames of a clip, or 0 for images")
    config = load_config(preset, options.overrides)
    if options.frames is not None:
        config.model.frames = options.frames or None
    if options.size:
        config.model.image_size = parse_size(options.size)
    config.data.path = os.fspath(options.data)
    config.data.images = options.images or config.data.images
    if config.data.images is not None:
        if not config.model.frames:
            raise UsageError("--images is mixed with clips: give --frames, or the images alone as --data")
        if config.model.tokenizer in ("auto", "tube"):
            config.model.tokenizer = "tube+image"
    set_reading(config, options)
    return config


def chosen_preset(options: Namespace) -> str:
    """`--config`, or the preset that suits the data and the size."""
    from rin_video.datasets.hub import is_hub, kind_of_hub

    frames = options.frames
    if options.config is None and frames is None:
        find_kind = kind_of_hub if is_hub(options.data) else kind_of
        frames = 0 if find_kind(options.data, read_data_config(options)) == "image" else None
    return options.config or default_preset(frames, options.size)


def read_data_config(options: Namespace) -> DataConfig:
    """Only the data section, for commands that know no model."""
    name = getattr(options, "config", None)
    config = load_config(name, [override for override in options.overrides if name or override.startswith("data.")])
    set_reading(config, options)
    return config.data


def read_files_config(options: Namespace) -> DataConfig:
    """`read_data_config` for commands that look at files alone. UsageError for what they would not heed."""
    from rin_video.datasets.hub import is_hub

    for override in options.overrides:
        if not override.startswith("data."):
            raise UsageError(f"{override}: {options.command} trains nothing, it takes data.key=value")
    if is_hub(options.data):
        raise UsageError(f"{options.data}: {options.command} takes files and shards; train and peek take hf: too")
    return read_data_config(options)


def set_reading(config: Config, options: Namespace) -> None:
    config.data.strict = config.data.strict or options.strict
    config.data.decoder = options.decoder or config.data.decoder
    for name in ("image_column", "label_column"):
        setattr(config.data, name, getattr(options, name, None) or getattr(config.data, name))
    config.data.__post_init__()


def kind_of(data: str, options: DataConfig) -> DataKind:
    """Which kind of files the data is made of."""
    from rin_video.datasets.folders import detect_kind

    return detect_kind(data, allow_pipe=options.allow_pipe, cache=run_folder(data) / "pipes")


def allow_only(overrides: list[str], *sections: str) -> None:
    """A trained model stays what it is: overrides of other sections than these are a `UsageError`."""
    for override in overrides:
        if not override.startswith(sections):
            kinds = " and ".join(f"{section}key=value" for section in sections)
            raise UsageError(f"{override} cannot change a trained model: this command takes {kinds}")


def choose_batch(config: Config, folder: Path, num_samples: int) -> int:
    """The largest batch that fits, or that of the run which goes on: the order of the data depends on it.

    Of several processes, the largest that fits into all of them.
    """
    from rin_video.training.distributed import in_all, meet

    state = meet()

    def choose() -> int:
        if newest := newest_state(folder):
            return newest[1]["config"]["train"]["train_batch_size"]
        return largest_batch(config, state.device, num_processes=state.num_processes, limit=num_samples)

    size = min(in_all(choose))
    log.info("batch size %d, the largest that fits into %s", size, device_name(state.device))
    return size


def check_sampling(config: Config, *, always_given: bool = True) -> None:
    """What would fail in sampling, and can be said before: a `UsageError`. Those of training may be given nothing."""
    wanted = config.sample
    drops_label = wanted.guidance and "label" in wanted.guidance_drop
    if drops_label and not config.model.num_classes and not config.model.embedding_dim:
        raise UsageError(
            f"sample.guidance is {wanted.guidance:g}, but the model has no classes and no embeddings: leave it at 0"
            f"{', or add --guidance-drop known' if config.model.known_mask else ''}"
        )
    if wanted.guidance and "known" in wanted.guidance_drop and not (config.model.known_mask and always_given):
        raise UsageError(
            f"sample.guidance_drop is {wanted.guidance_drop}, but these samples are given no known cells: "
            "set it when sampling from a context, with a model of model.known_mask=true"
        )
    if drops_label and not config.diffusion.label_dropout:
        raise UsageError(
            f"sample.guidance is {wanted.guidance:g}, but the model never learnt to do without labels: "
            "train with diffusion.label_dropout=0.1 (embeddings are dropped with the label)"
        )
    if wanted.label is not None:
        wanted.label = class_index(wanted.label, config.data.classes, config.model.num_classes)
    plan_steps(config.diffusion, wanted)


def default_preset(frames: int | None, size: str | None) -> str:
    """The preset for images (frames 0) or clips of a size: the smallest that was made for so much."""
    longest = np.max(parse_size(size)) if size else 64
    if frames == 0:
        return "image64" if longest <= 64 else "image128" if longest <= 128 else "image256"
    return "video64" if longest <= 64 else "video128"


def own_folder(model: str) -> Path:
    """Where results go: beside the model, or here where it came from the hub."""
    return Path(model) if Path(model).is_dir() else Path()


def best_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _counts(row: object) -> dict[str, object]:
    return {key: getattr(row, key) for key in ("params", "tokens", "latents", "gflops")}


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _say(text: str) -> None:
    print(text)  # noqa: T201
