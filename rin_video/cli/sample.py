"""`rin-video sample`."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rin_video.cli.options import SIZE_HELP, one_of
from rin_video.config import Config, GuidanceDropName, SampleConfig, SamplerName, ScheduleName, SpacingName
from rin_video.config_files import load_config
from rin_video.errors import UsageError
from rin_video.files import CONFIG
from rin_video.ranks import is_first, several_processes
from rin_video.wording import counted, scaled

if TYPE_CHECKING:
    import torch

log = logging.getLogger("rin_video")


def add_parsers(commands: Any) -> None:
    command = commands.add_parser("sample", help="draw clips or images from a trained model")
    add = command.add_argument
    add("model", metavar="DIR", help="the folder that training wrote, or a hub id user/name")
    add("--num", dest="sample.num_samples", type=int, metavar="N", help="how many")
    add("--steps", dest="sample.steps", type=int, metavar="N", help="sampling steps")
    add("--sampler", dest="sample.sampler", metavar="NAME", help=one_of(SamplerName))
    add(
        "--spacing",
        dest="sample.spacing",
        metavar="NAME",
        help=f"of the steps: {one_of(SpacingName)}; null: by sampler",
    )
    add(
        "--schedule",
        dest="sample.schedule",
        metavar="NAME",
        help=f"another noise schedule than that of training: {one_of(ScheduleName)}",
    )
    add(
        "--class",
        dest="sample.label",
        type=lambda text: "null" if text == "all" else text,
        metavar="NAME|N",
        help="one class, or all in turn (default)",
    )
    add("--caption", nargs="+", metavar="TEXT", help="what the samples are to show; several in turn")
    add("--embedding", nargs="+", metavar="FILE", help="the same as vectors, .npy or .safetensors")
    add("--guidance", dest="sample.guidance", type=float, metavar="W", help="classifier-free guidance; 0: none")
    add(
        "--guidance-drop",
        dest="sample.guidance_drop",
        metavar="WHAT",
        help=f"what guidance does without: {one_of(GuidanceDropName)}, or several joined by +",
    )
    add("--frames", type=int, metavar="N", help="frames of a clip, any number; 0: images")
    add("--size", metavar="N|HxW", help=f"{SIZE_HELP}, where the positions allow it")
    add("--context", metavar="FILE", help="a clip that the samples continue, or a folder of them")
    add("--context-frames", type=int, metavar="N", help="how many of its frames are given (all)")
    add("--fill", metavar="A:B", help="frames to invent of the clip --context; the others are given")
    add("--image", metavar="FILE", help="an image that the samples start with")
    add("--window", type=int, metavar="N", help="frames of one pass (default: the model's)")
    add("--overlap", type=int, metavar="N", help="frames that a window is given of the one before")
    add("--carry-latents", action="store_true", help="windows hand on latents too")
    add("--key-frames", action="store_true", help="frames far apart first, then those between them")
    add("--interpolate-positions", action="store_true", help="learned positions at other sizes")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same samples")
    add("--max-batch", type=int, metavar="N", help="how many at a time (less memory)")
    add("--fps", dest="sample.fps", type=float, metavar="N", help="of the clips that are written")
    add(
        "--out",
        metavar="FILE",
        help=".mp4 .gif .png .npy .safetensors, or a folder for one file each (default: DIR/samples.mp4, samples-1.mp4 "
        "and so on where that exists)",
    )
    command.epilog = (
        "More options as sample.key=value: sampler.eta=0.5, time_difference=1, guidance_interval=[0.1,0.9], "
        "guidance_rescale=0.7, clip_x0=dynamic"
    )
    command.set_defaults(run=sample, overrides=[])


def sample(options: Namespace) -> None:
    """Draw samples, and write them to files."""
    from rin_video.cli.context import read_context_options, read_embedding_options
    from rin_video.cli.rollout import extend_parts, plan_pass, refuse_extension
    from rin_video.cli.trained import allow_only, check_sampling, own_folder
    from rin_video.diffusion.process import GaussianDiffusion
    from rin_video.media import DEFAULT_FPS, MAX_GIF_FPS, check_target, save_parts, save_samples
    from rin_video.training.parallel_sampling import sample_distributed
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
    diffusion = GaussianDiffusion.from_pretrained(folder, device=choose_device())
    model: Any = diffusion.model
    if options.interpolate_positions:
        model.interpolate_positions()
    pass_ = plan_pass(model, options.frames, options.size, options.window)
    given = read_context_options(options, pass_, config) | read_embedding_options(options, config)
    default = own_folder(options.model) / f"samples{'.mp4' if pass_.frames else '.png'}"
    out = Path(options.out) if options.out else unused_name(default)
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
    seconds = scaled(time.perf_counter() - start)
    log.info("%s in %s s: %s", counted(wanted.num_samples, "sample"), seconds, paths[0] if len(paths) == 1 else out)


def choose_device() -> torch.device:
    """The best device; of several processes, that of this one."""
    from rin_video.cli.trained import best_device

    if not several_processes():
        return best_device()
    from rin_video.training.distributed import meet

    return meet().device


def unused_name(path: Path) -> Path:
    """`path`, or `path-1`, `path-2` and so on where that exists."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def sample_titles(wanted: SampleConfig, config: Config, captions: list[str] | None = None) -> list[str] | None:
    """The caption of every sample; else its class, by name where it has one."""
    if captions:
        return [captions[i % len(captions)] for i in range(wanted.num_samples)]
    classes = config.model.num_classes
    if not classes:
        return None
    names = config.data.classes or [str(i) for i in range(classes)]
    return [names[i % classes if wanted.label is None else int(wanted.label)] for i in range(wanted.num_samples)]
