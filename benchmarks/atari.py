"""Makes clips of Atari games with seeded random play, for `video_learning.py`: `pip install ale-py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rin_video.media import VideoWriter

GAMES = ("freeway", "ms_pacman", "pong", "space_invaders")
SPLITS = {"train": (80, 0), "test": (12, 1)}  # clips of each game, and the seed
FRAMES, SIZE, SKIP, FPS = 64, 64, 4, 15
SCREEN = (0, 20, 160, 210)  # the part of the picture that is shown: left, upper, right, lower
WAIT = (20, 400)  # random actions before a clip, so that clips begin at different places
CHANGE = 0.3  # chance that a frame has a new action
CRF = 12


def write_atari(folder: Path, games: tuple[str, ...] = GAMES, clips: int | None = None, size: int = SIZE) -> None:
    """Write `folder/train/GAME/*.mp4` and `folder/test/GAME/*.mp4`; existing games are kept.

    `clips` is the number of clips of each game and split, by default those of `SPLITS`.
    """
    for split, (num, seed) in SPLITS.items():
        for game in games:
            place = folder / split / game
            if len(list(place.glob("*.mp4"))) >= (clips or num):
                continue
            place.mkdir(parents=True, exist_ok=True)
            for index, clip in enumerate(play(game, clips or num, seed, size)):
                with VideoWriter(place / f"{index:04d}.mp4", FPS, crf=CRF) as writer:
                    writer.write(clip)


def play(game: str, num: int, seed: int, size: int = SIZE) -> Iterator[np.ndarray]:
    """Play a game at random; yield `num` clips, uint8 (3, F, size, size). The same seed gives the same clips."""
    console = open_console(game, seed)
    actions, rng = console.getMinimalActionSet(), np.random.default_rng(seed)
    for _ in range(num):
        console.reset_game()
        for _ in range(rng.integers(*WAIT)):
            console.act(rng.choice(actions))
        action, frames = rng.integers(len(actions)), []
        for _ in range(FRAMES):
            if rng.random() < CHANGE:
                action = rng.integers(len(actions))
            for _ in range(SKIP):
                console.act(actions[action])
            if console.game_over():
                console.reset_game()
            screen = Image.fromarray(console.getScreenRGB()).crop(SCREEN)
            frames.append(np.asarray(screen.resize((size, size), Image.Resampling.BOX)))
        yield np.stack(frames).transpose(3, 0, 1, 2)


def open_console(game: str, seed: int) -> Any:
    """Start a game. Raises `SystemExit` with the command that installs it if ale-py is missing."""
    try:
        from ale_py import ALEInterface, LoggerMode, roms
    except ImportError:
        raise SystemExit("the games need ale-py: pip install ale-py") from None
    ALEInterface.setLoggerMode(LoggerMode.Error)
    console = ALEInterface()
    console.setInt("random_seed", seed)
    console.setFloat("repeat_action_probability", 0.0)
    console.loadROM(roms.get_rom_path(game))
    return console
