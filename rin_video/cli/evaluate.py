"""`rin-video evaluate` and `compare`: scores of a model or of samples, and two results side by side."""

from __future__ import annotations

import hashlib
import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from rin_video.cli.options import say
from rin_video.errors import UsageError
from rin_video.ranks import is_first
from rin_video.wording import scaled

log = logging.getLogger("rin_video")

SPLITS, CODECS = ("auto", "train", "validation", "all"), ("auto", "h264", "none")


def add_parsers(commands: Any) -> None:
    """Add the parsers of `evaluate` and `compare`."""
    command = commands.add_parser(
        "evaluate",
        help="score a model, or a folder of samples, against real clips or images",
        description="Score a model, or a folder of samples, against real clips or images. The same command resumes.",
    )
    add = command.add_argument
    add("source", metavar="RUN|SAMPLES", help="folder of a run, a hub id user/name, or a folder or array of samples")
    add("--data", metavar="DATA|RUN", help="real data, or a run that stands for its data (default: that of the run)")
    add("--num", type=int, metavar="N", help="number of samples (default: as many as real ones, up to 2048)")
    add("--features", metavar="NAME", help="extractor: lite (default), transnet, self, inception, i3d=FILE, ...")
    add("--given", type=int, metavar="K", help="predict clips from their first K frames")
    add("--best-of", type=int, default=1, metavar="N", help="with --given, samples per clip (default: 1)")
    add("--split", choices=SPLITS, default="auto", help="part of the data (default: the held-out part, else all)")
    add(
        "--codec",
        choices=CODECS,
        default="auto",
        help="h264: evaluate MP4 files, as `sample` writes them; none: pixels",
    )
    add("--protocol", metavar="NAME", help="published protocol: fid50k, kinetics600-5-11, ucf101, bair")
    add("--download", action="store_true", help="allow the extractor to download its weights")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the samples (default: 0)")
    add("--max-batch", type=int, default=16, metavar="N", help="samples drawn at a time (default: 16)")
    add("--keep", metavar="DIR", help="folder in which to keep the samples")
    add("--out", metavar="DIR", help="folder for pictures and unfinished samples (default: RUN/evaluation)")
    add(
        "--json",
        metavar="FILE",
        help="file of the result (default: RUN/evaluation/scores.json, or a name with the options)",
    )
    command.epilog = "More options can be set as key=value: sample.steps=25, data.stride=2"
    command.set_defaults(run=evaluate, overrides=[])

    command = commands.add_parser("compare", help="print two results of `evaluate` side by side")
    command.add_argument("first", metavar="A.json", help="result of `rin-video evaluate`")
    command.add_argument("second", metavar="B.json", help="another result with the same protocol")
    command.set_defaults(run=compare)


def evaluate(options: Namespace) -> None:
    """Score a model or samples, print the table and write the result."""
    from rin_video.cli.trained import allow_only
    from rin_video.evaluation.evaluate import evaluate as measure
    from rin_video.evaluation.protocol import PUBLISHED

    allow_only(options.overrides, "data.", "sample.")
    if options.protocol is not None and options.protocol not in PUBLISHED:
        raise UsageError(f"--protocol {options.protocol} is unknown: choose {', '.join(PUBLISHED)}")
    result = measure(
        options.source,
        options.data,
        num=options.num,
        features=options.features,
        given=options.given,
        best_of=options.best_of,
        split=options.split,
        codec=options.codec,
        protocol=options.protocol,
        json=result_file(options),
        seed=options.seed,
        keep=options.keep,
        out=options.out,
        download=options.download,
        max_batch=options.max_batch,
        overrides=options.overrides,
    )
    if not is_first():
        return
    say(result.table())
    path = result_file(options)
    seconds = ", ".join(f"{name} {scaled(value)} s" for name, value in result.seconds.items())
    log.info("%s%s", seconds, "; --json FILE stores the result" if path is None else f"; result: {path}")


def result_file(options: Namespace) -> Path | None:
    """Return `--json`, or for a run a name that tells the options; a digest stands for those that are no numbers."""
    from rin_video.evaluation.inputs import is_run

    if options.json is not None or not is_run(options.source):
        return None if options.json is None else Path(options.json)
    name, _, weights = (options.features or "").partition("=")
    parts = [name, Path(weights).stem, options.protocol, options.split if options.split != "auto" else None]
    parts += [f"{key}-{value}" for key in ("num", "given") if (value := getattr(options, key)) is not None]
    parts += [f"seed-{options.seed}"] if options.seed else []
    others = [options.data, options.codec, options.best_of, *options.overrides]
    if others != [None, "auto", 1]:
        parts.append(hashlib.blake2b(repr(others).encode(), digest_size=3).hexdigest())
    stem = "-".join(re.sub(r"[^\w.-]+", "_", str(part)) for part in parts if part)
    return Path(options.source) / "evaluation" / f"{stem or 'scores'}.json"


def compare(options: Namespace) -> None:
    """Print two results side by side."""
    from rin_video.evaluation.comparison import compare as lines

    for line in lines(Path(options.first), Path(options.second)):
        say(line)
