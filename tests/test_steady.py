"""Animated images, short clips and variable frame rates in `export` and `prepare`."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from rin_video import RIN, GaussianDiffusion, Trainer, cli
from rin_video.cli.convert import export, load_media
from rin_video.datasets import ClipFolder, open_video
from rin_video.datasets.adapters import adapt
from rin_video.datasets.steady import frame_rate, is_steady, steady_frames
from rin_video.wording import counted


def animation(path, levels, durations):
    first, *rest = [Image.new("RGB", (32, 16), (level,) * 3) for level in levels]
    exactly = {".webp": {"lossless": True}, ".avif": {"quality": 100}}.get(path.suffix, {})
    first.save(path, save_all=True, append_images=rest, duration=durations, **exactly)
    return path


def levels_of(path):
    with open_video(path) as video:
        frames = video.read(range(video.num_frames))
    H, W = video.size
    return frames[:, 0, H // 2 + 2, W // 2 + 2].tolist(), video.fps


@pytest.mark.parametrize("times", [[0, 0.033, 0.067, 0.1, 0.133], [0], [0, 0.02, 0.05, 0.07], [0, 1.5]])
def test_rounded_stamps_are_steady(times):
    assert is_steady(np.array(times))
    assert steady_frames(np.array(times), 1.0, 12.5) == (list(range(len(times))), 12.5)


def test_the_nearest_frame_of_a_regular_grid():
    frames, fps = steady_frames(np.array([0, 0.1, 0.5, 0.6]), 0.8, 5)
    assert fps == 10
    assert frames == [0, 1, 1, 1, 2, 2, 3, 3]
    many, rate = steady_frames(np.array([0, 0.001, 10]), 20, 0.15)
    assert rate <= 12 / 20
    assert len(many) == 12


@pytest.mark.parametrize("suffix", [".webp", ".apng", ".png", ".avif", ".gif"])
def test_pictures_that_move_are_exported_with_all_their_frames(tmp_path, suffix):
    if suffix == ".avif" and "AVIF" not in (Image.init() or Image.SAVE):
        return
    source = animation(tmp_path / f"a{suffix}", [0, 60, 120, 180], [100, 100, 300, 100])
    said = export(source, tmp_path / "out.mp4")
    levels, fps = levels_of(tmp_path / "out.mp4")
    assert fps == pytest.approx(10)
    assert (
        np.abs(np.array(levels[:6]) - [0, 60, 120, 120, 180, 180]).max() < 8
    )  # for 0.4 s, the frame at 0.5 s is nearer than that at 0.2 s
    assert "10 fps" in said


def test_a_picture_of_one_frame_is_a_picture(tmp_path):
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    media, fps = load_media(tmp_path / "a.png")
    assert (media.shape, fps) == ((3, 8, 8), None)


@pytest.mark.parametrize("frames", [1, 3])
def test_clips_of_one_or_three_frames_are_clips(tmp_path, numbered, frames):
    numbered(tmp_path / "a.mp4", frames=frames)
    said = export(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert f"{counted(frames, 'frame')} of 32x64" in said
    assert len(levels_of(tmp_path / "b.mp4")[0]) == frames
    for i in range(frames):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (50 * i,) * 3).save(tmp_path / "folder" / f"{i}.png")
    assert f"{counted(frames, 'frame')} of 8x8" in export(tmp_path / "folder", tmp_path / "c.mp4")
    animation(tmp_path / "d.png", [0, 99, 200][:frames], 100)
    assert export(tmp_path / "d.png", tmp_path / "d.webp" if frames == 1 else tmp_path / "d.mp4")
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 8, 8), np.uint8))
    assert "2 images of 8x8" in export(tmp_path / "images.npy", tmp_path / "e.png")


def test_a_variable_rate_is_exported_in_its_time(tmp_path, clips):
    """The frames have times 0, 1, 2, 5, 6, 10, 20, 21, 22, 30 in 1/30 s, and grey levels 10, 20, ..."""
    said = export(clips / "variable_rate.mp4", tmp_path / "out.mp4")
    assert "the rate varies, so the nearest frames at 30 fps are used" in said
    levels, fps = levels_of(tmp_path / "out.mp4")
    assert fps == pytest.approx(30)
    shown = [round(level / 10) - 1 for level in levels]
    assert [shown[i] for i in (0, 1, 2, 5, 6, 10, 20, 21, 22, 30)] == list(range(10))
    assert load_media(clips / "variable_rate.mp4")[0].shape[1] == len(shown)


def test_prepare_keeps_the_time_of_a_variable_rate(tmp_path, clips, monkeypatch, capsys, numbers):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", str(clips / "variable_rate.mp4"), "--size", "32x64", "--out", "shards"]) == 0
    assert "1 of 1 clip had a variable frame rate (resampled to the nearest frames)" in capsys.readouterr().out
    (length,) = [info.num_frames for info in ClipFolder(tmp_path / "shards", (32, 64), 1).infos]
    data = ClipFolder(tmp_path / "shards", (32, 64), length)
    shown = numbers(data.draw(0, 0)["x"].transpose(0, 1))
    assert data.infos[0].fps == pytest.approx(30)
    assert [shown[i] for i in (0, 1, 2, 5, 6, 10, 20, 21, 22, 30)] == list(range(10))


@pytest.mark.parametrize("frames", [1, 5])
def test_prepare_takes_short_clips(tmp_path, numbered, monkeypatch, capsys, frames):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    numbered(tmp_path / "data/a.mp4", frames=frames)
    assert cli.main(["prepare", str(tmp_path / "data"), "--size", "8", "--out", "shards"]) == 0
    assert f"clips of {'4 frames' if frames == 5 else '1 frame'} per second from the source" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "rate"), [({}, 8), ({"stride": 2}, 4), ({"fps": 5}, 5), ({"span": "whole"}, 1.6)])
def test_samples_play_at_the_rate_of_the_data(tmp_path, numbered, options, rate):
    (tmp_path / "data").mkdir()
    numbered(tmp_path / "data/a.mp4")
    data = ClipFolder(tmp_path / "data", 8, 4, **options)
    assert frame_rate(data) == pytest.approx(rate)
    assert frame_rate(adapt(ConcatDataset([Subset(data, [0])]))) == pytest.approx(rate)
    assert frame_rate(adapt([torch.rand(3, 4, 8, 8)])) is None


def test_a_run_samples_at_the_rate_of_its_data(tmp_path, numbered):
    (tmp_path / "data").mkdir()
    numbered(tmp_path / "data/a.mp4", times=range(8))  # 30 fps
    heads = {"num_heads": 2, "latent_num_heads": 2}
    model = RIN(dim=32, num_latents=6, depth=1, image_size=8, frames=4, patch_size=(2, 4, 4), **heads)
    run = Trainer(
        GaussianDiffusion(model), tmp_path / "data", results_folder=tmp_path / "run", num_samples=1, num_workers=0,
        train_num_steps=1, train_batch_size=1, progress=False,
    )  # fmt: skip
    assert run.config.sample.fps == pytest.approx(30)
    run.config.sample.steps = 1
    run.train()
    assert levels_of(tmp_path / "run/samples/step-00000001.mp4")[1] == pytest.approx(30)
    out = tmp_path / "sample.mp4"
    for more, rate in ((), 30), (("--fps", "5"), 5), (("sample.fps=6",), 6):
        assert cli.main(["sample", str(tmp_path / "run"), "--num", "1", "--steps", "1", "--out", str(out), *more]) == 0
        assert levels_of(out)[1] == pytest.approx(rate)
