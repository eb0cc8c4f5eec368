"""The interface of feature extractors: samples in, float32 features by view out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rin_video.errors import UsageError
from rin_video.registry import Registry

MAX_FRAMES, MAX_PAIRS = 8, 16  # frames of a clip, and pairs of consecutive frames, that an image network sees
INSTALL = "pip install 'rin-video[eval]'"


@dataclass(frozen=True)
class Request:
    """What an extractor is made from.

    `name` is as the user wrote it, and `argument` what follows its `=` (a file, folder or hub id; "" if nothing does).
    `data` is the dataset or function that "self" is trained on, and `cache` the folder for what is computed from it.
    """

    name: str
    argument: str = ""
    device: torch.device | str = "cpu"
    data: Any = None
    cache: Path | None = None
    download: bool = False


class Extractor(ABC):
    """Computes features of uint8 samples: images (B, 3, H, W) or clips (B, 3, F, H, W); 1 channel is repeated.

    A call returns float32 CPU features by view. Images have the view "image", (B, d). Clips have those of these views
    that the network supports:

    - "clip", (B, d): one vector for the complete clip, which depends on the order and the speed of its frames.
    - "frame", (B, f, d): single frames; all of up to 8, otherwise 8 evenly spaced ones.
    - "motion", (B, g, d): pictures of the difference of consecutive frames; all of up to 16, otherwise 16.

    The features of a sample do not depend on the other samples of a batch. Networks run in float32 without TF32, in
    batches of `max_batch` inputs, the last of which is padded.
    """

    name: str  # as the user wrote it
    digest: str  # "sha256:..." of the weights
    protocol: dict[str, Any]  # all that the features depend on, as JSON
    kinds: tuple[str, ...]  # samples that it accepts: "image", "video"
    max_batch: int  # inputs of a network at once

    def __init__(self, request: Request) -> None:
        self.name, self.device = request.name, torch.device(request.device)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of images or clips, by view; raise `UsageError` for samples that it cannot take."""
        x = self.check(x)
        with exact_inference(self.device):
            return self.extract(x)

    def probabilities(self, x: Tensor) -> Tensor | None:
        """Return the class probabilities (B, classes) of images, or of clips (the mean over their frames), or None.

        They are for the inception score; None means that the network is no classifier.
        """
        return None

    @abstractmethod
    def extract(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of checked samples with 3 channels."""

    def check(self, x: Tensor) -> Tensor:
        """Return the samples with 3 channels; raise `UsageError` if they do not suit the extractor."""
        if not isinstance(x, Tensor) or x.dtype != torch.uint8:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(f"{self.name}: the samples are {found}: pass a uint8 tensor (0 to 255)")
        if x.ndim not in (4, 5) or not x.numel():
            raise UsageError(
                f"{self.name}: the samples have shape {tuple(x.shape)}: pass images (B, C, H, W) or clips "
                "(B, C, F, H, W), at least one"
            )
        kind = "image" if x.ndim == 4 else "video"
        if kind not in self.kinds:
            words = {"image": "images", "video": "clips"}
            raise UsageError(
                f"{self.name} takes {words[self.kinds[0]]}, and the samples are {words[kind]}: use another extractor "
                f"(--features), such as {'lite' if kind == 'image' else 'lite or transnet'}"
            )
        if x.shape[1] not in (1, 3):
            raise UsageError(f"{self.name}: samples must have 1 or 3 channels, not {x.shape[1]}: convert them to RGB")
        if kind == "video" and x.shape[2] < 2:
            raise UsageError(f"{self.name}: clips need at least 2 frames: pass single frames as images (B, C, H, W)")
        return x.expand(x.shape[0], 3, *x.shape[2:])

    def in_batches(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Apply a network to (N, ...) in batches of exactly `max_batch`, padded with zeros; return float32 on the CPU.

        The size is fixed because kernels, and so the rounding, depend on it.
        """
        outputs = []
        for part in inputs.split(self.max_batch):
            batch = part.new_zeros(self.max_batch, *part.shape[1:])
            batch[: len(part)] = part
            outputs.append(network(batch.to(self.device))[: len(part)].float().cpu())
        return torch.cat(outputs)


EXTRACTORS: Registry[Callable[[Request], Extractor]] = Registry("feature extractor", "rin_video.features")


def evenly_spaced(length: int, most: int = MAX_FRAMES) -> list[int]:
    """Return the numbers 0 to length - 1, or `most` evenly spaced ones with both ends; of one, it is the middle."""
    if length <= most:
        return list(range(length))
    if most == 1:
        return [length // 2]
    return [(2 * i * (length - 1) + most - 1) // (2 * (most - 1)) for i in range(most)]


def spread_out(length: int, most: int = MAX_PAIRS) -> list[int]:
    """Return the numbers 0 to length - 1, or one from each of `most` equal parts.

    The place in a part varies, so that what repeats every 2, 3 or 4 frames, such as the seams between the tubes of a
    tokenizer, is seen in all its phases.
    """
    if length <= most:
        return list(range(length))
    bounds = [i * length // most for i in range(most + 1)]
    return [bounds[i] + i**3 // 7 % (bounds[i + 1] - bounds[i]) for i in range(most)]


def difference_pictures(x: Tensor) -> Tensor:
    """Return pictures of frame differences of clips (B, C, F, H, W), uint8 (B, C, g, H, W).

    They are 128 + floor((x[t + 1] - x[t]) / 2), for all t or 16 that are spread out.
    """
    pairs = torch.tensor(spread_out(x.shape[2] - 1), device=x.device)
    return ((x[:, :, pairs + 1].short() - x[:, :, pairs].short() + 256) // 2).to(torch.uint8)


def as_pictures(x: Tensor) -> Tensor:
    """Rearrange clips (B, C, f, H, W) to pictures (B * f, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


@contextmanager
def exact_math(device: torch.device) -> Iterator[None]:
    """Compute without autocast and TF32, and with deterministic cuDNN kernels, in the block."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            )
        yield


@contextmanager
def exact_inference(device: torch.device) -> Iterator[None]:
    """Compute as in `exact_math`, without gradients."""
    with torch.inference_mode(), exact_math(device):
        yield


def make_extractor(
    name: str,
    *,
    device: torch.device | str = "cpu",
    data: Any = None,
    cache: Path | None = None,
    download: bool = False,
) -> Extractor:
    """Return the extractor `name`, such as "lite", "i3d=FILE" or "videomae=FOLDER".

    `data` (a dataset, or a function that returns uint8 samples) is needed by "self" alone, which keeps what it learnt
    beside the data, or in the folder `cache`. Weights are downloaded only with `download`. Raises `UsageError` for an
    unknown name, and for weights that are missing or damaged.
    """
    kind, equals, argument = name.strip().partition("=")
    if equals and not argument:
        raise UsageError(f"--features {name}: nothing follows the equals sign: pass {kind}=FILE, or {kind} alone")
    factory = EXTRACTORS.get(kind)
    return factory(Request(name.strip(), argument, device, data, cache, download))


def refuse_argument(request: Request) -> None:
    """Raise `UsageError` if something follows the name of an extractor that takes nothing."""
    if request.argument:
        kind = request.name.partition("=")[0]
        raise UsageError(f"--features {request.name}: {kind} takes no file: pass {kind} alone")


def describe_pictures() -> dict[str, Any]:
    """Return the part of the protocol that all image networks share."""
    return {
        "frames": f"all, or {MAX_FRAMES} evenly spaced ones",
        "motion": f"128 + floor((x[t+1] - x[t]) / 2), of all pairs or {MAX_PAIRS} that are spread out",
    }
