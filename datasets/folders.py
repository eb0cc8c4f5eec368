"""Finding the files of a data set, and the classes that its folders name."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeVar

from rin_video.errors import UsageError

T = TypeVar("T")

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
CLIP_EXTENSIONS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".m4v")


def find_files(root: str | PathLike[str], extensions: Collection[str]) -> list[Path]:
    """The files below `root` (or `root` itself) with one of the extensions, sorted by their path below it.

    Upper and lower case count the same; hidden files and folders and links to folders are passed over. Raises
    UsageError where there is no such file.
    """
    root = Path(root)
    files = [file for file in _all_files(root) if file.suffix.lower() in extensions]
    if files:
        return files
    advice = ""
    if extensions == CLIP_EXTENSIONS and (others := _count(root, IMAGE_EXTENSIONS)):
        advice = f"; it holds {others} images: leave out --frames to train on images"
    elif extensions == IMAGE_EXTENSIONS and (others := _count(root, CLIP_EXTENSIONS)):
        advice = f"; it holds {others} clips: use --frames 16 to train on clips"
    raise UsageError(f"{root} holds no {' '.join(extensions)} file{advice}")


def probe_files(files: Sequence[Path], probe: Callable[[Path], T]) -> tuple[dict[Path, T], list[tuple[Path, str]]]:
    """What `probe` finds in every file, and the files for which it raises UsageError, with the reason.

    Raises UsageError with the first few reasons where no file is left.
    """
    found: dict[Path, T] = {}
    skipped: list[tuple[Path, str]] = []
    for file in files:
        try:
            found[file] = probe(file)
        except UsageError as error:  # noqa: PERF203
            skipped.append((file, str(error)))
    if not found:
        reasons = "; ".join(reason for _, reason in skipped[:3])
        raise UsageError(f"none of {len(skipped)} files can be used: {reasons}" if len(skipped) > 1 else reasons)
    return found, skipped


def detect_kind(root: str | PathLike[str]) -> str:
    """ "image" or "video", whichever files `root` holds (a GIF is a clip). UsageError for both or none."""
    root = Path(root)
    num_images, num_clips = _count(root, IMAGE_EXTENSIONS), _count(root, CLIP_EXTENSIONS)
    if num_images and num_clips:
        raise UsageError(
            f"{root} holds {num_images} images and {num_clips} clips: "
            "say which to use, --frames 16 for the clips or --frames 0 for the images"
        )
    find_files(root, IMAGE_EXTENSIONS + CLIP_EXTENSIONS)
    return "image" if num_images else "video"


def class_labels(root: str | PathLike[str], files: Sequence[Path]) -> tuple[list[str], list[int]]:
    """The class names, sorted, and the class of every file.

    A class is a first folder below `root`. There are classes only when every file is in such a folder and the folders
    are two or more; otherwise the list is empty and every label is -1.
    """
    folders = [file.relative_to(root).parts[:-1] for file in files] if Path(root).is_dir() else []
    classes = sorted({parts[0] for parts in folders if parts})
    if len(classes) < 2 or not all(folders):
        return [], [-1] * len(files)
    return classes, [classes.index(parts[0]) for parts in folders]


def _count(root: Path, extensions: Collection[str]) -> int:
    return sum(file.suffix.lower() in extensions for file in _all_files(root))


def _all_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UsageError(f"there is no file or folder {root}")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())
