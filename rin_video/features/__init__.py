"""Feature extractors by name, for the distances between samples and data."""

from rin_video.features import lite
from rin_video.features.base import EXTRACTORS, Extractor, Request, make_extractor

__all__ = ["EXTRACTORS", "Extractor", "Request", "lite", "make_extractor"]
