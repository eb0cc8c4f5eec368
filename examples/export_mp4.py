"""Write generated clips as MP4, GIF, contact sheet, array and folder, and convert an array to MP4.

python examples/export_mp4.py FOLDER
"""

import sys
from pathlib import Path

import torch

from rin_video.cli.convert import export
from rin_video.media import save_samples


def moving_squares(num_clips: int = 4, frames: int = 16, size: int = 32) -> torch.Tensor:
    """Return clips (B, 3, F, size, size) in [0, 1] with a square of random colour that moves to the right."""
    clips = torch.zeros(num_clips, 3, frames, size, size)
    for clip, colour in zip(clips, torch.rand(num_clips, 3, 1, 1), strict=True):
        for frame in range(frames):
            clip[:, frame, size // 3 : 2 * size // 3, frame : frame + size // 3] = colour
    return clips


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "exported")
    clips = moving_squares()
    for name in ("clips.mp4", "clips.gif", "clips.png", "clips.npy", "clips"):
        for path in save_samples(clips, folder / name, fps=8, upscale=4):
            print(path)
    print(export(folder / "clips.npy", folder / "from_array.mp4", fps=12))


if __name__ == "__main__":
    main()
