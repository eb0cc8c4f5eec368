"""The protocol of an evaluation: what was measured and how; and published protocols."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rin_video.config_files import to_dict
from rin_video.errors import UsageError
from rin_video.evaluation.comparison import flatten
from rin_video.evaluation.extraction import Measured
from rin_video.evaluation.inputs import Model, Reference, SplitOption
from rin_video.evaluation.scores import MAX_ROWS, NEIGHBOURS, RESAMPLES
from rin_video.evaluation.sets import codec_of
from rin_video.features import Extractor
from rin_video.training.provenance import package_versions

VERSION = 1  # of the metrics; results of different versions do not compare


@dataclass(frozen=True)
class Published:
    """A published protocol: what it fixes. Fields that are None are free."""

    source: str  # the publication
    features: str  # the extractor
    num: int  # generated samples
    split: SplitOption
    num_real: int | None = None  # real samples that the protocol compares with; None: all of the split
    frames: int | None = None  # frames per clip; 0: images
    size: int | None = None  # height and width, in pixels
    given: int | None = None  # known frames


PUBLISHED = {
    "fid50k": Published(
        "Heusel et al. 2017 (arXiv 1706.08500); 50,000 samples against the training set, as in Karras et al. 2019 "
        "(arXiv 1812.04948)",
        features="inception",
        num=50_000,
        split="train",
        frames=0,
    ),
    "kinetics600-5-11": Published(
        "Clark et al. 2019 (arXiv 1907.06571), Luc et al. 2020 (arXiv 2003.04035): 5 given frames, 11 predicted, 64x64",
        features="i3d",
        num=50_000,
        split="validation",
        num_real=50_000,
        frames=16,
        size=64,
        given=5,
    ),
    "ucf101": Published(
        "Skorokhodov et al. 2022 (StyleGAN-V, arXiv 2112.14683): FVD of 2048 clips of 16 frames against 2048 of the "
        "training data",
        features="i3d",
        num=2048,
        split="train",
        num_real=2048,
        frames=16,
    ),
    "bair": Published(
        "Ebert et al. 2017 (arXiv 1710.05268), as in Voleti et al. 2022 (MCVD, arXiv 2205.09853): 1 given frame, 15 "
        "predicted, 64x64, 100 samples for each of 256 test clips",
        features="i3d",
        num=25_600,
        split="validation",
        num_real=256,
        frames=16,
        size=64,
        given=1,
    ),
}


def published(name: str) -> Published:
    """Return a published protocol by name. Raises `UsageError` if it is unknown."""
    if name not in PUBLISHED:
        raise UsageError(f"--protocol {name} is unknown: choose {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def missing(name: str, protocol: Mapping[str, Any]) -> list[str]:
    """Return what keeps an evaluation with this protocol from being the published one, one text per difference."""
    wanted, found = published(name), flatten(protocol)
    texts = []
    expected = {
        "features.name": wanted.features,
        "samples.num": wanted.num,
        "data.num": wanted.num_real,
        "data.split": wanted.split,
        "clips.frames": wanted.frames,
        "clips.given": wanted.given,
    }
    if wanted.size is not None:
        expected["clips.size"] = [wanted.size, wanted.size]
    for key, value in expected.items():
        have = found.get(key)
        same = str(have).partition("=")[0] == value if key == "features.name" else have == value
        if key == "data.split":
            same = str(have).partition(" ")[0] == value
        if not same and (value is not None or key == "clips.given"):
            texts.append(f"{key} is {have}, the protocol has {value}")
    return texts


def describe_protocol(
    model: Model | None,
    reference: Reference,
    measured: Measured,
    extractor: Extractor,
    shape: tuple[int, ...],
    given: int | None,
    best_of: int,
    seed: int,
) -> dict[str, Any]:
    """Return everything that the scores depend on, as JSON values."""
    true, options = measured.real_features, reference.options
    held = f" ({options.validation})" if reference.split == "validation" and options.validation is not None else ""
    name, _, weights = extractor.name.partition("=")
    result: dict[str, Any] = {
        "version": VERSION,
        "data": {
            "split": reference.split + held,
            "num": len(true),
            "files": len(set(true.groups.tolist())),
            "pixels": f"sha256:{true.pixels}",
        },
        "clips": {
            "frames": shape[1] if len(shape) == 4 else 0,
            "size": list(shape[-2:]),
            "channels": shape[0],
            "given": given,
            "stride": options.stride,
            "fps": options.fps,
            "span": options.span,
            "choice": "all clips that fit into a file, evenly thinned, starts by seed 0",
            "resize": "bilinear, antialiased, center crop",
        },
        "samples": {"num": len(measured.sample_features), "codec": codec_of(measured.samples), "best_of": best_of},
        "features": {"name": name, "digest": extractor.digest, **extractor.protocol},
        "metrics": {
            "resamples": RESAMPLES,
            "neighbours": NEIGHBOURS,
            "rows": MAX_ROWS,
            "intervals": "bootstrap by file, 95 %",
        },
        "source": {
            "data": reference.name,
            "samples": measured.samples.name if model is None else model.name,
            "sample_pixels": f"sha256:{measured.sample_features.pixels}",
            "weights_of_features": weights or None,
        },
        "versions": package_versions(),
    }
    if model is not None:
        result["model"] = {
            "weights": model.digest,
            "ema_decay": model.config.train.ema_decay,
            "seed": seed,
            **{f"sample.{key}": value for key, value in to_dict(model.config.sample).items() if key != "num_samples"},
        }
    return to_json(result)


def to_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values as JSON stores them."""
    return dict(json.loads(json.dumps(values)))
