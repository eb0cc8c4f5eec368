"""The extractors "videomae=NAME" and "transformers=NAME": models of the library transformers, for images or clips."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rin_video.errors import UsageError, first_line
from rin_video.features.base import (
    EXTRACTORS,
    Extractor,
    Request,
    as_pictures,
    describe_pictures,
    evenly_spaced,
    exact_inference,
)
from rin_video.features.files import file_digest, optional_import
from rin_video.features.pictures import PictureExtractor, resize
from rin_video.files import HUB
from rin_video.hub import HUB_ID, plain_errors
from rin_video.wording import counted

FILES = [
    "config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model-*.safetensors",
]
INDEX = "model.safetensors.index.json"
FILTERS = {2: "bilinear", 3: "bicubic"}  # numbers of Pillow


@EXTRACTORS.register("videomae")
def make_videomae(request: Request) -> Extractor:
    """Return a VideoMAE (Tong et al. 2022) from a folder or the hub."""
    return open_pretrained(request, "videomae")


@EXTRACTORS.register("transformers")
def make_pretrained(request: Request) -> Extractor:
    """Return any model of transformers for images or clips, from a folder or the hub."""
    return open_pretrained(request)


def open_pretrained(request: Request, model_type: str | None = None) -> Extractor:
    """Return a model for images or clips from a folder, or from the hub's cache; downloads only if that is allowed.

    Raises `UsageError` if there is no such model, its weights are not complete or no safetensors, or it draws random
    numbers.
    """
    kind = request.name.partition("=")[0]
    if not request.argument:
        raise UsageError(f"--features {kind}: name a folder or a model of the hub: --features {kind}=NAME")
    transformers = optional_import("transformers", kind)
    try:
        transformers.AutoModel  # noqa: B018  # triggers the lazy import of its dependencies
    except Exception as error:
        raise UsageError(
            f"transformers cannot be imported ({first_line(error)}): run rin-video from a folder without `tokenizers` "
            "or `datasets`"
        ) from error
    folder = find_folder(request)
    pretrained = Pretrained(request, folder)
    if model_type not in (None, pretrained.model.config.model_type):
        raise UsageError(
            f"{request.argument} is a {pretrained.model.config.model_type}, not a {model_type}: pass --features "
            f"transformers={request.argument}"
        )
    extractor = PretrainedVideo(request, pretrained) if pretrained.num_frames else PretrainedImage(request, pretrained)
    pretrained.check_deterministic()
    return extractor


class Pretrained:
    """A model of transformers with the size, mean, standard deviation and filter of its image processor.

    Its features are the class token of the last layer if the network has one, otherwise the mean over the tokens; for
    models of images and texts, the embedding of the image. Poolers are not used, since many checkpoints lack them.
    Pictures are resized to the input size as a whole, without the crop of some processors.
    """

    def __init__(self, request: Request, folder: Path) -> None:
        self.name, self.device = request.name, torch.device(request.device)
        self.digest = file_digest(*weight_files(folder))
        self.model, processor = load_model(folder, request.argument)
        self.model = self.model.float().eval().requires_grad_(False).to(self.device)
        config = self.model.config
        self.num_frames: int = getattr(config, "num_frames", 0) or getattr(config, "frames_per_clip", 0)
        self.size = find_size(config, processor)
        self.mean, self.std = (list(getattr(processor, name, None) or []) for name in ("image_mean", "image_std"))
        if not getattr(processor, "do_normalize", True) or not self.mean:
            self.mean, self.std = [0.0] * 3, [1.0] * 3
        self.filter = FILTERS.get(int(getattr(processor, "resample", None) or 2), "bilinear")
        self.has_class_token = any("cls_token" in key or "class_embedding" in key for key in self.model.state_dict())
        self.encode_image: Callable[..., Any] | None = getattr(self.model, "get_image_features", None)

    def normalise(self, pictures: Tensor) -> Tensor:
        """Resize and normalise uint8 pictures (N, 3, H, W)."""
        mean, std = (torch.tensor(value, device=pictures.device)[:, None, None] for value in (self.mean, self.std))
        return (resize(pictures, self.size, self.filter).clamp(0, 255) / 255 - mean) / std

    def encode(self, values: Tensor) -> Tensor:
        """Return the features (B, d) of normalised pictures (B, 3, H, W) or clips (B, F, 3, H, W)."""
        if self.encode_image is not None:
            y = self.encode_image(pixel_values=values)
            return y if isinstance(y, Tensor) else y.pooler_output
        y = self.model(**{self.model.main_input_name: values}).last_hidden_state
        if y.ndim == 4:  # a convolutional network: (B, d, H, W)
            return y.mean((2, 3))
        return y[:, 0] if self.has_class_token else y.mean(1)

    def check_deterministic(self) -> None:
        """Raise `UsageError` if two passes differ, as those of networks that mask at random do."""
        shape = (1, self.num_frames, 3, *self.size) if self.num_frames else (1, 3, *self.size)
        values = torch.linspace(-1, 1, torch.Size(shape).numel(), device=self.device).reshape(shape)
        try:
            with exact_inference(self.device), torch.random.fork_rng(devices=[]):
                first, second = self.encode(values), self.encode(values)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UsageError(f"{self.name} is no model for images or clips ({first_line(error)[:160]})") from None
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
            raise UsageError(f"{self.name} draws random numbers (a masked pass?): use another model")

    def describe(self) -> dict[str, Any]:
        """Return the protocol."""
        token = "class token" if self.has_class_token else "mean over the tokens"
        return {
            "network": f"{type(self.model).__name__} of transformers",
            "size": list(self.size),
            "resize": f"{self.filter}, antialiased",
            "mean": self.mean,
            "std": self.std,
            "layer": "image embedding" if self.encode_image is not None else f"{token} of the last layer",
        }


class PretrainedImage(PictureExtractor):
    """Features of pictures from a model of transformers."""

    def __init__(self, request: Request, pretrained: Pretrained) -> None:
        super().__init__(request)
        self.pretrained, self.digest = pretrained, pretrained.digest
        self.protocol = pretrained.describe() | describe_pictures()

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the features (N, d) of uint8 pictures (N, 3, H, W)."""
        return self.pretrained.encode(self.pretrained.normalise(pictures))


class PretrainedVideo(Extractor):
    """Features of clips from a model of transformers, which takes a fixed number of frames."""

    kinds: tuple[str, ...] = ("video",)
    max_batch = 4

    def __init__(self, request: Request, pretrained: Pretrained) -> None:
        super().__init__(request)
        self.pretrained, self.digest = pretrained, pretrained.digest
        self.protocol = pretrained.describe() | {"frames": f"{pretrained.num_frames} evenly spaced frames"}

    def check(self, x: Tensor) -> Tensor:
        """Return the samples with 3 channels; raise `UsageError` if the clips are too short."""
        x = super().check(x)
        if x.shape[2] < self.pretrained.num_frames:
            raise UsageError(
                f"{self.name} takes {self.pretrained.num_frames} frames, and the clips have {x.shape[2]}: use longer "
                "clips or another extractor (--features)"
            )
        return x

    def extract(self, x: Tensor) -> dict[str, Tensor]:
        """Return the view "clip", (B, d)."""
        return {"clip": self.in_batches(self.encode, x[:, :, evenly_spaced(x.shape[2], self.pretrained.num_frames)])}

    def encode(self, x: Tensor) -> Tensor:
        """Return the features of uint8 clips (B, 3, F, H, W)."""
        values = self.pretrained.normalise(as_pictures(x))
        return self.pretrained.encode(values.unflatten(0, (len(x), -1)))


def load_model(folder: Path, name: str) -> tuple[Any, Any]:
    """Return the model and the image processor of a folder, without network, pickle or code of the folder."""
    from transformers import AutoImageProcessor, AutoModel

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model, report = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **local)
            processor = AutoImageProcessor.from_pretrained(folder, **local)
    except Exception as error:  # the library raises all kinds of errors for files that it cannot read
        raise UsageError(f"{name} cannot be loaded by transformers: {first_line(error)[:160]}") from None
    missing = [str(key) for key in report["missing_keys"] if "pooler" not in str(key)]
    missing += [str(key[0]) for key in report["mismatched_keys"]]
    if missing:
        raise UsageError(
            f"{name} lacks {counted(len(missing), 'tensor')} of its network, such as {min(missing)}: its weights are "
            "not complete"
        )
    return model, processor


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers in the block."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def find_folder(request: Request) -> Path:
    """Return the folder of a model: the one that the user named, or that of the hub's cache."""
    source = request.argument.removeprefix(HUB)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    match = HUB_ID.match(source)
    if match is None:
        raise UsageError(
            f"--features {request.name}: there is no folder {source}: pass a folder, or a hub id user/name"
        )
    from huggingface_hub import errors, snapshot_download

    repo, revision = match["repo"], match["revision"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FILES, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        if not request.download:
            raise UsageError(
                f"--features {request.name}: there is no folder {source}, and the hub's cache does not have it: pass "
                "--download, or a folder"
            ) from None
    with plain_errors(repo, revision, "fetched"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FILES))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model; raise `UsageError` if there are none."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        paths = []
    if not paths or not all(path.is_file() for path in paths):
        raise UsageError(f"{folder} has no complete model.safetensors: save the model with save_pretrained")
    return paths


def find_size(config: Any, processor: Any) -> tuple[int, int]:
    """Return the input size (H, W): that of the processor's crop, of the model's config, or of the processor."""
    sizes = [getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", None) else None]
    sizes += [getattr(getattr(config, "vision_config", config), "image_size", None), getattr(processor, "size", None)]
    for size in sizes:
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple):
            return int(size[0]), int(size[1])
        if size is not None:
            size = dict(size)
            sides = [size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge")]
            if sides[0] and sides[1]:
                return int(sides[0]), int(sides[1])
    raise UsageError("the model states no input size (image_size in its config.json): it cannot be used")
