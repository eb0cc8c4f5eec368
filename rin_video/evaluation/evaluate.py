"""Evaluates a model or samples against real data: `rin-video evaluate` and `rin_video.evaluate`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from rin_video.config_checks import check_choice
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import UsageError, first_line
from rin_video.evaluation import scores
from rin_video.evaluation.drawing import draw_samples, lock_samples
from rin_video.evaluation.extraction import Measured, extract
from rin_video.evaluation.feature_checks import refuse_equal
from rin_video.evaluation.inputs import (
    Data,
    Reference,
    Source,
    SplitOption,
    is_run,
    open_model,
    open_reference,
)
from rin_video.evaluation.pictures import write_pictures
from rin_video.evaluation.planning import (
    NUM,
    CodecOption,
    check_counts,
    check_shape,
    choose_codec,
    digest_of,
    identity_of,
    output_folder,
    plan_drawing,
)
from rin_video.evaluation.prediction import PredictionScores
from rin_video.evaluation.protocol import describe_protocol, missing, published
from rin_video.evaluation.result import Evaluation
from rin_video.evaluation.scores import Score
from rin_video.evaluation.sets import SampleSet, choose, choose_others, in_memory, open_samples
from rin_video.features import Extractor, make_extractor
from rin_video.media import check_folder
from rin_video.progress import progress_bar
from rin_video.ranks import is_first
from rin_video.training.distributed import first_then_others, in_all
from rin_video.training.parallel_sampling import sampling_device
from rin_video.wording import counted

FEATURES = "lite"  # the default extractor: it passes most rows of benchmarks/evaluate.py
CLIPS_AT_ONCE = 8  # clips whose predictions are scored together
FEW = 100  # samples below which even unbiased distances have wide intervals
FEW_FILES = 5  # files below which a bootstrap by file means little


def evaluate(
    source: Source,
    data: Data | None = None,
    *,
    num: int | None = None,
    features: str | None = None,
    given: int | None = None,
    best_of: int = 1,
    split: SplitOption = "auto",
    codec: CodecOption = "auto",
    protocol: str | None = None,
    seed: int = 0,
    json: str | os.PathLike[str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    download: bool = False,
    device: str | torch.device | None = None,
    max_batch: int = 16,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Compare generated samples with real ones; return the scores and their protocol.

    `source` is the folder of a run, a hub id, a `GaussianDiffusion`, or samples: a folder of clips, images or arrays
    (also those of other programs), or a tensor (B, C, *grid), uint8 or in [0, 1]. `data` is the real data: a folder,
    shards, a Dataset, a tensor, or the folder of a run, which stands for its data. By default it is the held-out part
    (`data.validation`) of the data of training.

    - `num`: number of samples; by default as many as there are real ones, up to 2048.
    - `features`: the extractor: lite (default), transnet, self, inception, i3d=FILE, ... (see `rin_video.features`).
    - `given`: predict clips from their first `given` frames; adds errors and the recall of what moves.
    - `best_of`: with `given`, the number of samples per clip.
    - `split`: the part of the data to compare with; "auto" is the held-out part if there is one, or else all.
    - `codec`: "h264" writes clips to MP4 files as `rin-video sample` does, and evaluates the files. "none" evaluates
      the pixels. "auto" is "h264", or "none" for predictions and sizes that H.264 does not take.
    - `protocol`: a published protocol (`rin_video.evaluation.protocol`), which sets and checks the numbers.
    - `json`: file of the result. It is written before the samples are deleted.
    - `keep`: folder in which the samples are kept. `out`: folder of pictures and unfinished samples, by default
      `evaluation` in the folder of the run.
    - `download`: allow the extractor to download its weights.
    - `overrides`: options of sampling and reading, such as `["sample.steps=25", "data.stride=2"]`.

    An interrupted call resumes with the samples that it has drawn. All processes share the work, and each returns the
    result. Raises `UsageError` for invalid options, and if the samples or the data cannot be evaluated.
    """
    check_choices(split, codec)
    check_counts(num=(num, 2), given=(given, 1), best_of=(best_of, 1), max_batch=(max_batch, 1), seed=(seed, 0))
    limit: int | None = NUM  # of real samples
    if protocol is not None:
        wanted = published(protocol)
        num, features, limit = num or wanted.num, features or wanted.features, wanted.num_real
        given = wanted.given if given is None else given
        split = wanted.split if split == "auto" else split
        if wanted.given is not None and best_of == 1 and wanted.num_real is not None:
            best_of = max(num // wanted.num_real, 1)
    elif num is not None:
        limit = max(num // best_of, 1)
    check_best_of(num, given, best_of)
    check_source(source)
    device = choose_device(device)
    result = Evaluation()
    with tempfile.TemporaryDirectory() as own, ExitStack() as locked:
        scratch = Path(in_all(lambda: own)[0])  # the other processes read the files of the first
        model = open_model(source, overrides, device)
        folder = output_folder(out, model, scratch)
        in_all(lambda: check_outputs(folder, json) if is_first() else None)
        reference, shape = open_reference(model, source, data, split, overrides, Path(own))
        check_shape(shape, given)
        real = choose(reference.real, limit, reference.name, reference.classes)
        if given is not None:
            real = readable(real, result.warn)
        if model is None and given is not None:
            raise UsageError("--given requires a model, which predicts: pass the folder of a run instead of samples")
        learnable = reference.train if reference.train is not None else reference.real
        extractor = first_then_others(
            lambda: make_extractor(features or FEATURES, device=device, data=learnable, cache=folder, download=download)
        )
        place = None
        if model is None:
            samples = open_source(source, shape, num, reference.classes)
        else:
            count = len(real) * best_of if given is not None else num or len(real)
            plan = plan_drawing(model, real, shape, count, choose_codec(codec, shape, given), given, seed, max_batch)
            identity = identity_of(model, plan)
            place = Path(keep) if keep is not None else folder / f"samples-{digest_of(identity)}"
            in_all(lambda: locked.enter_context(lock_samples(place, identity)) if is_first() else None)
            with result.timed("sampling"):
                draw_samples(model.diffusion, plan, place, identity)
            samples = open_samples(place, shape, None, reference.classes)
        measured = measure(result, reference, real, samples, extractor, given, best_of)
        result.protocol = describe_protocol(model, reference, measured, extractor, shape, given, best_of, seed)
        unknown_model = model is None and not is_run(data)
        for text in doubts(num, reference, measured, unknown_model=unknown_model):
            result.warn(text)
        if protocol is not None:
            result.protocol["published"] = protocol
            for text in missing(protocol, result.protocol):
                result.warn(f"this is not the protocol {protocol}: {text}")

        def finish() -> None:
            if json is not None:
                result.save(json)
            if folder != scratch:
                write_pictures(folder, measured, given, "" if json is None else Path(json).stem)

        in_all(lambda: finish() if is_first() else None)  # all processes have read the samples
        locked.close()
        if place is not None and keep is None and is_first():
            shutil.rmtree(place, ignore_errors=True)
    return result


def check_choices(split: str, codec: str) -> None:
    """Raise `UsageError` for an unknown split or codec."""
    check_choice("--split", split, get_args(SplitOption))
    check_choice("--codec", codec, get_args(CodecOption))


def check_best_of(num: int | None, given: int | None, best_of: int) -> None:
    """Raise `UsageError` if the samples per clip do not fit the other numbers."""
    if best_of > 1 and given is None:
        raise UsageError(f"--best-of {best_of} is for predictions: add --given N, the number of known frames")
    if num is not None and given is not None and num % best_of:
        raise UsageError(f"--num is {num}, which is no multiple of --best-of {best_of}: use {num - num % best_of}")


def check_source(source: Any) -> None:
    """Raise `UsageError` if `source` is neither a path, a model nor samples (B, C, *grid)."""
    if isinstance(source, str | os.PathLike | GaussianDiffusion):
        return
    if not isinstance(source, Tensor | np.ndarray) or source.ndim not in (4, 5):
        what = f"of shape {tuple(source.shape)}" if isinstance(source, Tensor | np.ndarray) else type(source).__name__
        raise UsageError(f"the samples are {what}: pass a folder, a model, or a tensor (B, C, H, W) or (B, C, F, H, W)")


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return a device by name, or the best one; join the other processes. Raises `UsageError` if it is not there."""
    best = sampling_device()
    if device is None:
        return best
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device} cannot be used: {first_line(error)}") from None
    return torch.device(device)


def check_outputs(folder: Path, json: str | os.PathLike[str] | None) -> None:
    """Raise `UsageError` if the results cannot be written, to fail before any work."""
    check_folder(folder)
    if json is None:
        return
    if Path(json).suffix != ".json":
        raise UsageError(f"--json {json} is the name of the result: use one that ends in .json")
    if Path(json).is_dir():
        raise UsageError(f"--json {json} is a folder: add a name that ends in .json")
    check_folder(Path(json).parent)


def readable(samples: SampleSet, warn: Callable[[str], None]) -> SampleSet:
    """Return the samples of a set that can be read, and warn of the others."""
    kept, problems = [], []
    for number in range(len(samples)):
        try:
            samples.item(number)
            kept.append(number)
        except UsageError as error:  # noqa: PERF203
            problems.append(str(error))
    if problems:
        warn(f"{counted(len(problems), 'real sample')} could not be read: {problems[0]}")
    return samples.take(kept) if problems else samples


def measure(
    result: Evaluation,
    reference: Reference,
    real: SampleSet,
    samples: SampleSet,
    extractor: Extractor,
    given: int | None,
    best_of: int,
) -> Measured:
    """Add all scores to `result`, and warnings about what makes them unreliable."""
    for count, name in ((len(samples), "sample"), (len(real), "real sample")):
        if count < 2:
            raise UsageError(
                f"{real.name if name != 'sample' else samples.name} has {counted(count, name)}: an evaluation needs at "
                f"least 2, and {FEW} or more to say something"
            )
    train = others = None
    if reference.train is not None:
        train = choose(reference.train, max(NUM, len(real)), "training", reference.classes)
    if not reference.same_source:
        others = choose_others(real, len(real))
    with result.timed("features"):
        drawn = extract(extractor, samples, "the samples", strict=True, classify=True)
        true = extract(extractor, real, "real samples", classify=True)
        trained = None if train is None else extract(extractor, train, "training samples")
        further = None if others is None else extract(extractor, others, "further real samples")
    for features, part in ((drawn, samples), (true, real)):
        refuse_equal(features.views[scores.main_view(features)], part.name)
    if given is not None:  # predictions of the clips of one file are not independent
        drawn = dataclasses.replace(drawn, groups=real.groups[drawn.numbers % len(real)])
    pairs: list[tuple[int, int]] = []
    with result.timed("scores"):
        same = reference.same_source
        pool = scores.join(true, trained if same else further, same_files=not same)
        found = scores.distance_scores(drawn, true, pool, result.warn)
        found |= scores.coverage_scores(drawn, true, pool, result.warn)
        if given is None:
            found |= scores.class_scores(drawn, true, trained, reference.classes, result.warn)
        if trained is not None:
            try:
                memorised, pairs = scores.memorisation_scores(drawn, true, trained)
                found |= memorised
            except UsageError as error:  # held-out samples are in the training data
                result.warn(str(error))
        if given is not None:
            found |= prediction_scores(real, samples, given, best_of, result.warn)
    result.scores = found
    return Measured(samples, real, train, drawn, true, trained, pairs)


def doubts(num: int | None, reference: Reference, measured: Measured, *, unknown_model: bool) -> list[str]:
    """Return what makes the scores unreliable, one text each."""
    drawn, true, train = measured.sample_features, measured.real_features, measured.train
    texts = []
    if not reference.held_out:
        texts.append(
            f"{reference.name} may contain the data of training: a model that copies it has a perfect distance. Hold "
            "out a part with `rin-video train --validation 0.05`, or pass other --data"
        )
    elif unknown_model:
        texts.append(
            f"whether the samples' model was trained on {reference.name} is unknown: pass --data RUN to compare with "
            "the held-out part of its data"
        )
    least = min(len(drawn), len(true))
    if least < FEW:
        texts.append(f"{counted(least, 'sample')}: below {FEW}, scores say little; see the intervals")
    known = (
        ("samples", drawn, "real samples", true),
        ("real samples", true, "training samples", measured.train_features),
    )
    for name, one, kind, other in known:
        same = 0 if other is None else len(one.digests & other.digests)
        if same:
            texts.append(f"{same} of {len(one)} {name} are also {kind}, pixel by pixel")
    if num is not None and num > len(drawn):
        texts.append(f"{counted(len(drawn), 'sample')} instead of {num}: there are {len(true)} real ones to predict")
    if len(drawn) > len(true):
        texts.append(
            f"{len(drawn)} samples are compared with {len(true)} real ones, but the floor is that of equal numbers: it "
            "is somewhat too high"
        )
    files = len(set(true.groups.tolist()))
    if files < FEW_FILES:
        texts.append(f"the real samples are of {counted(files, 'file')}: the intervals are too narrow")
    for name, copies, count in (("samples", drawn.copies, len(drawn)), ("real samples", true.copies, len(true))):
        if copies:
            texts.append(f"{copies} of {count} {name} are copies of another one, pixel by pixel")
    if train is not None and len(train) < len(train.dataset):
        texts.append(f"memorisation is measured against {len(train)} of {len(train.dataset)} training samples")
    if true.unreadable:
        texts.append(f"{counted(len(true.unreadable), 'real sample')} could not be read: {true.unreadable[0]}")
    if skipped := getattr(reference.real, "skipped", None):
        texts.append(f"{counted(len(skipped), 'real file')} could not be used: {skipped[0][1]}")
    return texts


def prediction_scores(
    real: SampleSet, samples: SampleSet, given: int, best_of: int, warn: Callable[[str], None]
) -> dict[str, Score]:
    """Return the errors of predictions, and those of copying the last frame and of linear extrapolation.

    Sample i predicts real clip i modulo their number.
    """
    found, files = PredictionScores(given), real.groups
    with progress_bar(len(real), "predictions", "clip", disable=not is_first()) as bar:
        for start in range(0, len(real), CLIPS_AT_ONCE):
            rows = range(start, min(start + CLIPS_AT_ONCE, len(real)))
            truth = torch.stack([real.read(row) for row in rows])
            predicted = torch.stack(
                [torch.stack([samples.read(row + k * len(real)) for k in range(best_of)]) for row in rows]
            )
            found.update(truth.numpy(), predicted.numpy(), files[rows.start : rows.stop])
            bar.update(len(rows))
    computed = found.compute(resamples=scores.RESAMPLES)
    for note in found.notes:
        warn(f"prediction: {note}")
    return {
        f"prediction/{name}": Score.of(estimate, "lower" if "squared_error" in name else "higher", len(real))
        for name, estimate in computed.items()
    }


def open_source(source: Source, shape: tuple[int, ...], num: int | None, classes: list[str]) -> SampleSet:
    """Open the samples of another program, of `rin-video sample`, or in memory. Raises `UsageError` if they differ."""
    if isinstance(source, str | os.PathLike):
        return open_samples(source, shape, num, classes)
    assert isinstance(source, Tensor | np.ndarray)
    if tuple(source.shape[1:]) != tuple(shape):
        raise UsageError(f"the samples are {tuple(source.shape[1:])}, but the real ones are {tuple(shape)}")
    if num is not None and num > len(source):
        raise UsageError(f"there are {len(source)} samples, not {num}: use num={len(source)}, or draw more")
    return in_memory(source[:num], "the samples")
