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


class Player:
    """Plays a game at random. The same seed gives the same pictures."""

    def __init__(self, game: str, seed: int, size: int = SIZE) -> None:
        self.console, self.size = open_console(game, seed), size
        self.actions, self.rng = self.console.getMinimalActionSet(), np.random.default_rng(seed)
        self.action = 0

    def restart(self) -> None:
        """Start the game anew, and play on to a random place."""
        self.console.reset_game()
        for _ in range(self.rng.integers(*WAIT)):
            self.console.act(self.rng.choice(self.actions))
        self.action = self.rng.integers(len(self.actions))

    def play(self, num: int) -> np.ndarray:
        """Return the next `num` frames, uint8 (3, num, size, size)."""
        frames = np.empty((num, self.size, self.size, 3), np.uint8)
        for frame in frames:
            if self.rng.random() < CHANGE:
                self.action = self.rng.integers(len(self.actions))
            for _ in range(SKIP):
                self.console.act(self.actions[self.action])
            if self.console.game_over():
                self.console.reset_game()
            screen = Image.fromarray(self.console.getScreenRGB()).crop(SCREEN)
            frame[:] = screen.resize((self.size, self.size), Image.Resampling.BOX)
        return frames.transpose(3, 0, 1, 2)


def play(game: str, num: int, seed: int, size: int = SIZE) -> Iterator[np.ndarray]:
    """Play a game at random; yield `num` clips, uint8 (3, F, size, size). The same seed gives the same clips."""
    player = Player(game, seed, size)
    for _ in range(num):
        player.restart()
        yield player.play(FRAMES)


def play_twice(game: str, num: int, seed: int, given: int, frames: int, size: int = SIZE) -> Iterator[np.ndarray]:
    """Yield `num` pairs of clips, uint8 (2, 3, frames, size, size), with the same first `given` frames.

    After these, the player acts differently in each, so that one is a perfect prediction of the other: no model that
    does not see the actions can do better on average.
    """
    player = Player(game, seed, size)
    for _ in range(num):
        player.restart()
        player.play(player.rng.integers(FRAMES - frames + 1))
        start, action = player.play(given), player.action
        state = player.console.cloneSystemState()
        pair = []
        for _ in range(2):
            player.console.restoreSystemState(state)
            player.action = action
            pair.append(np.concatenate([start, player.play(frames - given)], axis=1))
        yield np.stack(pair)


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
