"""Converts images or clips to shards of small files that load fast, by transcoding and cropping them once."""

from __future__ import annotations

import io
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rin_video.config import DataConfig, DataKind
from rin_video.datasets.clip_sampler import nearest_in_time
from rin_video.datasets.decoding import open_video
from rin_video.datasets.held_out import MANIFEST, file_key
from rin_video.datasets.images import make_resize_crop
from rin_video.datasets.index import Entry, make_index, refuse_skipped
from rin_video.datasets.probing import end_with_parent
from rin_video.datasets.reading import read_image
from rin_video.datasets.resize_crop import SampleRNG, decoder_size, resize
from rin_video.datasets.shards import write_shard
from rin_video.datasets.sources import shown
from rin_video.datasets.steady import is_steady, steady_clip
from rin_video.datasets.video_info import VideoInfo
from rin_video.errors import UsageError
from rin_video.files import write_text
from rin_video.media import VideoWriter, require_encoder
from rin_video.progress import progress_bar
from rin_video.wording import counted, in_bytes

FILES_PER_SHARD = 256
BLOCK = 64  # frames decoded at a time
KEY_EVERY = "8"  # frames per keyframe, which limits the frames decoded before a random start
QUALITY = 16  # CRF of H.264


@dataclass(frozen=True)
class Job:
    """The work for one shard."""

    path: Path
    root: str
    entries: list[Entry]
    kind: DataKind
    size: tuple[int, int]
    options: DataConfig


def prepare(
    root: str | PathLike[str],
    kind: DataKind,
    out: Path,
    size: tuple[int, int],
    options: DataConfig,
    *,
    workers: int,
    files_per_shard: int = FILES_PER_SHARD,
) -> list[str]:
    """Write every usable file at `size` (and `options.fps`), with class and caption, to `out/000000.tar`, ...

    If `options.crop` is "center", the pictures are cropped; if it is "random", they are only resized until they just
    cover `size`, and training crops them. Existing shards are kept. Returns a report. Raises `UsageError` if `out`
    contains shards that were made with other options, or if no file can be used.
    """
    index = make_index(root, kind, options, path=out / "source.jsonl", progress=True)
    index.require_some(options.strict)
    if kind == "video":
        require_encoder(out)
    entries = index.usable
    manifest = {
        "root": os.path.abspath(root),
        "kind": kind,
        "size": list(size),
        "fps": options.fps,
        "crop": options.crop,
        "files_per_shard": files_per_shard,
        "content": [entry.hash for entry in entries],
    }
    _check_manifest(out / MANIFEST, manifest)
    jobs = [
        Job(out / f"{i:06d}.tar", os.fspath(root), entries[start : start + files_per_shard], kind, size, options)
        for i, start in enumerate(range(0, len(entries), files_per_shard))
    ]
    left = [job for job in jobs if not job.path.exists()]
    failed: list[tuple[Any, str]] = list(index.unusable)
    start = time.perf_counter()
    with (
        ProcessPoolExecutor(
            max(1, workers),
            mp_context=get_context("spawn" if os.name == "nt" else None),
            initializer=end_with_parent,
        ) as pool,
        progress_bar(
            len(entries), "preparing", "file", initial=len(entries) - sum(len(job.entries) for job in left)
        ) as bar,
    ):
        running = {pool.submit(_write, job): job for job in left}
        for done in as_completed(running):
            failed += done.result()
            bar.update(len(running[done].entries))
    seconds = time.perf_counter() - start
    refuse_skipped(len(entries) - (len(failed) - len(index.unusable)), failed, options.strict)
    before, after = sum(e.bytes for e in entries), sum(job.path.stat().st_size for job in jobs)
    report = [
        f"{counted(len(entries), 'file')} in {counted(len(jobs), 'shard')} ({len(jobs) - len(left)} existed already), "
        f"{seconds:.1f} s",
        f"{in_bytes(before)} before, {in_bytes(after)} now",
    ]
    varying = 0 if kind == "image" or options.fps else sum(not is_steady(entry.info.times) for entry in entries)
    if varying:
        report.append(
            f"{varying} of {counted(len(entries), 'clip')} had a variable frame rate (resampled to the nearest frames)"
        )
    damaged = [(entry.source, sound_part(entry.info)) for entry in entries if getattr(entry.info, "lost", ())]
    report += [f"damaged: only frames {first} to {end - 1} of {shown(file)}" for file, (first, end) in damaged[:10]]
    return report + [f"skipped: {reason}" for _, reason in failed[:10]]


def sound_part(info: VideoInfo) -> tuple[int, int]:
    """Return (first, end) of the longest range of undamaged frames."""
    edges = [0, *info.lost, info.num_frames]
    return max(zip(edges[::2], edges[1::2], strict=True), key=lambda part: part[1] - part[0])


def loading_speed(dataset: Any, num: int = 64, seconds: float = 5.0) -> float:
    """Measure the samples per second of a dataset in this process."""
    dataset.draw(0, 0)
    start, count = time.perf_counter(), 0
    while count < num and time.perf_counter() - start < seconds:
        dataset.draw(count * 7919 % len(dataset), 1 + count // len(dataset))
        count += 1
    return count / (time.perf_counter() - start)


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    if path.exists():
        try:
            then = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{path} is damaged ({shown(str(error))}): use another --out") from None
        for key, value in manifest.items():
            if then.get(key) != value:
                what = "the files have changed" if key == "content" else f"{key} was {then.get(key)}, now it is {value}"
                raise UsageError(f"{path.parent} contains shards from another source ({what}): use another --out")
        return
    if any(path.parent.glob("*.tar")):
        raise UsageError(f"{path.parent} contains shards that prepare did not write: use another --out")
    write_text(path, json.dumps(manifest) + "\n")


def _write(job: Job) -> list[tuple[Any, str]]:
    """Write one shard; return (file, reason) of the files that could not be read."""
    torch.set_num_threads(1)
    files: dict[str, bytes] = {}
    failed = []
    for i, entry in enumerate(job.entries):
        key = f"{job.path.stem}{i:05d}"
        try:
            files |= {f"{key}{suffix}": content for suffix, content in _convert(entry, job).items()}
        except UsageError as error:
            failed.append((entry.source, str(error)))
            continue
        if entry.class_name:
            files[f"{key}.cls"] = entry.class_name.encode("utf-8", "backslashreplace")
        if entry.caption:
            files[f"{key}.txt"] = entry.caption.encode()
        about = {"source": shown(entry.source), "name": file_key(job.root, entry.source), "hash": entry.hash}
        files[f"{key}.json"] = json.dumps(about).encode()
    write_shard(job.path, files)
    return failed


def _convert(entry: Entry, job: Job) -> dict[str, bytes]:
    from PIL import Image

    resize_crop = make_resize_crop(job.size, DataConfig(crop="center"))
    params = resize_crop.draw_params(entry.info.size, SampleRNG(0).draw(0, 0))
    resize_only = job.options.crop == "random"
    if job.kind == "image":
        image = read_image(entry.source, at_least=job.size, max_pixels=job.options.max_pixels)
        pixels = resize(image, params.size) if resize_only else resize_crop.apply(image, params)
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "png")
        return {".png": buffer.getvalue()}
    info = entry.info
    indices, fps = steady_clip(info)
    if job.options.fps:
        fps = job.options.fps
        wanted = np.arange(max(1, round(info.duration * fps))) / fps
        indices = nearest_in_time(info.times, wanted)
    first, end = sound_part(info)
    indices = [index for index in indices if first <= index < end]
    with open_video(entry.source, job.options.decoder, info) as video:
        size = params.size if resize_only else decoder_size(params.size, info.size)
        blocks = (video.read(indices[i : i + BLOCK], size) for i in range(0, len(indices), BLOCK))
        file = job.path.with_name(f".{job.path.stem}.mp4")
        try:
            with VideoWriter(file, fps, crf=QUALITY, g=KEY_EVERY, bf="0") as writer:
                for block in blocks:
                    writer.write((block if resize_only else resize_crop.apply(block, params)).transpose(0, 1))
            return {".mp4": file.read_bytes()}
        finally:
            file.unlink(missing_ok=True)
