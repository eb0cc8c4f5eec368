"""The extractor "self": its tasks, its training on the user's data, and its cache beside the data."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from rin_video.datasets import ImageFolder
from rin_video.datasets.demo import SHAPES, render_clip
from rin_video.errors import UsageError
from rin_video.features import make_extractor, self_data, self_trained
from rin_video.features.self_alterations import ALTERATIONS, altered
from rin_video.features.self_network import SelfNetwork, shift, steps
from rin_video.features.self_tasks import CHANGES, ORDERS, changed, reordered, window_length
from rin_video.features.self_training import make_batch, step_loss
from rin_video.media import save_samples


def clips(num: int, frames: int = 8, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, frames, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(self_trained, "STEPS", 3)


@pytest.mark.parametrize("num_frames", [2, 3, 4, 7, 8, 9, 16, 25])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_shows_a_window_of_frames_that_exist(order, num_frames):
    for seed in range(20):
        frames = reordered(order, num_frames, np.random.default_rng(seed))
        assert len(frames) == window_length(num_frames)
        assert set(frames) <= set(range(num_frames))


def test_orders_are_what_their_names_say():
    for seed in range(50):
        shown = {order: np.array(reordered(order, 16, np.random.default_rng(seed))) for order in ORDERS}
        change = {order: np.diff(frames) for order, frames in shown.items()}
        assert (change["forward"] == 1).all()
        assert (change["backward"] == -1).all()
        assert (np.diff(np.sort(shown["shuffled"])) == 1).all()
        assert sorted(change["swapped"].tolist()).count(1) >= 4
        assert -1 in change["swapped"]
        assert (change["fast"] == 2).all()
        assert change["slow"].tolist() == [0, 1, 0, 1, 0, 1, 0]
        frozen = change["frozen"].tolist()
        assert frozen[0] == 0
        assert [value > 0 for value in frozen] == sorted(value > 0 for value in frozen)  # it never freezes again
        assert 0 in change["stuttering"]
        assert set(change["stuttering"]) <= set(range(8))
        assert (change["jumping"] != 1).sum() == 1


def test_changes_of_images_by_hand():
    image = torch.arange(16).reshape(1, 4, 4)
    assert torch.equal(changed("none", image), image)
    assert torch.equal(changed("turned by 180", image), image.flip(1, 2))
    assert changed("turned by 90", image)[0, :, 0].tolist() == [3, 2, 1, 0]
    assert changed("quarters exchanged", image)[0, 0].tolist() == [10, 11, 8, 9]
    assert changed("mirrored quarters", image)[0].tolist() == [
        [1, 0, 2, 3],
        [5, 4, 6, 7],
        [8, 9, 11, 10],
        [12, 13, 15, 14],
    ]
    wide = torch.arange(8).reshape(1, 2, 4)
    assert all(changed(change, wide).shape == wide.shape for change in CHANGES)


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_alterations_grow_with_their_strength_and_keep_the_range(kind):
    rng = np.random.default_rng(0)
    x = torch.stack([torch.from_numpy(render_clip("square", 24, 8, rng)) for _ in range(30)]).float()
    changes = []
    for strength in (0.0, 0.3, 1.0):
        y = torch.stack([altered(kind, strength, clip, np.random.default_rng(i)) for i, clip in enumerate(x)])
        assert y.shape == x.shape
        assert y.min() >= 0
        assert y.max() <= 255
        changes.append(float((y - x).abs().mean()))
    if kind == "none":
        assert changes == [0, 0, 0]
    else:
        assert changes[0] < 1e-2 or kind == "exchanged"  # which exchanges at least one pair
        assert changes[1] > 0.1
        assert changes[2] > 1.5 * changes[1]


def test_images_can_be_altered():
    for kind in ALTERATIONS:
        assert altered(kind, 1.0, clips(1)[0, :, :1].float(), np.random.default_rng(0)).shape == (3, 1, 16, 16)


def test_shift_and_steps_by_hand():
    x = torch.arange(12.0).reshape(1, 4, 3, 1, 1)
    assert shift(x).flatten(2).tolist() == [[[0, 0, 1], [4, 5, 0], [6, 7, 8], [9, 10, 11]]]
    y = torch.tensor([1.0, 4, 9]).reshape(1, 1, 3)
    assert steps(y, 1).flatten().tolist() == [3, 5, 5]
    assert steps(y, 2).flatten().tolist() == [8, 8, 8]
    assert steps(y, 3).flatten().tolist() == [0, 0, 0]


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    network = SelfNetwork(len(ORDERS), len(ALTERATIONS), 3)
    x, answers = make_batch(clips(8), torch.arange(8) % 3, ORDERS, np.random.default_rng(0))
    loss, _ = step_loss(network, x, answers)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_features_have_variance_one_on_the_training_data(tmp_path):
    x = clips(64)
    features = make_extractor("self", data=lambda: x, cache=tmp_path)(x)["clip"].double()
    torch.testing.assert_close(features.mean(0), torch.zeros(16).double(), atol=1e-3, rtol=0)
    covariance = features.T.cov(correction=0)
    torch.testing.assert_close(covariance[:8, :8], torch.eye(8).double(), atol=0.02, rtol=0)
    assert covariance.diagonal().max() < 1.01  # those of least variance are less than 1: they are not blown up


def test_training_is_deterministic_and_leaves_the_global_generator_alone(tmp_path):
    x = clips(5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make_extractor("self", data=lambda: x, cache=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.no_grad():
        second = make_extractor("self", data=lambda: x, cache=tmp_path / "b")
    assert first.digest == second.digest
    assert first.protocol == second.protocol
    other = make_extractor("self", data=lambda: clips(5, seed=1), cache=tmp_path / "a")
    assert other.digest != first.digest


def test_the_second_call_reads_the_cache(tmp_path, monkeypatch):
    data = lambda: clips(4)  # noqa: E731
    first = make_extractor("self", data=data, cache=tmp_path)
    monkeypatch.setattr(self_trained, "train", lambda *args: pytest.fail("it was trained again"))
    second = make_extractor("self", data=data, cache=tmp_path)
    assert (second.digest, second.protocol) == (first.digest, first.protocol)
    assert torch.equal(first(clips(2))["clip"], second(clips(2))["clip"])


def test_a_damaged_cache_is_replaced(tmp_path, caplog):
    first = make_extractor("self", data=lambda: clips(4), cache=tmp_path)
    (path,) = tmp_path.glob(".rin-video-self-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), b"nothing"):
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rin_video"):
            assert make_extractor("self", data=lambda: clips(4), cache=tmp_path).digest == first.digest
        assert "is damaged: the extractor self is trained again" in caplog.text
        assert make_extractor("self", data=lambda: clips(4), cache=tmp_path).digest == first.digest


class Folder(Dataset):
    """A dataset of clips whose files are in a folder."""

    def __init__(self, root: Path, x: torch.Tensor) -> None:
        self.root, self.x = root, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "label": index % 2}


def test_the_cache_is_beside_the_data_or_in_the_given_folder(tmp_path, monkeypatch):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    extractor = make_extractor("self", data=Folder(folder, clips(4)), cache=cache)
    assert list(folder.glob(".rin-video-self-*.safetensors"))
    assert not cache.exists()
    assert extractor.protocol["training"]["classes"] == 2
    monkeypatch.setattr(self_data.os, "access", lambda *args: False)  # as in a folder that is read-only
    make_extractor("self", data=Folder(folder, clips(5)), cache=cache)
    assert list(cache.glob(".rin-video-self-*.safetensors"))


def test_without_a_place_for_the_cache_it_is_trained_each_time(caplog):
    make_extractor("self", data=lambda: clips(3))
    assert "cannot be cached: no folder to write to" in caplog.text


def test_images_of_a_folder_and_their_classes(tmp_path):
    for number, image in enumerate(clips(6)[:, :, 0]):
        save_samples(image[None], tmp_path / "abc"[number % 3] / f"{number}.png")
    data = ImageFolder(tmp_path, 16)
    extractor = make_extractor("self", data=data)
    assert extractor.kinds == ("image",)
    assert extractor.protocol["training"]["classes"] == 3
    assert extractor.protocol["training"]["tasks"] == list(CHANGES)
    assert extractor(clips(2)[:, :, 0])["image"].shape == (2, 16)
    assert len(ImageFolder(tmp_path, 16)) == 6  # the cache is no data
    with pytest.raises(UsageError, match="self takes images, and the samples are clips"):
        extractor(clips(2))


def test_wide_clips_keep_their_proportions_and_small_ones_their_size(tmp_path):
    assert self_trained.fit_size((64, 128)) == (32, 64)
    assert self_trained.fit_size((16, 8)) == (16, 8)
    assert self_trained.fit_size((1000, 4)) == (64, 1)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (None, "self is trained on data: pass --data"),
        (lambda: clips(0), "the data has no sample"),
        (lambda: torch.zeros(3, 2, 8), "not samples of shape"),
        ([torch.zeros(3, 8, 16, 16), torch.zeros(3, 9, 16, 16)], "sample 1 has shape .*: use data of one size"),
    ],
)
def test_unusable_data_is_refused_in_one_line(data, problem, tmp_path):
    with pytest.raises(UsageError, match=problem) as caught:
        make_extractor("self", data=data, cache=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_it_learns_the_order_of_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(self_trained, "STEPS", 300)
    rng = np.random.default_rng(0)
    x = torch.stack([torch.from_numpy(render_clip(list(SHAPES)[i % 3], 32, 16, rng)) for i in range(150)])
    extractor = make_extractor("self", data=lambda: (x, torch.arange(150) % 3), cache=tmp_path)
    assert extractor.protocol["training"]["task_accuracy"] > 0.35  # by chance: 0.11
