"""Fixtures: small generated media files. The brightness of a frame encodes its number."""

import os
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType
from PIL import Image
from torch import Tensor

from rin_video.datasets.backends import torchcodec_problem

torch.set_num_threads(1)  # two threads are four times slower for the small tensors of these tests

STEP = 10  # difference in grey level between consecutive frames

# Codec and options by name. Each makes it difficult in another way to find frame i.
CLIPS: dict[str, dict] = {
    "plain.mp4": {},
    "short_gop.mp4": {"options": {"g": "4"}},
    "scene_cuts.mp4": {"options": {"g": "20", "bf": "2", "forced-idr": "1"}, "keyframes": (8, 9, 13)},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=6:min-keyint=6:scenecut=0:bframes=3"}},
    "odd.mkv": {"size": (33, 81), "options": {"profile": "high444", "qp": "0"}, "pix_fmt": "yuv444p"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"qscale": "1", "flags": "qscale"}},
    "b_frames.avi": {"codec": "libx264"},
    "variable_rate.mp4": {"times": [0, 1, 2, 5, 6, 10, 20, 21, 22, 30], "options": {"g": "3"}},
    "one_frame.mp4": {"frames": 1},
    "animation.gif": {"codec": "gif"},
    "animation.webp": {"codec": "webp"},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}, "size": (64, 64)},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le", "options": {"profile": "high10"}},
    "with_sound.mp4": {"sound": True},
    "turned.mp4": {"rotation": 90},
}


def write_numbered(
    path: Path,
    *,
    frames: int = 20,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (32, 64),
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    keyframes: Sequence[int] = (),
    rotation: int = 0,
    sound: bool = False,
    rate: int = 8,
    faststart: bool = False,
    container_format: str | None = None,
) -> Path:
    """Write a clip whose frame i has grey level STEP * (i + 1), a white upper left corner and a red lower left corner.

    `times` are in units of 1/30 s.
    """
    if codec in ("gif", "webp"):
        return _write_animation(path, frames, size)
    rate = 30 if times else rate
    muxing = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", format=container_format, options=muxing) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            _write_sound(container)
        for index in range(len(times) if times else frames):
            frame = av.VideoFrame.from_ndarray(_picture(index, size), format="rgb24")
            frame.pts, frame.time_base = times[index] if times else index, Fraction(1, rate)
            if index in keyframes:
                frame.pict_type = PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_numbers(frames: Tensor) -> list[int]:
    """Return the numbers that `write_numbered` encoded in frames (F, 3, H, W), read at the centre."""
    H, W = frames.shape[-2:]
    grey = frames[:, 0, H // 2 + 2 : H // 2 + 6, W // 2 + 2 : W // 2 + 6].float().mean(dim=(1, 2))
    return (grey / STEP - 1).round().int().tolist()


def _picture(index: int, size: tuple[int, int]) -> np.ndarray:
    H, W = size
    picture = np.full((H, W, 3), STEP * (index + 1), dtype=np.uint8)
    picture[: H // 4, : W // 4] = 255
    picture[-H // 4 :, : W // 4] = (200, 30, 30)
    return picture


def _write_sound(container: av.container.OutputContainer) -> None:
    track = container.add_stream("aac", rate=8000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 20000), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 8000, 0
    container.mux([*track.encode(frame), *track.encode(None)])


def _write_animation(path: Path, frames: int, size: tuple[int, int]) -> Path:
    first, *rest = [Image.fromarray(_picture(index, size)) for index in range(frames)]
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=120,
        loop=0,
        **({"lossless": True} if path.suffix == ".webp" else {}),
    )
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all CLIPS."""
    folder = tmp_path_factory.mktemp("clips")
    for name, how in CLIPS.items():
        write_numbered(folder / name, **how)
    if hasattr(os, "sched_setscheduler"):  # otherwise SVT-AV1 changes the process to real-time priority
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return folder


@pytest.fixture(
    params=[
        pytest.param("torchcodec", marks=pytest.mark.skipif(bool(torchcodec_problem()), reason=torchcodec_problem())),
        pytest.param("decord", marks=pytest.mark.skipif(not find_spec("decord"), reason="no decord")),
        "pyav",
        "pillow",
    ]
)
def decoder(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def numbered() -> Callable[..., Path]:
    return write_numbered


@pytest.fixture
def numbers() -> Callable[[Tensor], list[int]]:
    return frame_numbers


@pytest.fixture
def gradient() -> Tensor:
    """A smooth moving clip (3, 8, 32, 64) in [0, 1]."""
    frame, row, column = torch.meshgrid(*[torch.linspace(0, 1, n) for n in (8, 32, 64)], indexing="ij")
    return torch.stack([row, column, (frame + column) / 2])


@pytest.fixture(scope="session")
def hub() -> Any:
    """The Hugging Face package: `python -m pytest` makes our folder datasets/ importable, and hides it."""
    here = os.path.realpath(Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if os.path.realpath(entry or ".") != here])
        if not hasattr(sys.modules.get("datasets"), "load_dataset"):
            sys.modules.pop("datasets", None)  # a library that looks for theirs may have imported ours
        return pytest.importorskip("datasets")
