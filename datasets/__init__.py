"""Datasets for training: folders and shards of images, clips and arrays; installed as `rin_video.datasets`."""

from rin_video.datasets.arrays import ArrayFolder
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.decoding import Video, open_video
from rin_video.datasets.extensions import CLIP_EXTENSIONS, IMAGE_EXTENSIONS
from rin_video.datasets.folders import detect_kind, find_files
from rin_video.datasets.images import ImageFolder

__all__ = [
    "CLIP_EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "ArrayFolder",
    "ClipFolder",
    "ImageFolder",
    "Video",
    "detect_kind",
    "find_files",
    "open_video",
]
