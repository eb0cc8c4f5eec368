"""Discovery of the files of a dataset, and of the classes that its folders name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path

from rin_video.config import DataKind
from rin_video.datasets.extensions import CLIP_EXTENSIONS, COMPANIONS, IMAGE_EXTENSIONS, KINDS
from rin_video.datasets.shards import is_shards, list_shards, members_of
from rin_video.datasets.sources import Member, Source, open_source, shown
from rin_video.datasets.video_info import is_webp
from rin_video.errors import UsageError
from rin_video.wording import counted

log = logging.getLogger("rin_video")

TRAINING = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev", "eval")
TEST = ("test", "testing")
SPLITS = (*TRAINING, *VALIDATION, *TEST)
FEW = 0.1  # up to this share of animated GIFs, a folder counts as images
PREPARED = ("index.jsonl", "source.jsonl", "prepare.json")  # what `rin-video prepare` writes beside shards
FRAMES = 8  # least number of consecutively numbered files that may be the frames of a clip


def find_files(root: str | PathLike[str], extensions: Collection[str]) -> list[Path]:
    """Return the files below `root` (or `root` itself) with one of the extensions, sorted by relative path.

    Extensions are case-insensitive. Hidden files, hidden folders and links to folders are skipped. An animated WebP is
    a clip. Raises `UsageError` if there is no such file.
    """
    return [source for source in find_sources(root, extensions) if isinstance(source, Path)]


def find_sources(
    root: str | PathLike[str], extensions: Collection[str], *, allow_pipe: bool = False, cache: Path | None = None
) -> list[Source]:
    """Like `find_files`, but `root` may also be tar shards: a .tar file, a pattern, or a folder of .tar files."""
    return split_sources(root, extensions, allow_pipe=allow_pipe, cache=cache)[0]


def split_sources(
    root: str | PathLike[str], extensions: Collection[str], *, allow_pipe: bool = False, cache: Path | None = None
) -> tuple[list[Source], list[Source]]:
    """Return the sources of `find_sources`, and the other files, which do not belong to any of these sources."""
    every = all_sources(root, allow_pipe=allow_pipe, cache=cache)
    sources = [source for source in every if _is_of(source, extensions)]
    if sources:
        others: list[Source] = []
        if len(every) > len(sources):  # avoid the work for a large folder with files of one kind only
            taken, keys = set(map(id, sources)), set(map(_key, sources))
            others = [
                source for source in every
                if id(source) not in taken and not (source.suffix.lower() in COMPANIONS and _key(source) in keys)
            ]  # fmt: skip
        named = extensions == IMAGE_EXTENSIONS and "frame" in os.path.basename(str(sources[0])).lower()
        if named and (row := numbered_rows(sources)):
            _warn_once(
                f"{shown(os.fspath(root))}: {_describe_row(row)}; they are used as separate images. {MAKE_CLIPS}"
            )
        if is_shards(root) and Path(root).is_dir():  # such as a list or table next to the shards
            others += [path for path in sorted(Path(root).iterdir()) if path.is_file() and path.suffix != ".tar"]
            others = [other for other in others if os.path.basename(str(other)) not in PREPARED]
        return sources, [other for other in others if not os.path.basename(str(other)).startswith(".")]
    advice = ""
    if extensions == CLIP_EXTENSIONS and (images := [one for one in every if _is_of(one, IMAGE_EXTENSIONS)]):
        advice = f"; it contains {counted(len(images), 'image')}: leave out --frames (index and prepare: --kind image)"
        if row := numbered_rows(images):
            advice += f". Also, {_describe_row(row)}. {MAKE_CLIPS}"
    elif extensions == IMAGE_EXTENSIONS and (clips := _count(every, CLIP_EXTENSIONS)):
        advice = f"; it contains {counted(clips, 'clip')}: use --frames 16 (index and prepare: --kind video)"
    raise UsageError(f"{shown(os.fspath(root))} contains no {' '.join(extensions)} file{advice}{_links_advice(root)}")


def detect_kind(root: str | PathLike[str], *, allow_pipe: bool = False, cache: Path | None = None) -> DataKind:
    """Return the kind of the files in `root`: "image", "video" or "array".

    A GIF is a clip if it is animated; a few of them among images (10 %, or one) are ignored. Raises `UsageError` if
    there are no such files, or both images and clips.
    """
    every = all_sources(root, allow_pipe=allow_pipe, cache=cache)
    counts = {kind: _count(every, extensions) for kind, extensions in KINDS.items()}
    stray = (
        max(FEW * counts["image"], 1) if counts["image"] > 1 else 0
    )  # at least one GIF, if there are two images or more
    animated = counts["video"] <= stray and all(
        source.suffix.lower() == ".gif" for source in every if _is_of(source, CLIP_EXTENSIONS)
    )
    if counts["image"] and counts["video"] and not animated:
        raise UsageError(
            f"{shown(os.fspath(root))} contains {counted(counts['image'], 'image')} and "
            f"{counted(counts['video'], 'clip')}: choose the clips (--frames 16; index and prepare: --kind video) or "
            "the images (--frames 0, --kind image)"
        )
    for kind in KINDS:
        if counts[kind]:
            return kind
    every_extension = " ".join(sum(KINDS.values(), ()))
    raise UsageError(f"{shown(os.fspath(root))} contains no {every_extension} file{_links_advice(root)}")


def class_labels(root: str | PathLike[str], files: Sequence[Source]) -> tuple[list[str], list[int]]:
    """Return the sorted class names, and the class of every file.

    The class of a file is its first folder below `root`; in a shard, the first folder of its name. There are classes
    only if there are at least two such folders and they contain at least half of the files. Otherwise the list is empty
    and every label is -1.
    """
    return number_classes([first_folder(root, file) for file in files])


def number_classes(names: Sequence[str | None]) -> tuple[list[str], list[int]]:
    """Convert the class name of every file to a sorted list of names and a number per file, -1 for files without class.

    There are no classes if there is only one name, or if most files have none. Files without class are logged.
    """
    classes = sort_classes({name for name in names if name})
    without = sum(not name for name in names)
    if not are_classes(names):
        if len(classes) > 1:
            listed = f"{', '.join(map(shown, classes[:3]))}{', ...' * (len(classes) > 3)}"
            _warn_once(
                f"{without} of {counted(len(names), 'file')} are outside the folders {listed}: "
                "the folders are not used as classes"
            )
        return [], [-1] * len(names)
    if without:
        _warn_once(f"{without} of {counted(len(names), 'file')} are in no class folder and get no label")
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[name] if name else -1 for name in names]


def are_classes(names: Sequence[str | None]) -> bool:
    """Return whether the class names of files are used: two or more, for half of the files or more."""
    return len({name for name in names if name}) > 1 and 2 * sum(not name for name in names) <= len(names)


def relabel(names: Sequence[str | None], classes: Sequence[str]) -> list[int]:
    """Return the number of each class name in `classes`, and -1 for a file without class, or if there are no classes.

    Raises `UsageError` if a name is not one of the classes.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({name for name in names if name and name not in numbers}) if classes else []
    if unknown:
        listed = f"{', '.join(map(shown, classes[:8]))}{', ...' * (len(classes) > 8)}"
        raise UsageError(
            f"the validation data has the class {shown(unknown[0])}, which the training data has not (its classes are "
            f"{listed}): rename that folder, or move its files out of it to use them without label"
        )
    return [numbers.get(name, -1) if name else -1 for name in names]


def sort_classes(names: Collection[str]) -> list[str]:
    """Sort class names alphabetically, or by value if all are integers."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def refuse_splits(root: str | PathLike[str], names: Collection[str | None]) -> None:
    """Raise `UsageError` if the folders are splits of a dataset (such as train and test), not classes."""
    splits = sorted(name for name in names if name)
    if len(splits) < 2 or None in names or not {name.lower() for name in splits} <= set(SPLITS):
        return
    train = next((name for name in splits if name.lower().startswith("train")), None)
    if train is not None:
        way = f"use one of them, {shown(os.path.join(root, train))}"
        if is_shards(root):
            way = "write each split to shards of its own, in folders of these names"
        raise UsageError(
            f"{shown(os.fspath(root))} contains the splits {', '.join(map(shown, splits))}, not classes: {way}"
        )


RUN = "run.json"  # in the folder of a training run, whose samples are not data
MAKE_CLIPS = "If they are frames, convert each folder to a clip: rin-video export FOLDER clip.mp4"


def numbered_rows(sources: Sequence[Source]) -> list[Path]:
    """Return the first file of each folder if all files of each are numbered consecutively; otherwise an empty list."""
    rows: dict[Path, list[tuple[str, int, Path]]] = {}
    for source in sources:
        found = re.fullmatch(r"(.*?)(\d+)", source.stem) if isinstance(source, Path) else None
        if found is None or not isinstance(source, Path):
            return []
        rows.setdefault(source.parent, []).append((found[1], int(found[2]), source))
    for row in rows.values():
        numbers = sorted(number for _, number, _ in row)
        if len(row) < FRAMES or len({name for name, _, _ in row}) > 1 or numbers[-1] - numbers[0] + 1 != len(row):
            return []
    return [min(row, key=lambda one: one[1])[2] for row in rows.values()]


def _describe_row(row: Sequence[Path]) -> str:
    folders = "its files are" if len(row) == 1 else f"in each of {len(row)} folders the files are"
    return f"{folders} numbered consecutively (starting with {shown(row[0])})"


def _key(source: Source) -> str:
    """Return the part of a file's name that it shares with its companion files."""
    if isinstance(source, Member):
        return f"{source.shard}:{source.key}"
    return os.path.splitext(str(source))[0]


def first_folder(root: str | PathLike[str], source: Source) -> str | None:
    """Return the first folder of a file's path below `root`, or None."""
    if isinstance(source, Member):
        parts = Path(source.name).parts[:-1]
    else:
        parts = Path(str(source)).relative_to(root).parts[:-1] if source != Path(root) else ()
    return parts[0] if parts else None


def all_sources(root: str | PathLike[str], *, allow_pipe: bool = False, cache: Path | None = None) -> list[Source]:
    """Return all files below a folder that are not hidden, or all members of the shards.

    Raises `UsageError` if `root` is empty, does not exist or cannot be read.
    """
    if is_shards(root):
        shards = list_shards(root, allow_pipe=allow_pipe, cache=cache)
        return [member for shard in shards for member in members_of(shard)[0]]
    if not os.fspath(root):
        raise UsageError("the path of the data is empty: pass a folder, a file or shards")
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UsageError(f"there is no file or folder {shown(root)}")
    files: list[tuple[str, Path]] = []
    length = len(root.as_posix()) + 1 if root != Path(".") else 0

    def unreadable(error: OSError) -> None:
        message = f"the folder {shown(str(error.filename))} cannot be read ({error.strerror})"
        if Path(error.filename) == root:
            raise UsageError(message) from None
        _warn_once(f"{message}: its files are skipped")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in [name for name in subfolders if os.path.isfile(os.path.join(folder, name, RUN))]:
            subfolders.remove(name)
            _warn_once(f"{shown(os.path.join(folder, name))} is the folder of a training run and is skipped")
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                link = os.path.join(folder, name)
                target = shown(os.path.realpath(link))
                _warn_once(f"{shown(link)} is a link to the folder {target} and is not followed")
        files += [
            (path.as_posix()[length:], path)
            for path in (Path(folder, name) for name in names if not name.startswith("."))
        ]
    return [path for _, path in sorted(files)]


@lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _links_advice(root: str | PathLike[str]) -> str:
    folder = Path(root)
    has_links = folder.is_dir() and any(path.is_symlink() and path.is_dir() for path in folder.iterdir())
    return "; links to folders are not followed: pass the folder itself" if has_links else ""


def _is_of(source: Source, extensions: Collection[str]) -> bool:
    suffix = source.suffix.lower()
    if suffix == ".gif" and extensions in (CLIP_EXTENSIONS, IMAGE_EXTENSIONS):
        return _is_still_gif(source) == (extensions == IMAGE_EXTENSIONS)
    if suffix == ".webp" and (extensions in (CLIP_EXTENSIONS, IMAGE_EXTENSIONS)):
        try:
            return is_webp(source, moving=True) == (extensions == CLIP_EXTENSIONS)
        except UsageError:
            return extensions == IMAGE_EXTENSIONS
    return suffix in extensions


def _is_still_gif(source: Source) -> bool:
    """Return whether a GIF has a single frame; False if it cannot be read."""
    when = source.stat().st_mtime_ns if isinstance(source, Path) and source.is_file() else 0
    return _has_one_frame(source, when)


@lru_cache(maxsize=1 << 16)
def _has_one_frame(source: Source, modified: int) -> bool:
    from PIL import Image

    try:
        with open_source(source) as file, Image.open(file, formats=["GIF"]) as image:
            return not image.is_animated
    except Exception:  # Pillow's plug-ins raise any error; the reader will report it
        return False


def _count(sources: Sequence[Source], extensions: Collection[str]) -> int:
    return sum(_is_of(source, extensions) for source in sources)
