"""Finding the files of a data set, and the classes that its folders name."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path

from rin_video.datasets.shards import is_shards, list_shards, members_of
from rin_video.datasets.sources import Member, Source, shown
from rin_video.datasets.video_info import is_webp
from rin_video.errors import UsageError

log = logging.getLogger("rin_video")

IMAGE_EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".tga", ".qoi",
    ".heic", ".heif",
)  # fmt: skip
CLIP_EXTENSIONS = (
    ".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".m4v", ".3gp", ".3g2", ".qt", ".mpg", ".mpeg", ".ts", ".mts",
    ".m2ts", ".wmv", ".asf", ".ogv", ".flv",
)  # fmt: skip
ARRAY_EXTENSIONS = (".npy", ".safetensors")
KINDS = {"image": IMAGE_EXTENSIONS, "video": CLIP_EXTENSIONS, "array": ARRAY_EXTENSIONS}


def find_files(root: str | PathLike[str], extensions: Collection[str]) -> list[Path]:
    """The files below `root` (or `root` itself) with one of the extensions, sorted by their path below it.

    Upper and lower case count the same; hidden files and folders and links to folders are passed over; a WebP that
    moves is a clip. Raises UsageError where there is no such file.
    """
    return [source for source in find_sources(root, extensions) if isinstance(source, Path)]


def find_sources(
    root: str | PathLike[str],
    extensions: Collection[str],
    *,
    allow_pipe: bool = False,
    cache: Path | None = None,
    every: Sequence[Source] | None = None,
) -> list[Source]:
    """`find_files`, also among the members of tar shards: `root` may be a .tar, a pattern or a folder of them.

    `every` is what `all_sources` gives, where that is known.
    """
    every = all_sources(root, allow_pipe=allow_pipe, cache=cache) if every is None else every
    sources = [source for source in every if _is_of(source, extensions)]
    if sources:
        return sources
    advice = ""
    if extensions == CLIP_EXTENSIONS and (others := _count(every, IMAGE_EXTENSIONS)):
        advice = f"; it holds {others} images: leave out --frames to train on images"
    elif extensions == IMAGE_EXTENSIONS and (others := _count(every, CLIP_EXTENSIONS)):
        advice = f"; it holds {others} clips: use --frames 16 to train on clips"
    raise UsageError(f"{shown(os.fspath(root))} holds no {' '.join(extensions)} file{advice}{_links_advice(root)}")


def detect_kind(root: str | PathLike[str], *, allow_pipe: bool = False, cache: Path | None = None) -> str:
    """ "image", "video" or "array", whichever files `root` holds (a GIF is a clip). UsageError for several or none."""
    every = all_sources(root, allow_pipe=allow_pipe, cache=cache)
    counts = {kind: _count(every, extensions) for kind, extensions in KINDS.items()}
    if counts["image"] and counts["video"]:
        raise UsageError(
            f"{shown(os.fspath(root))} holds {counts['image']} images and {counts['video']} clips: "
            "say which to use, the clips (--frames 16, or --kind video) or the images (--frames 0, or --kind image)"
        )
    for kind in ("image", "video", "array"):
        if counts[kind]:
            return kind
    every_extension = " ".join(sum(KINDS.values(), ()))
    raise UsageError(f"{shown(os.fspath(root))} holds no {every_extension} file{_links_advice(root)}")


def class_labels(root: str | PathLike[str], files: Sequence[Source]) -> tuple[list[str], list[int]]:
    """The class names, sorted, and the class of every file.

    A class is a first folder below `root` (in a shard: of the member's name). There are classes only when every file
    is in such a folder and the folders are two or more; otherwise the list is empty and every label is -1.
    """
    return number_classes([first_folder(root, file) for file in files])


def number_classes(names: Sequence[str | None]) -> tuple[list[str], list[int]]:
    """Class names of all files as the sorted names and numbers; no classes where a file has none, or all the same."""
    classes = sorted({name for name in names if name})
    if len(classes) < 2 or not all(names):
        return [], [-1] * len(names)
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[name] for name in names if name]


def first_folder(root: str | PathLike[str], source: Source) -> str | None:
    """The first folder below `root` on the way to a file, or None."""
    if isinstance(source, Member):
        parts = Path(source.name).parts[:-1]
    else:
        parts = Path(str(source)).relative_to(root).parts[:-1] if source != Path(root) else ()
    return parts[0] if parts else None


def all_sources(root: str | PathLike[str], *, allow_pipe: bool = False, cache: Path | None = None) -> list[Source]:
    """Every file that is not hidden below a folder, or every member of the shards."""
    if is_shards(root):
        shards = list_shards(root, allow_pipe=allow_pipe, cache=cache)
        return [member for shard in shards for member in members_of(shard)[0]]
    if not os.fspath(root):
        raise UsageError("the name of the data is empty: give a folder, a file or shards")
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UsageError(f"there is no file or folder {shown(root)}")
    files: list[tuple[str, Path]] = []
    length = len(root.as_posix()) + 1 if root != Path(".") else 0

    def unreadable(error: OSError) -> None:
        said = f"the folder {shown(str(error.filename))} cannot be read ({error.strerror})"
        if Path(error.filename) == root:
            raise UsageError(said) from None
        _say_once(f"{said}: what is in it is left out")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [
            (path.as_posix()[length:], path)
            for path in (Path(folder, name) for name in names if not name.startswith("."))
        ]
    return [path for _, path in sorted(files)]


@lru_cache(maxsize=1024)
def _say_once(text: str) -> None:
    log.warning("%s", text)


def _links_advice(root: str | PathLike[str]) -> str:
    folder = Path(root)
    has_links = folder.is_dir() and any(path.is_symlink() and path.is_dir() for path in folder.iterdir())
    return "; links to folders are not followed: give the folder itself" if has_links else ""


def _is_of(source: Source, extensions: Collection[str]) -> bool:
    suffix = source.suffix.lower()
    if suffix == ".webp" and (extensions in (CLIP_EXTENSIONS, IMAGE_EXTENSIONS)):
        try:
            return is_webp(source, moving=True) == (extensions == CLIP_EXTENSIONS)
        except UsageError:
            return extensions == IMAGE_EXTENSIONS
    return suffix in extensions


def _count(sources: Sequence[Source], extensions: Collection[str]) -> int:
    return sum(_is_of(source, extensions) for source in sources)
