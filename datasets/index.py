"""The index of a dataset: the properties of every file, probed once and stored as JSON lines, one per file."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from rin_video.config import DataConfig, DataKind, DecoderOption
from rin_video.datasets.array_files import ArrayInfo, probe_array
from rin_video.datasets.backends import torchcodec_problem
from rin_video.datasets.decoding import LostFramesError, Video, backends_for
from rin_video.datasets.extensions import KINDS
from rin_video.datasets.folders import first_folder, number_classes, refuse_splits, split_sources
from rin_video.datasets.probe import probe_video
from rin_video.datasets.probing import beat, run_in_subprocess
from rin_video.datasets.reading import ImageInfo, probe_image
from rin_video.datasets.shards import companion, companions, is_shards, members_of, read_text
from rin_video.datasets.sources import Member, Source, decode_text, open_source, shown, size_of
from rin_video.datasets.video_info import MAX_PIXELS, VideoInfo
from rin_video.errors import TimeLimitError, TransientError, UsageError
from rin_video.files import atomic_write
from rin_video.progress import progress_bar
from rin_video.wording import counted, in_bytes

log = logging.getLogger("rin_video")

VERSION = 2
INFOS: dict[DataKind, type] = {"image": ImageInfo, "video": VideoInfo, "array": ArrayInfo}
CAPTION_LENGTH = 10_000
SAVE_EVERY = 60.0  # seconds between saves, so that an interrupted run keeps its results
MANY = 1000  # number of files from which indexing takes a while and is logged
NOTES = 20  # at most this many lines about single files


@dataclass
class Entry:
    """The index entry of one file."""

    source: Source
    bytes: int
    modified: int  # modification time in nanoseconds; for a member, of its shard
    info: Any = None  # ImageInfo, VideoInfo or ArrayInfo; None if the file cannot be used
    error: str | None = None  # why it cannot be used
    hash: str = ""  # of the content
    class_name: str | None = None
    caption: str | None = None
    limit: float = 0.0  # the time limit in seconds that probing exceeded; 0: it did not


@dataclass(frozen=True)
class Probe:
    """A function that probes a file in a subprocess and returns (info, content hash)."""

    kind: DataKind
    cuts: bool = False
    max_pixels: int = MAX_PIXELS
    decoder: DecoderOption = "auto"  # or decord, which must be tested on each file

    def __call__(self, source: Source) -> tuple[Any, str]:
        """Probe a file; return its info and the hash of its content. Raises `UsageError` if it cannot be used."""
        if self.kind == "image":
            info: Any = probe_image(source, max_pixels=self.max_pixels)
        elif self.kind == "array":
            info = probe_array(source)
        else:
            info = self._video(source)
        return info, content_hash(source)

    def warm_up(self) -> None:
        """Import the libraries before the first file, so that imports do not count towards its time limit."""
        if self.kind == "video":
            import av  # noqa: F401

            torchcodec_problem()
        elif self.kind == "image":
            import PIL.Image

            PIL.Image.init()

    def _video(self, source: Source) -> VideoInfo:
        """Return the result of `probe_video`, with the first decoder that can read the file on this machine."""
        from dataclasses import replace

        info = probe_video(source, cuts=self.cuts, max_pixels=self.max_pixels)
        with Video(source, info, backends_for(info, self.decoder, strict=False)) as video:
            for index in (0, info.num_frames // 2, info.num_frames - 1):
                with suppress(LostFramesError):  # only clips with these frames are affected
                    video.read([index])
            return replace(info, decoder=video.backend)


class Index:
    """The entries of a dataset, sorted by name; `ignored` has the files of other kinds."""

    def __init__(self, root: str | PathLike[str], entries: Sequence[Entry], ignored: Sequence[Source] = ()) -> None:
        self.root, self.entries, self.ignored = root, list(entries), list(ignored)

    @property
    def usable(self) -> list[Entry]:
        """The entries of the files that can be used."""
        return [entry for entry in self.entries if entry.error is None]

    @property
    def unusable(self) -> list[tuple[Source, str]]:
        """(file, reason) of the files that cannot be used."""
        return [(entry.source, entry.error) for entry in self.entries if entry.error is not None]

    def require_some(self, strict: bool) -> None:
        """Raise `UsageError` if no file can be used or, with `strict`, if any file cannot be used."""
        refuse_skipped(len(self.usable), self.unusable, strict)

    def describe(self) -> str:
        """Return a summary in a few lines: counts, durations, codecs, duplicates, unusable files."""
        good = self.usable
        lines = [
            f"{len(good)} of {counted(len(self.entries), 'file')} can be used, {in_bytes(sum(e.bytes for e in good))}"
        ]
        videos = [entry.info for entry in good if isinstance(entry.info, VideoInfo)]
        if videos:
            seconds = sum(info.duration for info in videos)
            lines.append(f"{counted(sum(info.num_frames for info in videos), 'frame')}, {seconds:.1f} s")
            kinds = ("container", "codec", "decoder")
            lines += [f"{kind}: {_counted(getattr(info, kind) for info in videos)}" for kind in kinds]
            if any(info.cuts is not None for info in videos):
                lines.append(f"scene cuts: {sum(len(info.cuts or ()) for info in videos)}")
            lines += [f"frames per second: {_counted(f'{info.fps:.4g}' for info in videos)}"]
            notes = [f"{shown(entry.source)}: {note}" for entry in good for note in getattr(entry.info, "notes", ())]
            lines += notes[:NOTES] + (describe_notes(videos) if len(notes) > NOTES else [])
        classes, _ = number_classes([entry.class_name for entry in good])
        lines += [f"classes: {_counted(entry.class_name for entry in good)}"] if classes else []
        lines += [f"captions: {n}"] if (n := sum(entry.caption is not None for entry in good)) else []
        copies = len(good) - len({entry.hash for entry in good})
        lines += [counted(copies, "duplicate")] if copies else []
        notes = [f"{shown(entry.source)}: {note}" for entry in good for note in getattr(entry.info, "notes", ())]
        lines += notes[:NOTES] if good and isinstance(good[0].info, ImageInfo) else []
        return "\n".join(lines + describe_skipped(self.unusable, limit=20) + self.describe_ignored(limit=20))

    def describe_ignored(self, limit: int = 3) -> list[str]:
        """Return a line about the files of other kinds, or no line if there are none."""
        if not self.ignored:
            return []
        kinds = _counted(other.suffix.lower() or "no extension" for other in self.ignored)
        names = ", ".join(shown(Path(str(other)).name) for other in self.ignored[:limit])
        more = ", ..." if len(self.ignored) > limit else ""
        return [f"ignored: {counted(len(self.ignored), 'file')} of other kinds ({kinds}): {names}{more}"]

    def save(self, path: Path, probe: Probe) -> None:
        """Write the index file atomically; several processes may do so at the same time.

        Raises `UsageError` if it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                atomic_write(path, unique=True, durable=False) as temporary,
                temporary.open("w", encoding="ascii", newline="\n") as file,
            ):
                file.write(json.dumps(_header(self.root, probe)) + "\n")
                file.writelines(json.dumps(_to_row(entry)) + "\n" for entry in self.entries)
        except OSError as error:
            reason = f"the index {shown(path)} cannot be written ({error.strerror})"
            raise UsageError(f"{reason}: use another --out") from error


def load_index(path: Path, root: str | PathLike[str], probe: Probe) -> dict[str, list[Any]]:
    """Return the rows of an index file by file name; empty if it is damaged or was made for other data or limits."""
    width, info_width = len(fields(Entry)), len(fields(INFOS[probe.kind]))
    try:
        with path.open(encoding="ascii") as file:
            if json.loads(file.readline()) != _header(root, probe):
                return {}
            rows = {row[0]: row for row in map(json.loads, file)}
        complete = all(len(row) == width and (row[3] is None or len(row[3]) == info_width) for row in rows.values())
        return rows if complete else {}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}


def index_path_for(path: Path, root: str | PathLike[str]) -> Path:
    """Return `path`, or another path next to it if that file indexes other data, which may have taken an hour."""
    try:
        with path.open(encoding="ascii") as file:
            other = json.loads(file.readline())["root"] != os.path.abspath(root)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return path
    digest = hashlib.blake2b(os.path.abspath(root).encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return path.with_name(f"{path.stem}-{digest}{path.suffix}") if other else path


def entry_of(source: Source, row: list[Any], info_of: type) -> Entry:
    """Convert a row of `load_index` to the entry of its file."""
    entry = Entry(source, *row[1:])
    if entry.info is not None:
        # Bypass __init__, which takes four times as long in a frozen dataclass: an index may have very many entries.
        values = [tuple(value) if type(value) is list else value for value in row[3]]
        entry.info = object.__new__(info_of)
        vars(entry.info).update(zip(info_of.__dataclass_fields__, values, strict=True))  # type: ignore[attr-defined]
    return entry


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection in the block, which creates no garbage; it would take half of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def make_index(
    root: str | PathLike[str],
    kind: DataKind,
    options: DataConfig | None = None,
    *,
    path: Path | None = None,
    progress: bool = False,
) -> Index:
    """Probe every file that is new or has changed since the index file `path` was written, then update that file.

    `kind` is image, video or array. Subprocesses probe the files, with a limit of `options.read_timeout` seconds per
    file. Raises `UsageError` if there are no files, or if the folders are splits.
    """
    options = options or DataConfig()
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    path = path and index_path_for(path, root)
    sources, others = split_sources(
        root, KINDS[kind], allow_pipe=options.allow_pipe, cache=path.parent / "pipes" if path else None
    )
    decoder: DecoderOption = "decord" if kind == "video" and options.decoder == "decord" else "auto"
    probe = Probe(kind, options.avoid_cuts and kind == "video", options.max_pixels, decoder)
    entries, changed = [], []
    modified: dict[Path, tuple[int, int]] = {}
    with gc_paused():
        known = load_index(path, root, probe) if path else {}
        by_key = _companions_of(root, sources)
        for source in sources:
            size, when = _state(source, modified)
            row = known.get(str(source))
            if row and row[1:3] == [size, when] and not 0 < row[-1] < options.read_timeout:
                entry = entry_of(source, row, INFOS[kind])
            else:
                entry = Entry(source, size, when)
                changed.append(entry)
            entry.class_name, entry.caption = _class_and_caption(root, source, by_key)
            entries.append(entry)
    refuse_splits(root, {entry.class_name for entry in entries})
    if progress and len(changed) >= MANY:
        alone = f"`rin-video index {os.fspath(root)}`"
        kept = f"the index is saved ({alone} only indexes)" if path else f"the index is not saved: {alone} saves it"
        log.info("indexing %s; %s", counted(len(changed), "file"), kept)
    passing: set[int] = set()  # entries with errors that are not the file's fault, which are not saved
    saved = time.monotonic()

    def save() -> None:
        found = [e for e in entries if (e.info is not None or e.error is not None) and id(e) not in passing]
        if path:
            Index(root, found).save(path, probe)

    with progress_bar(len(changed), "indexing", "file", delay=2, disable=not progress) as bar:
        try:
            for i, result in run_in_subprocess(
                [entry.source for entry in changed], probe, seconds=options.read_timeout
            ):
                if isinstance(result, UsageError):
                    changed[i].error = str(result)
                    changed[i].limit = options.read_timeout if isinstance(result, TimeLimitError) else 0.0
                    passing.update([id(changed[i])] if isinstance(result, TransientError) else [])
                else:
                    changed[i].info, changed[i].hash = result
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    save()
                    saved = time.monotonic()
        finally:
            if changed or len(known) != len(entries):
                save()
    index = Index(root, entries, others)
    if is_shards(root):
        index.entries += [
            Entry(Member(shard, name, 0, 0), 0, 0, error=reason)
            for shard in sorted({source.shard for source in sources if isinstance(source, Member)})
            for name, reason in members_of(shard)[1]
        ]
    return index


def content_hash(source: Source) -> str:
    """Return the 128-bit BLAKE2b hash of a file's content, as hex."""
    digest = hashlib.blake2b(digest_size=16)
    with open_source(source) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            beat()
    return digest.hexdigest()


def refuse_skipped(num_usable: int, skipped: Sequence[tuple[Source, str]], strict: bool) -> None:
    """Raise a `UsageError` with the first reasons if no file is usable or, with `strict`, if any was skipped."""
    if num_usable and not (strict and skipped):
        return
    reasons = "; ".join(reason for _, reason in skipped[:3])
    total = num_usable + len(skipped)
    if num_usable:
        raise UsageError(
            f"{len(skipped)} of {counted(total, 'file')} cannot be used, and data.strict is true: {reasons}"
        )
    raise UsageError(f"none of {total} files can be used: {reasons}" if total > 1 else reasons)


def describe_notes(infos: Sequence[VideoInfo]) -> list[str]:
    """Return a line for each kind of note (HDR, damaged, ...) with the number of clips that have it."""
    counts = Counter(note.split(":")[0] for info in infos for note in info.notes)
    return [f"{note}: {count} of {len(infos)}" for note, count in counts.most_common()]


def describe_skipped(skipped: Sequence[tuple[Source, str]], limit: int = 3) -> list[str]:
    """Return a line for each of the first `limit` skipped files, with the reason, and one for the rest."""
    lines = [f"skipped: {reason}" for _, reason in skipped[:limit]]
    more = len(skipped) - limit
    return lines + ([f"skipped: {more} more, {len(skipped)} in total"] if more > 0 else [])


def _header(root: str | PathLike[str], probe: Probe) -> dict[str, Any]:
    kinds: tuple[Any, ...] = (Entry, INFOS[probe.kind])
    columns = [[field.name for field in fields(kind)] for kind in kinds]
    return {"version": VERSION, "root": os.path.abspath(root), **vars(probe), "columns": columns}


def _to_row(entry: Entry) -> list[Any]:
    """Return the values of an entry, in the order of its fields, with those of its info as a nested list."""
    info = None if entry.info is None else list(vars(entry.info).values())
    return [str(entry.source), entry.bytes, entry.modified, info, *list(vars(entry).values())[4:]]


def _state(source: Source, seen: dict[Path, tuple[int, int]]) -> tuple[int, int]:
    path = source.shard if isinstance(source, Member) else Path(str(source))
    if path not in seen:
        try:
            state = path.stat()
            seen[path] = (state.st_size, state.st_mtime_ns)
        except OSError:  # a broken link
            seen[path] = (0, 0)
    size, when = seen[path]
    return (size_of(source) if isinstance(source, Member) else size), when


def _companions_of(root: str | PathLike[str], sources: Sequence[Source]) -> dict[tuple[Path, str], dict[str, Member]]:
    shards = sorted({source.shard for source in sources if isinstance(source, Member)})
    return companions([member for shard in shards for member in members_of(shard)[0]])


def _class_and_caption(
    root: str | PathLike[str], source: Source, by_key: dict[tuple[Path, str], dict[str, Member]]
) -> tuple[str | None, str | None]:
    """Return (class, caption) of a file: its folder, or `.cls` in a shard; the text of its `.txt` file."""
    name = first_folder(root, source)
    if isinstance(source, Member):
        class_file, text_file = (companion(by_key, source, suffix) for suffix in (".cls", ".txt"))
        name = name if class_file is None else read_text(class_file)
        return name, None if text_file is None else read_text(text_file)
    text = Path(str(source)).with_suffix(".txt")
    try:
        with text.open("rb") as file:
            return name, decode_text(file.read(CAPTION_LENGTH))
    except OSError:
        return name, None


def _counted(values: Iterator[Any]) -> str:
    counts = Counter(str(value) for value in values)
    return ", ".join(f"{shown(name)} {count}" for name, count in counts.most_common(20))
