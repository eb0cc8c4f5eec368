"""The extractor "i3d=FILE": the TorchScript file of an I3D network that scripts for the FVD use."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rin_video.errors import UsageError, first_line
from rin_video.features.base import EXTRACTORS, Extractor, Request
from rin_video.features.files import file_digest, require_file


@EXTRACTORS.register("i3d")
class I3D(Extractor):
    """An I3D network (Carreira and Zisserman 2017) for the Frechet video distance (Unterthiner et al. 2018).

    The file is the `i3d_torchscript.pt` of StyleGAN-V (Skorokhodov et al. 2022), whose function takes `(x,
    rescale=True, resize=True, return_features=True)` with clips (B, 3, F, H, W) from 0 to 255, and returns 400 numbers
    per clip; it resizes to 224 x 224 itself. A TorchScript file runs code: pass files from sources that you trust.
    """

    kinds: tuple[str, ...] = ("video",)
    max_batch = 4

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        if not request.argument:
            raise UsageError(
                "--features i3d: name the TorchScript file of the network (i3d_torchscript.pt, as in StyleGAN-V): "
                "--features i3d=FILE"
            )
        self.path = require_file(request.argument, request.name)
        self.digest = file_digest(self.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, and the file is one
                self.network = torch.jit.load(str(self.path), map_location=self.device).eval()
        except (RuntimeError, OSError, ValueError) as error:
            raise UsageError(f"{self.path} cannot be read as TorchScript ({first_line(error)[:80]})") from None
        self.protocol = {
            "network": "I3D, TorchScript",
            "size": "as in the file (224 x 224 in StyleGAN-V's)",
            "resize": "as in the file (bilinear without antialiasing in StyleGAN-V's)",
            "mean": "as in the file",
            "std": "as in the file",
            "layer": "return_features=True (400 logits in StyleGAN-V's)",
            "frames": "all",
        }

    def extract(self, x: Tensor) -> dict[str, Tensor]:
        """Return the view "clip", (B, d)."""
        return {"clip": self.in_batches(self.encode, x)}

    def encode(self, x: Tensor) -> Tensor:
        """Return the features of uint8 clips (B, 3, F, H, W)."""
        try:
            y = self.network(x.float(), rescale=True, resize=True, return_features=True)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            F, H, W = x.shape[2:]
            raise UsageError(
                f"{self.path} cannot take clips of {F} frames of {H} x {W}: use longer clips, or a file that takes (x, "
                f"rescale, resize, return_features) ({' '.join(str(error).split())[-100:]})"
            ) from None
        if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(x):
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UsageError(f"{self.path} returns {found}, not one vector per clip: it is no extractor for the FVD")
        return y
