"""A demo dataset of MP4 files: coloured, shaded shapes move in front of a moving background; the class is the shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

# The signed distance to each shape of radius 1 (negative inside), by name.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(y - 0.6, np.abs(x) * math.sqrt(0.75) - y / 2 - 0.6),
}


def render_clip(shape: str, size: int, frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render a uint8 clip (3, F, size, size) of a shape; `rng` draws its colours, path, rotation and background."""
    time = np.arange(frames, dtype=np.float32)[:, None, None] / 16  # roughly in seconds
    rows, columns = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2, indexing="ij")
    radius = rng.uniform(0.2, 0.28)
    row, column = _path(time, radius, rng)
    y, x = (rows - row) / radius, (columns - column) / radius
    angle = 0 if shape == "circle" else rng.uniform(0, 2 * math.pi) + rng.uniform(-1.5, 1.5) * time
    across, down = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    cover = np.clip(0.5 - SHAPES[shape](across, down) * radius * size, 0, 1)[..., None]

    light = 0.85 + 0.35 * np.clip(-(x + y) / 2, -1, 1)[..., None]  # from the upper left
    body = _colour(rng.uniform(), 0.85, 1.0) * light
    ground = _background(rows, columns, time, rng)
    video = cover * body + (1 - cover) * ground
    return np.ascontiguousarray((255 * np.clip(video, 0, 1) + 0.5).astype(np.uint8).transpose(3, 0, 1, 2))


def _path(time: Array, radius: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the centre (row, column) over time: it bounces off the walls, circles, swings, or falls and bounces."""
    low, span = radius + 0.02, 1 - 2 * (radius + 0.02)
    phase, speed = rng.uniform(0, 2, 2), rng.uniform(0.25, 0.6, 2) * rng.choice([-1, 1], 2)
    motion = rng.integers(4)
    if motion == 0:
        row, column = (np.abs((phase[i] + speed[i] * time) % 2 - 1) for i in range(2))
    elif motion == 1:
        turn = math.pi * (phase[0] + 1.2 * speed[0] * time)
        row, column = 0.5 + 0.5 * np.sin(turn), 0.5 + 0.5 * np.cos(turn)
    elif motion == 2:
        row, column = phase[1] / 2 + 0 * time, 0.5 + 0.5 * np.sin(math.pi * (phase[0] + speed[0] * time))
    else:
        fall = (phase[0] + np.abs(speed[0]) * time) % 1
        row, column = 1 - 4 * fall * (1 - fall), np.abs((phase[1] + 0.5 * speed[1] * time) % 2 - 1)
    return low + span * row, low + span * column


def _background(rows: Array, columns: Array, time: Array, rng: np.random.Generator) -> Array:
    """Return drifting dark waves of two neighbouring hues, (F, H, W, 3)."""
    hue, direction = rng.uniform(), rng.uniform(0, 2 * math.pi)
    across = np.cos(direction) * columns + np.sin(direction) * rows
    wave = 0.5 + 0.5 * np.sin(2 * math.pi * (across + rng.uniform(0.3, 0.7) * time + rng.uniform()))
    first, second = _colour(hue, 0.6, 0.15), _colour(hue + 0.1, 0.6, 0.45)
    return first + (second - first) * wave[..., None]


def _colour(hue: float, saturation: float, value: float) -> Array:
    """Convert HSV, with the hue in turns, to RGB (3,)."""
    k = (np.array([5, 3, 1], dtype=np.float32) + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def write_demo_set(
    folder: Path, *, clips_per_class: int = 64, size: int = 64, frames: int = 24, fps: int = 12, seed: int = 0
) -> list[Path]:
    """Write `clips_per_class` MP4 files per shape to `folder/<shape>/` and return their paths.

    Existing files are kept. The same seed gives the same clips.
    """
    from rin_video.media import write_video

    paths = []
    for label, shape in enumerate(SHAPES):
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for index in range(clips_per_class):
            path = folder / shape / f"{shape}-{index:03d}.mp4"
            paths.append(path)
            if not path.exists():
                write_video(
                    render_clip(shape, size, frames, np.random.default_rng([seed, label, index])), path, fps=fps
                )
    return paths
