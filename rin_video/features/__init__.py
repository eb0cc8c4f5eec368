"""Feature extractors by name, for the distances between samples and data. A module registers those that it defines."""

from rin_video.features import huggingface, i3d, inception, lite, self_trained, transnet  # noqa: F401
from rin_video.features.base import EXTRACTORS, Extractor, Request, make_extractor

__all__ = ["EXTRACTORS", "Extractor", "Request", "make_extractor"]
