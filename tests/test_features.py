"""Feature extractors: shapes and views, digests, independence of the batch, and their errors."""

from itertools import pairwise

import torch

from rin_video.features import make_extractor
from rin_video.features.base import difference_pictures, evenly_spaced, spread_out


def clips(num: int, frames: int = 16, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, frames, size, size), dtype=torch.uint8, generator=generator)


def test_evenly_spaced_frames_have_both_ends_and_no_repeats():
    assert evenly_spaced(1) == [0]
    assert evenly_spaced(8) == list(range(8))
    assert evenly_spaced(15) == [0, 2, 4, 6, 8, 10, 12, 14]
    for length in range(8, 200):
        chosen = evenly_spaced(length)
        assert len(set(chosen)) == 8
        assert (chosen[0], chosen[-1]) == (0, length - 1)
        assert max(b - a for a, b in pairwise(chosen)) <= -(-(length - 1) // 7)


def test_pairs_are_seen_in_all_phases_of_what_repeats():
    assert spread_out(15) == list(range(15))
    for length in range(17, 129):
        chosen = spread_out(length)
        assert len(set(chosen)) == 16
        assert chosen == sorted(chosen)
        assert chosen[-1] < length
        for period in (2, 3, 4):
            assert {pair % period for pair in chosen} == set(range(period)), length


def test_difference_pictures_by_hand():
    x = torch.tensor([0, 0, 255, 254, 0], dtype=torch.uint8).reshape(1, 1, 5, 1, 1)
    assert difference_pictures(x).flatten().tolist() == [128, 255, 127, 1]  # 128 + floor of 0, 127.5, -0.5, -127


def test_lite():
    extractor = make_extractor("lite")
    x = clips(3)
    found = extractor(x)
    assert {view: tuple(value.shape) for view, value in found.items()} == {
        "clip": (3, 640),
        "frame": (3, 8, 1280),
        "motion": (3, 15, 1280),
    }
    assert torch.equal(extractor(x[:, :, 0])["image"], found["frame"][:, 0])
