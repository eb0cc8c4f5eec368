"""An extractor that is quick to compute, registered as "means"."""

import torch

from rin_video.features import EXTRACTORS, Extractor


@EXTRACTORS.register("means")
class Means(Extractor):
    """Means of blocks of 8x8 pixels."""

    kinds, max_batch, digest = ("image", "video"), 16, "sha256:none"
    protocol = {"layer": "means"}  # noqa: RUF012

    def extract(self, x):
        x = x.float() / 255
        if x.ndim == 4:
            return {"image": x.unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2)).flatten(1)}
        blocks = x.unfold(3, 8, 8).unfold(4, 8, 8).mean((-1, -2))  # (B, C, F, H / 8, W / 8)
        frames = blocks.transpose(1, 2).flatten(2)
        return {"clip": blocks[:, :, ::3].flatten(1), "frame": frames, "motion": frames.diff(dim=1)}

    def probabilities(self, x):
        return torch.softmax(10 * x.float().flatten(2).mean(2) / 255, dim=1)
