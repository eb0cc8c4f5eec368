"""`rin-video sample`: draws samples from a trained model."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from rin_video.cli.options import SIZE_HELP, one_of
from rin_video.config import Config, GuidanceDropName, SampleConfig, SamplerName, ScheduleName, SpacingName
from rin_video.config_files import load_config
from rin_video.errors import UsageError
from rin_video.files import CONFIG
from rin_video.ranks import is_first
from rin_video.wording import counted, scaled

log = logging.getLogger("rin_video")


def add_parsers(commands: Any) -> None:
    """Add the parser of `sample`."""
    command = commands.add_parser("sample", help="draw clips or images from a trained model")
    add = command.add_argument
    add("model", metavar="DIR", help="folder of a run, or a hub id user/name")
    add("--num", dest="sample.num_samples", type=int, metavar="N", help="number of samples")
    add("--steps", dest="sample.steps", type=int, metavar="N", help="number of sampling steps")
    add("--sampler", dest="sample.sampler", metavar="NAME", help=f"sampler: {one_of(SamplerName)}")
    add(
        "--spacing",
        dest="sample.spacing",
        metavar="NAME",
        help=f"spacing of the steps: {one_of(SpacingName)}; null: that of the sampler",
    )
    add(
        "--schedule",
        dest="sample.schedule",
        metavar="NAME",
        help=f"noise schedule: {one_of(ScheduleName)} (default: that of training)",
    )
    add(
        "--class",
        dest="sample.label",
        type=lambda text: "null" if text == "all" else text,
        metavar="NAME|N",
        help="class of the samples; all: each class in turn (default)",
    )
    add("--caption", nargs="+", metavar="TEXT", help="captions of the samples; several are used in turn")
    add("--embedding", nargs="+", metavar="FILE", help="embeddings in place of captions: .npy or .safetensors")
    add(
        "--guidance",
        dest="sample.guidance",
        type=float,
        metavar="W",
        help="strength of classifier-free guidance; 0: none",
    )
    add(
        "--guidance-drop",
        dest="sample.guidance_drop",
        metavar="WHAT",
        help=f"conditions that guidance drops: {one_of(GuidanceDropName)}, or several joined by +",
    )
    add("--frames", type=int, metavar="N", help="frames per clip, any number; 0: images")
    add("--size", metavar="N|HxW", help=f"{SIZE_HELP}, if the position embeddings allow it")
    add("--context", metavar="FILE", help="clip that the samples continue, or a folder of clips")
    add("--context-frames", type=int, metavar="N", help="number of context frames to use (default: all)")
    add("--fill", metavar="A:B", help="frames of --context to generate, such as 4:12; the others are known")
    add("--image", metavar="FILE", help="image that the samples start with")
    add("--window", type=int, metavar="N", help="frames per window (default: those of the model)")
    add("--overlap", type=int, metavar="N", help="frames of a window that condition the next one")
    add("--carry-latents", action="store_true", help="initialise the latents of a window from the window before")
    add("--key-frames", action="store_true", help="generate frames far apart first, then those between them")
    add("--interpolate-positions", action="store_true", help="interpolate learned position embeddings for other sizes")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed; the same seed gives the same samples (default: 0)",
    )
    add("--max-batch", type=int, metavar="N", help="samples drawn at a time; fewer need less memory (default: 16)")
    add("--fps", dest="sample.fps", type=float, metavar="N", help="frames per second of the written clips")
    add(
        "--out",
        metavar="FILE",
        help="output: .mp4 .gif .png .npy .safetensors, or a folder for one file per sample (default: DIR/samples.mp4; "
        "if it exists, samples-1.mp4 and so on)",
    )
    command.epilog = (
        "More options can be set as key=value: sample.sampler.eta=0.5 (of ddim), sample.time_difference=1, "
        "sample.guidance_interval=[0.1,0.9], sample.guidance_rescale=0.7, sample.clip_x0=dynamic"
    )
    command.set_defaults(run=sample, overrides=[])


def sample(options: Namespace) -> None:
    """Draw samples, and write them to files."""
    from rin_video.cli.context import read_context_options, read_embedding_options
    from rin_video.cli.rollout import plan_sampling, refuse_rollout_options, rollout_parts
    from rin_video.cli.trained import allow_only, check_sampling, own_folder
    from rin_video.diffusion.process import GaussianDiffusion
    from rin_video.media import DEFAULT_FPS, MAX_GIF_FPS, check_target, save_parts, save_samples
    from rin_video.training.parallel_sampling import sample_distributed, sampling_device
    from rin_video.weights import find_model

    folder = find_model(options.model)
    config = load_config(folder / CONFIG, options.overrides)
    allow_only(options.overrides, "sample.")
    check_sampling(config)
    for name, value, least in (("seed", options.seed, 0), ("max-batch", options.max_batch, 1)):
        if value is not None and value < least:
            raise UsageError(f"--{name} is {value}: it must be at least {least}")
    wanted = config.sample
    fps = wanted.fps or DEFAULT_FPS
    if str(options.out).lower().endswith(".gif") and getattr(options, "sample.fps") is None:
        fps = min(fps, MAX_GIF_FPS)
    diffusion = GaussianDiffusion.from_pretrained(folder, device=sampling_device())
    model: Any = diffusion.model
    if options.interpolate_positions:
        model.interpolate_positions()
    plan = plan_sampling(model, options.frames, options.size, options.window)
    conditions = read_context_options(options, plan, config) | read_embedding_options(options, config)
    default = own_folder(options.model) / f"samples{'.mp4' if plan.frames else '.png'}"
    out = Path(options.out) if options.out else unused_name(default)
    for path in (options.context, options.image, *(options.embedding or ())):
        if path is not None and out.exists() and Path(path).exists() and out.samefile(path):
            raise UsageError(f"--out {out} is an input too: use another name")
    check_target(out, rank=len(plan.shape) + 1, fps=fps, channels=plan.shape[0])
    start = time.perf_counter()
    titles = sample_titles(wanted, config, options.caption)
    common = conditions | {"seed": options.seed, "max_batch": options.max_batch or 16, "shape": plan.shape}
    if plan.is_rollout:
        parts = rollout_parts(diffusion, wanted, options, plan, common)
        if not is_first():  # each process draws a part of the samples; the main process writes
            for _ in parts:
                pass
            return
        paths = save_parts(parts, out, fps, titles=titles)
    else:
        refuse_rollout_options(options, plan)
        samples = sample_distributed(diffusion, wanted, progress=is_first(), **common)
        if not is_first():
            return
        paths = save_samples(samples.cpu(), out, fps=fps, titles=titles)
    seconds = scaled(time.perf_counter() - start)
    log.info("%s in %s s: %s", counted(wanted.num_samples, "sample"), seconds, paths[0] if len(paths) == 1 else out)


def unused_name(path: Path) -> Path:
    """Return `path`, or if it exists the first of `path-1`, `path-2` and so on that does not."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def sample_titles(wanted: SampleConfig, config: Config, captions: list[str] | None = None) -> list[str] | None:
    """Return the caption of each sample, or its class (a name, or a number if it has no name), or None."""
    if captions:
        return [captions[i % len(captions)] for i in range(wanted.num_samples)]
    classes = config.model.num_classes
    if not classes:
        return None
    names = config.data.classes or [str(i) for i in range(classes)]
    if wanted.label is None:
        return [names[i % classes] for i in range(wanted.num_samples)]
    from rin_video.labels import class_index  # imports torch

    number = class_index(wanted.label, names, classes)
    return None if number < 0 else [names[number]] * wanted.num_samples
