"""Clips consist of the right frames, the same in every worker, and short or broken files are reported."""

import pickle
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from rin_video.datasets import ClipFolder
from rin_video.errors import UsageError


@pytest.fixture
def folder(tmp_path, clips):
    """Two classes with three clips that decord can read and one that it cannot, and two unusable files."""
    for name in ("a/plain.mp4", "a/short_gop.mp4", "b/vp9.webm", "b/mpeg4.avi", "b/one_frame.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(clips / name[2:], tmp_path / name)
    (tmp_path / "a/broken.mp4").write_bytes(b"\0" * 1000)
    return tmp_path


def test_a_clip_is_its_frames_at_the_stride(clips, numbers):
    data = ClipFolder(clips / "plain.mp4", (32, 64), 5, stride=3)
    assert data.shape == (3, 5, 32, 64)
    starts = set()
    for epoch in range(40):
        data.set_epoch(epoch)
        found = numbers(data[0]["x"].transpose(0, 1))
        assert found == list(range(found[0], found[0] + 13, 3))
        starts.add(found[0])
    assert starts == set(range(8))  # 20 frames, of which 13 are used


def test_fps_takes_the_nearest_frame_in_time(clips, numbers):
    data = ClipFolder(clips / "plain.mp4", (32, 64), 4, fps=4)
    found = numbers(data[0]["x"].transpose(0, 1))
    assert found == list(range(found[0], found[0] + 7, 2))
    data = ClipFolder(clips / "variable_rate.mp4", (32, 64), 7, fps=5.8)  # near 0, 5, 10, 15, 20, 26, 31
    assert numbers(data[0]["x"].transpose(0, 1)) == [0, 3, 5, 6, 7, 8, 9]
    assert "16 of 16 clips below 100 fps: some frames repeat" in ClipFolder(clips, 8, 4, fps=100).describe()


def test_clips_are_the_same_in_every_worker_and_differ_by_epoch(folder):
    data = ClipFolder(folder, 24, 6, augment_horizontal_flip=True, crop="random", seed=3)
    alone = [item["x"] for item in data]
    for workers in (1, 2):
        loader = DataLoader(data, batch_size=None, num_workers=workers, timeout=60)
        torch.testing.assert_close([item["x"] for item in loader], alone)
    torch.testing.assert_close([item["x"] for item in pickle.loads(pickle.dumps(data))], alone)
    data.set_epoch(1)
    assert any(not torch.equal(item["x"], before) for item, before in zip(data, alone, strict=True))


def test_workers_that_stay_see_the_next_epoch(folder):
    data = ClipFolder(folder, 16, 2)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True, timeout=60)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        torch.testing.assert_close([item["x"] for item in loader], [item["x"] for item in data])


def test_all_frames_share_crop_and_flip(clips):
    data = ClipFolder(clips / "plain.mp4", 24, 20, augment_horizontal_flip=True, crop="random")
    frames = data[0]["x"][0].float()
    corner = (frames > 230).float()
    torch.testing.assert_close(corner[1:15], corner[:14])


def test_labels_skips_and_decoders_are_reported(folder):
    data = ClipFolder(folder, 16, 6, channels=1)
    assert data.classes == ["a", "b"]
    assert [item["label"] for item in data] == [0, 0, 1, 1]
    assert data[0]["x"].shape == (1, 6, 16, 16)
    assert sorted(path.name for path, _ in data.skipped) == ["broken.mp4", "one_frame.mp4"]
    said = data.describe()
    assert "4 clips, 32x64, 20 frames" in said
    assert "2 classes: a, b" in said
    assert "pyav for" in said
    assert "one_frame.mp4 has 1 frame, but 6 are needed" in said


def test_decord_by_name_reads_what_it_reads_right_and_pyav_the_rest(folder, clips, numbers):
    pytest.importorskip("decord")
    data = ClipFolder(folder, (32, 64), 6, decoder="decord")
    assert "decoders: decord for 3, pyav for 1" in data.describe()
    assert {info.decoder for info in data.infos} == {"decord", "pyav"}
    for index in range(4):
        assert numbers(data[index]["x"].transpose(0, 1)) == data.frames_of(index, 0)
    assert "decoders: pyav for 4" in ClipFolder(folder, 16, 6, decoder="pyav").describe()


def test_too_short_names_file_numbers_and_remedy(clips):
    with pytest.raises(
        UsageError, match=r"plain\.mp4 has 20 frames, but 25 are needed .*: use --frames 10, or a smaller"
    ):
        ClipFolder(clips / "plain.mp4", 16, 13, stride=2)
    ClipFolder(clips / "plain.mp4", 16, 10, stride=2)
    with pytest.raises(UsageError, match=r"plain\.mp4 lasts 2\.50 s.*use --frames 5, or a higher"):
        ClipFolder(clips / "plain.mp4", 16, 9, fps=2)
    ClipFolder(clips / "plain.mp4", 16, 5, fps=2)


@pytest.mark.parametrize(
    "wrong", [{"frames": 0}, {"stride": 0}, {"fps": 0}, {"fps": 4, "stride": 2}, {"channels": 4}, {"decoder": "vlc"}]
)
def test_wrong_settings_are_usage_errors(clips, wrong):
    with pytest.raises(UsageError):
        ClipFolder(**{"root": clips, "image_size": 16, "frames": 4, **wrong})
