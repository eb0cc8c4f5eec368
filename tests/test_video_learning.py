"""The benchmark of video learning: its tracker, the networks that it compares, its jobs and its tables."""

import importlib.util
import json
import math
import os
import sys
from argparse import Namespace
from pathlib import Path

import means  # noqa: F401 (registers a cheap extractor)
import numpy as np
import pytest
import torch
from torch import nn

from rin_video import GaussianDiffusion
from rin_video.config import ModelConfig
from rin_video.media import write_video

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # video_learning.py imports the others from its folder
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def objects():
    return load("objects")


@pytest.fixture(scope="module")
def peers():
    return load("peers")


@pytest.fixture(scope="module")
def bench(objects, peers):
    load("atari")
    return load("video_learning")


# ---- objects


def flood(mask):
    """Return the sizes of the connected parts of a mask (H, W), by filling one after the other."""
    left, sizes = {tuple(place) for place in np.argwhere(mask)}, []
    while left:
        open_places, size = [left.pop()], 0
        while open_places:
            y, x = open_places.pop()
            size += 1
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            open_places += around
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("smallest", [1, 2, 5])
def test_objects_are_the_connected_parts(objects, smallest):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 4, 13, 17, generator=generator) < torch.linspace(0.02, 0.6, 12).view(3, 4, 1, 1)
    expected = [
        sum(smallest <= size <= objects.LARGEST * mask.numel() for size in flood(mask.numpy()))
        for mask in masks.flatten(0, 1)
    ]
    assert objects.count_objects(masks, smallest).tolist() == torch.tensor(expected).view(3, 4).tolist()


def test_a_snake_is_one_object(objects):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[::4] = True
    for row in range(0, 60, 4):
        mask[row : row + 4, 63 if row % 8 else 0] = True
    assert objects.count_objects(mask) == 1
    mask[32, 32] = False
    assert objects.count_objects(mask) == 2
    assert objects.count_objects(torch.ones(8, 8, dtype=torch.bool)) == 0  # more than half of the picture
    assert objects.count_objects(torch.zeros(8, 8, dtype=torch.bool)) == 0


def squares(frames, size, vanish=None):
    """Return a clip (3, F, H, W) of two squares that cross in opposite directions; one vanishes at a frame."""
    clip = torch.full((3, frames, size, size), 0.3)
    clip[:, :, :2] = 0.9  # stands still
    for f in range(frames):
        clip[0, f, 8:11, 2 * f : 2 * f + 3] = 0.8
        if vanish is None or f < vanish:
            clip[1, f, 20:23, size - 3 - 2 * f : size - 2 * f] = 0.0
    return clip


def test_persistence_of_moving_squares(objects):
    kept, lost = squares(12, 32), squares(12, 32, vanish=6)
    counts = objects.count_objects(objects.moving(torch.stack([kept, lost])))
    assert counts.tolist() == [[2] * 12, [2] * 6 + [1] * 6]
    assert objects.persistence(counts[:1]) == {"objects": 2, "change": 0, "drift": 0, "steady": 1}
    found = objects.persistence(counts)
    assert found["change"] == pytest.approx(0.5 / 22)  # one of 22 pairs of frames goes from two to one
    assert found["drift"] == pytest.approx(0.25)
    assert found["steady"] == 0.5
    as_bytes = (255 * torch.stack([kept, lost])).round().byte()
    assert torch.equal(objects.count_objects(objects.moving(as_bytes)), counts)


def test_persistence_without_objects_is_unknown(objects):
    assert objects.persistence(torch.zeros(2, 8)) == {"objects": 0, "change": None, "drift": None, "steady": 0}
    vanished = torch.tensor([[3, 3, 0, 0]])
    assert objects.persistence(vanished)["change"] == 0.5  # the pair of empty frames says nothing
    assert objects.persistence(vanished)["drift"] == 1


def test_every_frame_of_the_demo_set_shows_one_bright_object(objects):
    from rin_video.datasets.demo import SHAPES, render_clip

    clips = [render_clip(shape, 32, 8, np.random.default_rng(seed)) for shape in SHAPES for seed in range(10)]
    counts = objects.count_objects(objects.bright(torch.from_numpy(np.stack(clips))), 2)
    assert objects.persistence(counts) == {"objects": 1, "change": 0, "drift": 0, "steady": 1}


# ---- networks of other packages

CLIPS = ModelConfig(image_size=16, frames=4, patch_size=(2, 4, 4), num_classes=3, known_mask=True)


def test_a_peer_receives_the_clean_frames_and_the_mask(peers):
    seen = {}

    def call(network, x, t, condition):
        seen.update(x=x, t=t, condition=condition)
        return x[:, :3]

    peer = peers.Peer(nn.Identity(), call, CLIPS, 5)
    x = torch.randn(2, 3, 4, 16, 16)
    known = torch.zeros(2, 1, 4, 16, 16, dtype=torch.bool)
    known[0, :, :2] = True
    u = torch.tensor([0.1, 0.75])
    peer(x, (u * math.pi / 2).cos() ** 2, known=known, label=torch.tensor([2, -1]))
    assert seen["x"].shape[1] == peers.inputs_of(CLIPS) == 7
    torch.testing.assert_close(seen["x"][:, :3], x)
    torch.testing.assert_close(seen["x"][:, 3:6], torch.where(known, x, 0))
    torch.testing.assert_close(seen["x"][:, 6:], known.float())
    torch.testing.assert_close(seen["t"], 1000 * u, rtol=1e-4, atol=1e-2)  # the time of the cosine schedule
    torch.testing.assert_close(seen["condition"], peer.classes.weight[[2, 3]])
    peer(x, torch.ones(2))
    assert not seen["x"][:, 3:].any()
    assert torch.equal(seen["t"], torch.zeros(2))


@pytest.fixture(
    params=[
        ("diffusers", "peer_latte", (2, 1)),
        ("diffusers", "peer_unet3d", (8,)),
        ("video_diffusion_pytorch", "peer_video_unet", (8, (1, 2), 2)),
    ],
    ids=lambda param: param[1],
)
def make_peer(request, peers):
    """Build a network of another package, imported from a path without the folder `tokenizers` of the checkout."""
    package, name, size = request.param
    here = os.path.realpath(os.getcwd())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if os.path.realpath(entry or ".") != here])
        pytest.importorskip(package, reason=f"{package} is not installed: it is no requirement of the tests")
        yield lambda config: getattr(peers, name)(config, *size)


def test_a_peer_trains_and_samples_with_our_diffusion(make_peer):
    torch.manual_seed(0)
    peer = make_peer(CLIPS)
    diffusion = GaussianDiffusion(peer, objective="x0", known={"none": 1, "first": 1}, known_frames=[2, 2])
    x, label = torch.rand(4, 3, 4, 16, 16), torch.tensor([0, 1, 2, -1])
    optimizer = torch.optim.AdamW((p for p in peer.parameters() if p.requires_grad), 1e-2)
    for _ in range(3):  # outputs that are zero at first pass no gradient to what is before them
        optimizer.zero_grad()
        diffusion(x, label).backward()
        optimizer.step()
    without = [name for name, p in peer.named_parameters() if p.grad is None and p.requires_grad]
    assert not without
    peer.eval()
    gamma, known = torch.full((4,), 0.5), torch.zeros(4, 1, 4, 16, 16, dtype=torch.bool)
    base = peer(x, gamma, label=label)[0]
    assert base.shape == x.shape
    known[:, :, :2] = True
    for changed in (
        peer(x, torch.full((4,), 0.9), label=label),
        peer(x, gamma, label=torch.tensor([1, 2, 0, 0])),
        peer(x, gamma, label=label, known=known),
    ):
        assert not torch.allclose(changed[0], base, atol=1e-4)
    samples = diffusion.sample(batch_size=2, steps=2, context=x[:2, :, :2], seed=0)
    assert torch.equal(samples[:, :, :2], x[:2, :, :2])


def test_a_peer_without_classes_has_no_weights_for_them(make_peer):
    peer = make_peer(ModelConfig(image_size=16, frames=4, patch_size=(2, 4, 4)))
    assert not peer.classes.weight.requires_grad
    assert peer(torch.rand(1, 3, 4, 16, 16), torch.rand(1))[0].shape == (1, 3, 4, 16, 16)


# ---- arms and jobs


def test_the_nearest_size_is_built_as_if_no_other_had_been_tried(bench):
    torch.manual_seed(0)
    model = bench.nearest(nn.Linear, [(1, 1), (9, 1), (10, 2), (50, 50)], 20)  # 2, 10, 22 and 2550 parameters
    torch.manual_seed(0)
    expected = nn.Linear(10, 2)
    assert bench.count(model) == 22
    assert torch.equal(model.weight, expected.weight)


@pytest.mark.parametrize("name", ["atari64", "atari32", "demo"])
def test_our_arms_have_about_as_many_parameters(bench, name):
    job = make_job(bench, data=name)
    config = job.load()
    ours = bench.count(bench.RIN(config.model))
    published = bench.ARMS["published"].build(config, ours)
    assert published.shape == bench.RIN(config.model).shape
    assert published.config.interface_mixing == "none"
    assert bench.count(published) / ours == pytest.approx(1, abs=0.25)


def test_the_learning_rate_follows_the_time(bench):
    assert bench.learning_rate(0) == 0
    assert bench.learning_rate(bench.WARMUP) == pytest.approx(1, abs=0.01)
    assert bench.learning_rate(0.5) == pytest.approx(0.5)
    assert bench.learning_rate(1) == bench.learning_rate(1.5) == pytest.approx(0)


def make_job(bench, **changes):
    options = Namespace(minutes=[0.01], seeds=[0], sets=["atari32"], arms=["rin-video"], preset=None, set=[])
    options.lr, options.optimizer, options.batch, options.threads, options.precision = None, None, None, 1, "no"
    options.device = "cpu"
    options.num, options.steps, options.features = 6, 2, "means"
    for name, value in changes.items():
        setattr(options, *(("sets", [value]) if name == "data" else (name, value)))
    (job,) = bench.make_jobs(options)
    return job


def test_a_job_with_a_result_is_not_run_again(bench):
    job, longer = make_job(bench), make_job(bench, minutes=[2.0])
    results = json.loads(json.dumps([{"job": bench.dataclasses.asdict(job)}]))
    assert bench.open_jobs([job, longer], results) == [longer]
    other = make_job(bench, batch=2)
    with pytest.raises(ValueError, match="batch=16, now it is 2: add --replace"):
        bench.open_jobs([other], results)
    assert bench.open_jobs([other], results, replace=True) == [other]
    assert job.name != other.name
    assert job.name == make_job(bench, steps=50).name  # the same training


def test_a_change_of_our_preset_makes_another_job(bench):
    changed = ["model.depth=1"]
    assert make_job(bench).config != make_job(bench, set=changed).config
    assert make_job(bench, arms=["latte"]).config == make_job(bench, arms=["latte"], set=changed).config


def test_a_job_trains_for_its_budget_and_is_judged(bench, tmp_path, capsys):
    """A result that an earlier call left behind is taken, without another training."""
    for split, seed in (("train", 0), ("test", 1)):
        for game in ("left", "right"):
            for index in range(6):
                (tmp_path / split / game).mkdir(parents=True, exist_ok=True)
                shift = int(np.random.default_rng([seed, index]).integers(1, 8))
                clip = squares(20, 48, vanish=10 + index)[..., :32].roll(shift, -1)
                write_video(clip.flip(-1) if game == "left" else clip, tmp_path / split / game / f"{index}.mp4")
    job = make_job(bench, minutes=[0.02], batch=2)
    bench.run_here(job, tmp_path, tmp_path / "work")
    options = Namespace(work=tmp_path / "work", out=tmp_path / "results.json", data=tmp_path)
    assert bench.run_job(job, options)
    (result,) = bench.read_results(options.out)
    assert bench.job_of(result) == job
    assert result["steps"] == result["clips"] / 2 >= 1
    assert 0.5 < result["seconds"] / 1.2 < 2 or result["steps"] == 1
    assert set(result["given"]) == {"left", "right", "mean"}
    recalls = [result["given"][game]["prediction/moving_recall"]["value"] for game in ("left", "right")]
    assert result["given"]["mean"]["prediction/moving_recall"]["value"] == pytest.approx(sum(recalls) / 2, rel=1e-3)
    assert 1 < result["free"]["objects"]["real"]["objects"] < 3
    text = bench.table([result])
    assert "rin-video" in text
    assert "real clips" in text
    assert "last given frame, copied" in text
    assert not bench.open_jobs([job], [result])
    options.sheet_minutes, options.device, options.threads = 0.02, "cpu", 1
    (sheet,) = bench.write_sheets([result], options)
    assert sheet.name == "results_atari32.png"


def test_means_leave_out_what_is_missing(bench):
    rows = [
        {"a": 1.0, "b": {"c": 2.0, "d": 1.0, "low": 0.5}},
        {"a": 2.0, "b": {"c": None, "d": 5.0, "low": 1}, "e": 1.0},
    ]
    assert bench.mean_of(rows) == {"a": 1.5, "b": {"c": None, "d": 3.0}}


def test_the_table_has_the_mean_and_every_seed(bench):
    def result(seed, recall, diverged=False):
        scores = {"prediction/moving_recall": {"value": recall}, "prediction/copy_moving_recall": {"value": 0.1}}
        job = bench.dataclasses.asdict(make_job(bench, seeds=[seed]))
        found = {"free": {}, "given": {}} if diverged else {"free": {}, "given": {"mean": scores}}
        return {"job": job, "params": 2_000_000, "clips": 10, "diverged": diverged} | found

    text = bench.table([result(0, 0.5), result(1, 0.7), result(2, 0.0, diverged=True)])
    assert "| rin-video (1 of 3 diverged) | 2.00 | 0.01 | 10 | 0.6 (0.5, 0.7) |" in text
    assert "| last given frame, copied | | | | 0.1 |" in text
    limit = {make_job(bench).data: {"given": {"mean": {"prediction/moving_recall": {"value": 0.9}}}}}
    assert "| the game, played on with other actions | | | | 0.9 |" in bench.table([result(0, 0.5)], limit)


def test_the_games_are_played_by_seed():
    pytest.importorskip("ale_py", reason="ale-py is not installed: it is no requirement of the tests")
    atari = load("atari")
    one, again, other = (next(atari.play("pong", 1, seed, size=32)) for seed in (0, 0, 1))
    assert one.shape == (3, atari.FRAMES, 32, 32)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert 0.001 < (np.abs(one - np.median(one, 1, keepdims=True)) > 25).mean() < 0.1  # few things move


def test_a_game_is_played_on_twice_from_the_last_given_frame():
    pytest.importorskip("ale_py", reason="ale-py is not installed: it is no requirement of the tests")
    atari = load("atari")
    pairs = list(atari.play_twice("pong", 3, 0, given=5, frames=16, size=32))
    assert {pair.shape for pair in pairs} == {(2, 3, 16, 32, 32)}
    for pair in pairs:
        assert np.array_equal(pair[0, :, :5], pair[1, :, :5])
        assert not np.array_equal(pair[0], pair[1])
