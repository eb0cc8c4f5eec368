"""Draws the samples of an evaluation into a folder, in chunks; an interrupted evaluation resumes after the last one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rin_video.config import SampleConfig
from rin_video.datasets.batch import collate
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.errors import UsageError
from rin_video.evaluation.sets import SampleSet
from rin_video.files import write_text
from rin_video.media import DEFAULT_FPS, as_pixels, sample_files, save_samples
from rin_video.progress import progress_bar
from rin_video.ranks import is_first
from rin_video.training.distributed import in_all, join_process_group
from rin_video.training.locking import LOCK, lock_run

MANIFEST = "drawing.json"  # in the folder of the samples: the options that they were drawn with
SUFFIXES = {"h264": ".mp4", "png": ".png", "none": ".npy"}


class Drawing(NamedTuple):
    """How samples are drawn: their number, the seed, and the conditions that come from real samples."""

    num: int
    seed: int
    config: SampleConfig
    shape: tuple[int, ...]
    codec: str  # "h264" (MP4), "png" or "none" (uint8 arrays)
    max_batch: int = 16
    titles: list[str] | None = None  # the class of each sample, which becomes a part of its file's name
    conditions: SampleSet | None = None  # real samples; sample i takes its conditions from item i modulo their number
    given: int | None = None  # the number of known frames at the start of a clip, which `conditions` provides
    embedding: bool = False  # whether the model takes embeddings, which `conditions` provides
    labels: bool = False  # whether the samples take the labels of `conditions`


def draw_samples(diffusion: GaussianDiffusion, plan: Drawing, folder: Path, identity: dict[str, Any]) -> list[Path]:
    """Draw samples into `folder`, one file per sample; return the files.

    Complete chunks of an interrupted call are kept. `identity` describes the model and the options. With several
    processes, each draws a part of the chunks. Raises `UsageError` if the folder has samples of another identity.
    """
    in_all(lambda: check_identity(folder, identity))
    state = join_process_group()
    rank, num_ranks = state.process_index, state.num_processes
    in_all(lambda: write_identity(folder, identity) if is_first() else None)
    todo = [chunk for number, chunk in enumerate(chunks(plan, folder)) if number % num_ranks == rank]
    left = [chunk for chunk in todo if not all(path.is_file() for path in chunk.paths)]
    done = sum(len(chunk.rows) for chunk in todo) - sum(len(chunk.rows) for chunk in left)
    total = sum(len(chunk.rows) for chunk in todo)
    with progress_bar(total, "sampling", "sample", initial=done, disable=not is_first()) as bar:
        for chunk in left:
            write_chunk(draw_chunk(diffusion, plan, chunk), chunk, plan)
            bar.update(len(chunk.rows))
    in_all(lambda: None)  # wait for the files of all processes
    return sample_files(folder, plan.num, SUFFIXES[plan.codec], plan.titles)


class Chunk(NamedTuple):
    """Samples that are drawn in one batch: their numbers and their files."""

    rows: range
    paths: list[Path]


def chunks(plan: Drawing, folder: Path) -> Iterator[Chunk]:
    """Yield the batches of all samples."""
    files = sample_files(folder, plan.num, SUFFIXES[plan.codec], plan.titles)
    for start in range(0, plan.num, plan.max_batch):
        rows = range(start, min(start + plan.max_batch, plan.num))
        yield Chunk(rows, files[rows.start : rows.stop])


def draw_chunk(diffusion: GaussianDiffusion, plan: Drawing, chunk: Chunk) -> Tensor:
    """Draw one batch (B, C, *grid) in [0, 1]; sample i of a seed is the same in any chunk."""
    options: dict[str, Any] = {}
    if plan.conditions is not None:
        batch = collate([plan.conditions.item(row % len(plan.conditions)) for row in chunk.rows])
        if plan.embedding:
            options["embedding"] = batch.embedding
        if plan.labels:
            options["label"] = batch.label
        if plan.given is not None:
            options["context"] = batch.x[:, :, : plan.given]
    return diffusion.sample(
        plan.config,
        batch_size=len(chunk.rows),
        shape=plan.shape,
        seed=plan.seed,
        first_index=chunk.rows.start,
        **options,
    )


def write_chunk(samples: Tensor, chunk: Chunk, plan: Drawing) -> None:
    """Write each sample to its file."""
    if not torch.isfinite(samples).all():
        raise UsageError(
            f"samples {chunk.rows.start} to {chunk.rows.stop - 1} contain NaN or infinity: check the run with "
            "`rin-video diagnose`"
        )
    fps = plan.config.fps or DEFAULT_FPS
    for sample, path in zip(as_pixels(samples.cpu()), chunk.paths, strict=True):
        save_samples(sample[None], path, fps=fps) if plan.codec != "none" else write_array(sample, path)


def write_array(sample: Tensor, path: Path) -> None:
    """Write one sample (C, *grid) as an array without a batch axis."""
    import numpy as np

    from rin_video.files import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, unique=True, durable=False) as temporary:
        np.save(temporary, sample.numpy())


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raise `UsageError` if a folder has other files, or samples that were drawn with other options."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose a folder for the samples")
    if all(path.name == LOCK for path in folder.iterdir()):
        return
    try:
        then = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"{folder} has other files: choose a new or empty folder for the samples") from None
    differing = [key for key in {**then, **identity} if then.get(key) != identity.get(key)]
    if differing:
        key = differing[0]
        raise UsageError(
            f"{folder} has samples that were drawn with {key}={then.get(key)}, now it is {identity.get(key)}: choose "
            "another folder"
        )


@contextmanager
def lock_samples(folder: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Keep other processes from drawing into `folder`. Raises `UsageError` if one does, or as `check_identity` does."""
    check_identity(folder, identity)
    with lock_run(folder, "drawing samples"):
        yield


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write the options that the samples of a folder are drawn with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MANIFEST, json.dumps(identity, indent=1) + "\n")
