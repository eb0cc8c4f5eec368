"""The extractor "inception": the Inception-v3 of the Frechet inception distance (FID)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from rin_video.errors import UsageError, first_line
from rin_video.features.base import EXTRACTORS, Request, describe_pictures
from rin_video.features.files import file_digest, optional_import, read_state, require_file
from rin_video.features.pictures import PictureExtractor

DIGEST = "sha256:6726825d"  # how the digest of the published weights begins; it is part of their file name


@EXTRACTORS.register("inception")
class Inception(PictureExtractor):
    """torch-fidelity's Inception-v3, with the weights of the original FID (Heusel et al. 2017), converted.

    `inception=FILE` reads the weights from a file (`weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, or
    the same file under pytorch-fid's name). `inception` alone uses torch-fidelity's download, if it is in the cache of
    torch.hub or `download` is set.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        module = optional_import("torch_fidelity.feature_extractor_inceptionv3", "inception")
        path = (
            require_file(request.argument, request.name)
            if request.argument
            else downloaded(module.URL_INCEPTION_V3, download=request.download)
        )
        self.network = make_network(module, path).to(self.device)
        self.digest = file_digest(path)
        self.protocol = {
            "network": "Inception-v3 of FID (torch-fidelity)",
            "published_weights": self.digest.startswith(DIGEST),
            "size": [299, 299],
            "resize": "bilinear as in TensorFlow 1, without antialiasing",
            "mean": [128 / 255] * 3,
            "std": [128 / 255] * 3,
            "layer": "global average pooling, 2048 features",
            **describe_pictures(),
        }

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the pooled features, (N, 2048)."""
        return self.network(pictures)[0]

    def classify(self, pictures: Tensor) -> Tensor:
        """Return the class probabilities (N, 1008), from the logits without bias as in the inception score."""
        return self.network(pictures)[1].softmax(1)


def make_network(module: Any, path: Path) -> torch.nn.Module:
    """Return torch-fidelity's network with the weights of a file.

    Its constructor loads any file with pickle. It is given a copy of the tensors that were read safely.
    """
    state, copy = read_state(path), io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        network: torch.nn.Module = module.FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
        )
    except RuntimeError:
        raise UsageError(f"{path} holds no weights of FID's Inception-v3: use torch-fidelity's file") from None
    return network


def downloaded(url: str, *, download: bool) -> Path:
    """Return the file of the weights in the cache of torch.hub; download it there only if that is allowed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        if not download:
            raise UsageError(
                "--features inception: its weights (95 MB) are not on this machine: pass --download, or get "
                f"{url} and pass --features inception=FILE"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=DIGEST.partition(":")[2])
        except (URLError, OSError, RuntimeError) as error:
            raise UsageError(
                f"{url} could not be downloaded ({first_line(error)}): try again, or pass a file"
            ) from None
    return path
