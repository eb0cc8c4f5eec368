"""Features of clips from a network for images: of frames, of their differences, and a summary of both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rin_video.features.base import Extractor, as_pictures, difference_pictures, evenly_spaced, exact_inference

SUMMARY_WIDTH = 128  # numbers per part of the summary


class PictureExtractor(Extractor):
    """An extractor whose network takes pictures, uint8 (N, 3, H, W), and returns one vector (N, d) for each."""

    kinds: tuple[str, ...] = ("image", "video")
    max_batch = 16

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor:
        """Return the features (N, d) of uint8 pictures (N, 3, H, W) on the device."""

    def classify(self, pictures: Tensor) -> Tensor:
        """Return the class probabilities (N, classes) of uint8 pictures on the device, if the network has classes."""
        raise NotImplementedError

    def probabilities(self, x: Tensor) -> Tensor | None:
        """Return the class probabilities of images, or of clips (the mean over their frames); see `Extractor`."""
        if type(self).classify is PictureExtractor.classify:
            return None
        x = self.check(x)
        frames = x[:, :, None] if x.ndim == 4 else x[:, :, evenly_spaced(x.shape[2])]
        with exact_inference(self.device):
            return self.encode_frames(frames, self.classify).mean(1)

    def extract(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features by view; see `Extractor`."""
        if x.ndim == 4:
            return {"image": self.in_batches(self.encode, x)}
        frame = self.encode_frames(x[:, :, evenly_spaced(x.shape[2])])
        motion = self.encode_frames(difference_pictures(x))
        return {"clip": torch.stack([*map(summarise, frame, motion)]), "frame": frame, "motion": motion}

    def encode_frames(self, x: Tensor, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the features (B, f, d) of the frames of clips (B, 3, f, H, W), or the values of another network."""
        return self.in_batches(network or self.encode, as_pictures(x)).unflatten(0, (len(x), -1))


def summarise(frame: Tensor, motion: Tensor) -> Tensor:
    """Summarise the features of the frames (f, d) and motion pictures (g, d) of one clip in one vector, (640,).

    Its five parts of 128 numbers are random projections, with fixed seeds, of: the mean over frames (content), the mean
    absolute change from frame to frame (speed), the mean change weighted by time (direction), the mean of the motion
    features, and their mean absolute change (evenness of motion; 0 if there is one pair of frames).
    """
    steps, jumps = frame.diff(dim=0), motion.diff(dim=0) if len(motion) > 1 else torch.zeros_like(motion)
    time = torch.linspace(-1, 1, len(frame))[:, None]
    parts = [frame.mean(0), steps.abs().mean(0), (time * frame).mean(0), motion.mean(0), jumps.abs().mean(0)]
    return torch.cat([part @ projection(len(part), number) for number, part in enumerate(parts)])


@cache
def projection(width: int, number: int) -> Tensor:
    """Return a random projection (width, 128) that keeps lengths on average; NumPy guarantees these numbers."""
    values = np.random.RandomState(number).standard_normal((width, SUMMARY_WIDTH)) / SUMMARY_WIDTH**0.5
    return torch.from_numpy(values).float()


def resize(pictures: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize uint8 or float pictures (N, 3, H, W) to floats of `size`, with antialiasing; the range is kept."""
    pictures = pictures.float()
    if tuple(pictures.shape[-2:]) == size:
        return pictures
    return F.interpolate(pictures, size, mode=mode, antialias=True)
