"""The file name extensions of images, clips and arrays."""

from __future__ import annotations

from rin_video.config import DataKind
from rin_video.files import ARRAY_SUFFIXES

IMAGE_EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".tga", ".qoi",
    ".heic", ".heif",
)  # fmt: skip
CLIP_EXTENSIONS = (
    ".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".m4v", ".3gp", ".3g2", ".qt", ".mpg", ".mpeg", ".ts", ".mts",
    ".m2ts", ".wmv", ".asf", ".ogv", ".flv",
)  # fmt: skip
KINDS: dict[DataKind, tuple[str, ...]] = {
    "image": IMAGE_EXTENSIONS,
    "video": CLIP_EXTENSIONS,
    "array": ARRAY_SUFFIXES,
}
COMPANIONS = (".txt", ".cls", ".json", *ARRAY_SUFFIXES)  # files with further data of the sample of the same name
