"""The damages, against what they claim to do, and a small version of the battery (`benchmarks/evaluate.py`)."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rin_video.datasets.demo import SHAPES, render_clip
from rin_video.errors import UsageError
from rin_video.evaluation import damages
from rin_video.evaluation.damages import DAMAGES, STRENGTHS, colour_clusters, drop_modes
from rin_video.features import make_extractor

SPATIAL = [name for name, damage in DAMAGES.items() if not damage.temporal]
TEMPORAL = [name for name, damage in DAMAGES.items() if damage.temporal]


@pytest.fixture(scope="module")
def battery():
    """The script; importing it registers the extractor "pixels", which needs no network."""
    path = Path(__file__).parents[1] / "benchmarks" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("battery", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["battery"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clips():
    shapes = list(SHAPES)
    drawn = [render_clip(shapes[i % 3], 32, 16, np.random.default_rng(i)) for i in range(12)]
    return torch.from_numpy(np.stack(drawn))


# ---- all damages


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_a_function_that_grows_with_strength(name, clips):
    before, state = clips.clone(), torch.get_rng_state()
    damaged = [DAMAGES[name](clips, strength, 1) for strength in STRENGTHS]
    assert torch.equal(clips, before)
    assert torch.equal(torch.get_rng_state(), state)
    for strength, x in zip(STRENGTHS, damaged, strict=True):
        assert x.shape == clips.shape
        assert x.dtype == torch.uint8
        assert torch.equal(DAMAGES[name](clips, strength, 1), x)
    change = [(x.float() - clips.float()).abs().mean() for x in damaged]
    assert 0 < change[0] < change[1] < change[2]


@pytest.mark.parametrize("name", SPATIAL)
def test_spatial_damages_take_images(name, clips):
    images = clips[:, :, 0]
    assert DAMAGES[name](images, 2).shape == images.shape


@pytest.mark.parametrize("name", ["blur", "jpeg", "colour shift"])
def test_frames_of_a_clip_are_damaged_like_images(name, clips):
    as_images = DAMAGES[name](clips[:, :, 3], 3)
    assert torch.equal(DAMAGES[name](clips, 3)[:, :, 3], as_images)


@pytest.mark.parametrize("name", TEMPORAL)
def test_temporal_damages_refuse_images(name, clips):
    with pytest.raises(UsageError, match="have no time: pass clips"):
        DAMAGES[name](clips[:, :, 0], 1)


def test_other_types_and_strengths_are_refused(clips):
    with pytest.raises(UsageError, match="pass uint8 images"):
        DAMAGES["blur"](clips.float(), 1)
    with pytest.raises(UsageError, match="1, 2 or 3, not 4"):
        DAMAGES["blur"](clips, 4)
    with pytest.raises(UsageError, match="1 or 3 channels, not 2"):
        DAMAGES["jpeg"](clips[:, :2], 1)
    with pytest.raises(UsageError, match="1 frame have no order"):
        DAMAGES["shuffled"](clips[:, :, :1], 1)


# ---- each one


@pytest.mark.parametrize("strength", STRENGTHS)
def test_blur_of_a_point_is_a_gaussian(strength):
    x = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    x[..., 24:40, 24:40] = 255  # a square, so that rounding to whole numbers matters little
    row = DAMAGES["blur"](x, strength)[0, 0, 32].double() / 255
    sigma = damages.BLUR[strength - 1]
    edges = [0.5 * (1 + math.erf((at - 23.5) / (sigma * 2**0.5))) for at in range(32)]
    assert_close(row[:32], torch.tensor(edges, dtype=torch.float64), atol=0.06, rtol=0)
    assert torch.equal(DAMAGES["blur"](torch.full_like(x, 77), strength), torch.full_like(x, 77))


def test_noise_has_its_standard_deviation_and_no_pattern():
    x = torch.full((4, 3, 4, 64, 64), 128, dtype=torch.uint8)
    for strength in STRENGTHS:
        found = DAMAGES["noise"](x, strength).double() - 128
        expected = (255 * damages.NOISE[strength - 1]) ** 2 + 1 / 12  # and that of rounding
        assert found.var().item() == pytest.approx(expected, rel=0.02)
        assert abs(found.mean()) < 0.3
        assert abs((found[:, :, 1:] * found[:, :, :-1]).mean()) / expected < 0.02
    assert not torch.equal(DAMAGES["noise"](x, 1, 0), DAMAGES["noise"](x, 1, 1))


def test_jpeg_keeps_the_mean_of_blocks_and_gray_stays_gray(clips):
    """The first number that JPEG stores of a block of 8x8 pixels is its mean, quantised finer than the others."""
    gray = clips[:, :1]
    found = DAMAGES["jpeg"](gray, 1)
    mean = [x.float().unflatten(4, (4, 8)).unflatten(3, (4, 8)).mean((4, 6)) for x in (gray, found)]
    step = 16 * 125 // 100 / 8  # the table's first number, 16, at quality 40, and the scale of the transform
    inner = (found > 0) & (found < 255)
    whole = inner.unflatten(4, (4, 8)).unflatten(3, (4, 8)).all(6).all(4)  # blocks where no value was clipped
    assert whole.float().mean() > 0.5
    assert (mean[0] - mean[1])[whole].abs().max() < step / 2 + 0.5
    colours = DAMAGES["jpeg"](gray.expand(-1, 3, -1, -1, -1), 1)
    assert (colours.float().amax(1) - colours.float().amin(1)).max() <= 1


def test_colour_shift_moves_the_outer_channels_apart():
    x = torch.full((1, 3, 2, 8, 8), 100, dtype=torch.uint8)
    assert DAMAGES["colour shift"](x, 3)[0, :, 0, 0, 0].tolist() == [151, 100, 49]  # 20 % of 255
    assert (DAMAGES["colour shift"](x[:, :1], 3) == 151).all()


def test_seams_lie_between_patches():
    x = torch.full((2, 3, 4, 64, 64), 128, dtype=torch.uint8)
    found = DAMAGES["patch seams"](x, 2)
    patches = found.unflatten(4, (8, 8)).unflatten(3, (8, 8))
    assert (patches == patches[:, :1, :1, :, :1, :, :1]).all()  # of all channels, frames and pixels of a patch
    assert len(found[0, 0, 0].unique()) > 10
    assert DAMAGES["patch seams"](x[..., :27, :50], 2).shape[-2:] == (27, 50)


def test_frozen_frames_are_the_first_one(clips):
    for strength, count in zip(STRENGTHS, (4, 8, 16), strict=True):
        found = DAMAGES["frozen start"](clips, strength)
        assert (found[:, :, :count] == clips[:, :, :1]).all()
        assert torch.equal(found[:, :, count:], clips[:, :, count:])


def numbered(num: int = 8, frames: int = 16) -> Tensor:
    """Clips whose frames are filled with their number."""
    return torch.arange(frames, dtype=torch.uint8)[None, None, :, None, None].expand(num, 1, -1, 4, 4).clone()


def test_shuffled_frames_stay_in_their_windows():
    x = numbered()
    reach = []
    for strength, window in zip(STRENGTHS, (2, 8, 16), strict=True):
        orders = DAMAGES["shuffled"](x, strength)[:, 0, :, 0, 0].long()
        assert (orders.sort(1).values == torch.arange(16)).all()  # all frames are left
        moved = (orders - torch.arange(16)).abs()
        assert (moved.max(1).values > 0).all()
        assert moved.max() < window
        reach.append(moved.float().mean())
    assert reach[0] < reach[1] < reach[2]


def test_reversed_clips_are_a_growing_part(clips):
    whole = [
        (DAMAGES["reversed"](clips, strength, 3) == clips.flip(2)).flatten(1).all(1).tolist() for strength in STRENGTHS
    ]
    assert [sum(one) for one in whole] == [4, 8, 12]
    assert all(not one or two for one, two in zip(whole[0], whole[1], strict=True))


def test_repeated_frames_follow_their_predecessor():
    for strength, every in zip(STRENGTHS, (8, 4, 2), strict=True):
        for frames in DAMAGES["repeated"](numbered(), strength)[:, 0, :, 0, 0].long():
            wrong = (frames != torch.arange(16)).nonzero()[:, 0]
            assert (frames[wrong] == wrong - 1).all()
            assert (wrong.diff() == every).all()
            assert len(wrong) in (16 // every, 16 // every - 1)  # the first frame has no predecessor


def test_erased_pixels_show_the_median_picture(clips):
    still = clips.float().quantile(0.5, dim=2, keepdim=True)
    moving = ((clips - still).abs() > 25.5).any(1, keepdim=True).expand_as(clips)
    background = still.round().byte().expand_as(clips)
    before = torch.zeros_like(moving)
    for strength, part in zip(STRENGTHS, damages.ERASED, strict=True):
        found = DAMAGES["erased motion"](clips, strength)
        changed = found != clips
        assert torch.equal(found[changed], background[changed])
        assert not (changed & ~moving).any()
        assert not (before & ~changed).any()  # what was erased stays erased
        share = changed.any(1).flatten(1).sum(1) / moving[:, 0].flatten(1).sum(1)
        assert_close(share, torch.full_like(share, part), atol=0.01, rtol=0)
        before = changed


def test_still_clips_have_nothing_to_erase():
    x = torch.full((2, 3, 4, 8, 8), 9, dtype=torch.uint8)
    assert torch.equal(DAMAGES["erased motion"](x, 3), x)


# ---- dropped modes


@pytest.mark.parametrize(("classes", "left"), [(4, (3, 2, 1)), (3, (2, 2, 1)), (10, (9, 5, 1))])
def test_dropped_modes_are_replaced_by_other_samples_of_the_kept_ones(classes, left):
    labels = [i % classes for i in range(12 * classes)]
    spare = labels * classes
    dropped: set[int] = set()
    for strength, count in zip(STRENGTHS, left, strict=True):
        chosen = drop_modes(labels, spare, strength, seed=2)
        kept = [(labels + spare)[index] for index in chosen]
        assert len(kept) == len(labels)
        assert len({*kept}) == count
        assert len({*chosen}) == len(chosen)  # no sample twice
        assert dropped <= {*labels} - {*kept}
        dropped = {*labels} - {*kept}
    chosen = drop_modes(labels, [], 3)  # without spare samples the kept ones are repeated equally often
    assert {chosen.count(index) for index in {*chosen}} == {classes}


def test_half_of_an_odd_number_of_classes_halves_one():
    labels = [i % 3 for i in range(60)]
    for strength, most in ((1, 20), (2, 10)):
        chosen = drop_modes(labels, labels * 3, strength)
        left = sorted(sum(labels[index] == label for index in chosen if index < 60) for label in range(3))
        assert left == [0, most, 20]


def test_modes_need_three_classes_and_colours_can_be_some(clips):
    with pytest.raises(UsageError, match="2 classes have no three strengths"):
        drop_modes([0, 1], [], 1)
    x = torch.arange(12, dtype=torch.uint8)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    groups = colour_clusters(20 * x[:, None, None, None].expand(-1, 3, 4, 4))
    assert groups == [int(value) * 4 // 12 for value in x]
    assert sorted(colour_clusters(clips, 3)) == sorted([0, 1, 2] * 4)


# ---- the demo set's time


class Replay:
    """A random generator that returns given values."""

    def __init__(self, values: list) -> None:
        self.values = iter(values)

    def __getattr__(self, name: str):
        return lambda *args: next(self.values)


class Record(Replay):
    """A random generator that keeps what it returned."""

    def __init__(self, seed: int) -> None:
        self.rng, self.kept = np.random.default_rng(seed), []

    def __getattr__(self, name: str):
        def draw(*args):
            self.kept.append(getattr(self.rng, name)(*args))
            return self.kept[-1]

        return draw


def turn_back(drawn: list, end: float) -> list:
    """Return the draws of the demo's renderer for the same clip played backwards; `end` is the time of its last frame.

    Every draw is replaced by a number that is as probable: uniform phases are shifted and mirrored (modulo their
    period), and speeds change their sign, which is drawn separately.
    """
    radius, phase, size, sign, motion, *rest = drawn
    speed = size * sign
    if motion == 3:  # a fall and bounce, symmetric in time, and a way across at half the speed
        phase = np.array([1 - (phase[0] + abs(speed[0]) * end), phase[1] + 0.5 * speed[1] * end])
    elif motion == 2:  # a swing at a fixed height
        phase = np.array([phase[0] + speed[0] * end, phase[1]])
    else:
        phase = phase + (1.2 if motion == 1 else 1) * speed * end
    turn = [rest[0] + rest[1] * end, -rest[1]] if len(rest) == 7 else []  # of all shapes but the circle
    colour, hue, direction, drift, offset = rest[-5:]
    return [
        radius,
        phase,
        size,
        -sign,
        motion,
        *turn,
        colour,
        hue,
        direction + math.pi,
        drift,
        0.5 - offset - drift * end,
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_demo_set_has_no_direction_of_time(shape):
    """Every clip, played backwards, is a clip that the renderer draws with the same probability.

    The maps of `turn_back` keep the measure of each uniform draw. Therefore no distance can see reversed clips.
    """
    kinds = set()
    for seed in range(24):
        record = Record(seed)
        clip = render_clip(shape, 32, 16, record)
        kinds.add(int(record.kept[4]))
        backwards = render_clip(shape, 32, 16, Replay(turn_back(record.kept, 15 / 16)))
        difference = np.abs(clip[:, ::-1].astype(int) - backwards.astype(int))
        assert difference.max() <= 2  # rounding
        assert (difference == 0).mean() > 0.99
    assert kinds == {0, 1, 2, 3}


# ---- the battery


def test_small_battery(battery, tmp_path, monkeypatch):
    """Both distances rise above the floor with every damage that the features of clips can see, and with no other."""
    monkeypatch.setattr(battery, "TRAINING", 3)  # for an extractor that is trained
    clips = battery.render_demo(30, 16, 32)
    assert {part: len(found.labels) for part, found in clips.items()} == dict.fromkeys(battery.PARTS, 30) | {
        "spare": 90,
        "training": 3,
    }
    found = battery.evaluate(make_extractor("pixels"), clips, tmp_path, 0)
    for distance in battery.DISTANCES:
        clip, frame = (found["views"][view][distance] for view in ("clip", "frame"))
        assert clip["floor"]["low"] < clip["undamaged"]["control"] < clip["floor"]["high"]
        passed = {name for name, row in clip["rows"].items() if row["passes"]}
        assert passed == {*DAMAGES} - {"reversed"}, distance
        assert not {"reversed", battery.DROPPED} & {name for name, row in clip["rows"].items() if row["seen"]}
        assert not {*TEMPORAL} & {name for name, row in frame["rows"].items() if row["passes"]}, distance
    header = {"num": 30, "frames": 16, "size": 32, **battery.describe_machine(torch.device("cpu"))}
    text = battery.report(header | {"results": {"demo": {"pixels": found}}})
    assert "| damage | pixels, clip | pixels, frame | pixels, motion |" in text


def test_dropped_modes_are_seen_in_features_of_the_class(battery, tmp_path):
    labels = [index % 4 for index in range(40)]
    noise = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0)) / 4
    reference, source = (part + torch.eye(4)[labels] for part in noise)
    floor = battery.find_floor("frechet", [reference, source], labels, 0)
    values = [battery.measure("frechet", source[drop_modes(labels, [], strength)], reference) for strength in STRENGTHS]
    assert battery.judge(values, floor[2])["passes"]
    assert battery.measure("frechet", source, reference) < floor[2] < values[0]


def test_files_are_in_one_part_only(battery):
    labels = [index % 3 for index in range(31)]
    parts = battery.divide(labels, 6, seed=0)
    assert tuple(parts) == battery.PARTS
    assert len({index for indices in parts.values() for index in indices}) == 30
    assert all(sorted(labels[index] for index in indices) == [0, 0, 1, 1, 2, 2] for indices in parts.values())
    fewer = battery.divide(labels, 3, seed=0)
    assert all(fewer[part] == parts[part][:3] for part in battery.PARTS[:-1])  # so that their features are known
    assert fewer["training"] == parts["training"]
    for num in (7, 9):
        with pytest.raises(UsageError, match=f"{num} clips in each of 4 parts need a multiple of 3"):
            battery.divide(labels, num, seed=0)


def test_features_are_computed_once_for_each_variant_of_an_extractor(battery, tmp_path):
    x = battery.render_demo(3, 16, 32)["source"].x
    pixels = make_extractor("pixels")
    first = battery.Cache(pixels, tmp_path).features(x, "")
    other = make_extractor("pixels")
    other.encode = lambda pictures: 2 * pixels.encode(pictures)
    assert torch.equal(battery.Cache(other, tmp_path).features(x, "")["frame"], 2 * first["frame"])
    again = battery.Cache(pixels, tmp_path)
    pixels.encode = None  # not used again
    assert torch.equal(again.features(x, "")["frame"], first["frame"])


def test_a_row_passes_if_it_rises_above_the_floor(battery):
    assert battery.judge([2.0, 3.0, 4.0], 1.0) == {"values": [2, 3, 4], "seen": 1, "rises": True, "passes": True}
    assert battery.judge([0.5, 0.8, 4.0], 1.0)["seen"] == 3
    assert battery.judge([2.0, 0.8, 4.0], 1.0) == {"values": [2, 0.8, 4], "seen": 3, "rises": False, "passes": False}
    assert battery.judge([0.1, 0.2, 0.3], 1.0) == {"values": [0.1, 0.2, 0.3], "seen": None, "rises": True} | {
        "passes": False
    }


def test_a_linear_classifier_tells_directions_only_where_there_are_some(battery):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    y = torch.randn(200, 20, generator=generator)
    assert battery.direction_accuracy(x + 1, y - 1)["accuracy"] > 0.95
    chance = battery.direction_accuracy(x, y)
    assert chance["low"] < 0.5 < chance["high"]
