"""Writes files of random pixels, which depend on their names alone."""

import numpy as np
import torch
from PIL import Image

from rin_video.datasets.held_out import hash_of
from rin_video.media import write_video


def pictures(root, *names, seed=0):
    """Write images of random pixels; the name and the seed determine them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([int(hash_of(name) * 2**32), seed])
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return root


def clips(root, *names, frames=8):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(int(hash_of(name) * 2**32))
        write_video(torch.randint(0, 256, (3, frames, 16, 16), generator=generator, dtype=torch.uint8), path, 8)
    return root
