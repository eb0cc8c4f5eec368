"""Written files read back unchanged and play in a browser; what cannot be written gives an error and no file."""

import logging

import av
import numpy as np
import pytest
import torch
from PIL import Image

from rin_video.cli.context import read_context
from rin_video.cli.convert import export, load_media
from rin_video.config import DataConfig
from rin_video.datasets.decoding import Video, open_video
from rin_video.errors import UsageError
from rin_video.media import contact_sheet, save_samples, video_grid, write_image_grid, write_video


def psnr(pixels, clip):
    return -10 * torch.log10(((pixels.float() / 255 - clip) ** 2).mean()).item()


def test_mp4_survives_a_round_trip_and_plays_in_browsers(tmp_path, gradient):
    path = tmp_path / "clip.mp4"
    write_video(gradient, path, fps=12)
    read, fps = load_media(path)
    assert read.shape == gradient.shape
    assert fps == 12
    assert psnr(read, gradient) > 35
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_colours_are_kept(tmp_path):
    clip = torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 16, 16)  # a red, a green and a blue frame
    write_video(clip, tmp_path / "clip.mp4", crf=1)
    torch.testing.assert_close(load_media(tmp_path / "clip.mp4")[0] / 255, clip, atol=0.04, rtol=0)


def test_the_same_frames_give_the_same_file(tmp_path):
    """Without cpu-independent x264 gives other bytes for a quarter of such clips: it reads uninitialised memory."""
    rng = np.random.default_rng(0)
    for seed in range(12):
        clip = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 12, 18, 32), dtype=np.uint8))
        written = set()
        for value in range(4):
            rubbish = [np.full(size, value * 70, np.uint8) for size in rng.integers(1000, 100_000, 20)]
            write_video(clip, tmp_path / "clip.mp4")
            written.add((tmp_path / "clip.mp4").read_bytes())
            del rubbish
        assert len(written) == 1


def test_odd_sizes_are_padded_with_a_warning(tmp_path, gradient):
    clip = gradient[:, :, :31, :45]
    with pytest.warns(UserWarning, match="padded from 31x45 to 32x46"):
        write_video(clip, tmp_path / "odd.mp4")
    read, _ = load_media(tmp_path / "odd.mp4")
    assert read.shape[2:] == (32, 46)
    assert psnr(read[:, :, :31, :45], clip) > 33


@pytest.mark.parametrize("fps", [7.0, 12.5, 24.0, 29.97])
def test_gif_keeps_frames_and_rate(tmp_path, gradient, fps):
    write_video(gradient, tmp_path / "clip.gif", fps)
    read, read_fps = load_media(tmp_path / "clip.gif")
    assert read.shape == gradient.shape
    assert read_fps == pytest.approx(fps, rel=0.03)  # GIF durations are in hundredths of a second
    assert psnr(read, gradient) > 23


def test_numpy_uint8_and_grey_are_accepted(tmp_path, gradient):
    write_video((gradient * 255).byte().numpy(), tmp_path / "a.mp4")
    write_video(gradient[:1], tmp_path / "b.mp4")
    with open_video(tmp_path / "b.mp4") as video:
        assert psnr(video.read(range(8)).transpose(0, 1), gradient[:1].expand(3, -1, -1, -1)) > 35


@pytest.mark.parametrize(
    ("clip", "match"),
    [
        (torch.full((3, 2, 8, 8), 1.5), "from 1.5 to 1.5"),
        (torch.full((3, 2, 8, 8), -0.1), "from -0.1 to -0.1"),
        (torch.full((3, 2, 8, 8), torch.nan), "from nan to nan"),
        (torch.zeros(3, 2, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(2, 4, 8, 8), "1 or 3 channels"),
        (torch.zeros(3, 8, 8), "C, F, H, W"),
        (torch.zeros(3, 0, 8, 8), "shape"),
    ],
)
def test_what_is_no_clip_is_an_error_with_the_numbers(tmp_path, clip, match):
    with pytest.raises(UsageError, match=match):
        write_video(clip, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(tmp_path, gradient):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"before")
    with pytest.raises(Exception, match="crf"):
        write_video(gradient, path, crf="no number")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_grids_and_sheets_hold_the_frames(tmp_path, gradient):
    clips = torch.stack([gradient, gradient.flip(1)])
    contact_sheet(clips, tmp_path / "sheet.png", max_frames=4, upscale=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 64 + 3 * 2, 4 * 128 + 5 * 2, 3)
    first = torch.from_numpy(sheet[2:66:2, 2:130:2].copy()).permute(2, 0, 1)
    assert psnr(first, gradient[:, 0]) > 50
    write_image_grid(clips[:, :, 0], tmp_path / "grid.png", columns=1)
    assert Image.open(tmp_path / "grid.png").size == (64 + 4, 2 * 32 + 6)
    assert video_grid(clips).shape == (3, 8, 32 + 4, 2 * 64 + 6)
    assert video_grid(clips[:1]).shape == (3, 8, 32, 64)


def test_samples_are_saved_as_the_path_says(tmp_path, gradient):
    clips, images = torch.stack([gradient] * 3), torch.rand(3, 3, 8, 8)
    for name in ("a.mp4", "a.gif", "a.png"):
        assert save_samples(clips, tmp_path / name) == [tmp_path / name]
    for name in ("b.png", "b.jpg", "b.webp"):
        assert save_samples(images, tmp_path / name) == [tmp_path / name]
    assert [path.name for path in save_samples(clips, tmp_path / "clips")] == ["0000.mp4", "0001.mp4", "0002.mp4"]
    assert [path.name for path in save_samples(images, tmp_path / "images")] == ["0000.png", "0001.png", "0002.png"]
    assert all(path.exists() for path in tmp_path.rglob("*"))
    for suffix in (".npy", ".safetensors"):
        save_samples(images, tmp_path / f"c{suffix}")
        torch.testing.assert_close(load_media(tmp_path / f"c{suffix}")[0], images)
        save_samples(torch.rand(2, 1, 9), tmp_path / f"sequences{suffix}")
    with pytest.raises(UsageError, match=r"images cannot be written as \.mp4"):
        save_samples(images, tmp_path / "d.mp4")
    with pytest.raises(UsageError, match=r"\.npy or \.safetensors"):
        save_samples(torch.rand(2, 1, 9), tmp_path / "d.png")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 9, 3), (3, 8, 9)),
        ((5, 8, 9, 3), (3, 5, 8, 9)),
        ((2, 5, 8, 9, 3), (2, 3, 5, 8, 9)),
        ((3, 5, 8, 9), (3, 5, 8, 9)),
        ((2, 3, 8, 9), (2, 3, 8, 9)),
        ((2, 1, 5, 8, 9), (2, 1, 5, 8, 9)),
    ],
)
def test_arrays_are_turned_channels_first(tmp_path, shape, expected):
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype=np.float32))
    assert load_media(tmp_path / "a.npy")[0].shape == expected


def test_arrays_that_cannot_be_pictures_are_errors(tmp_path):
    for name, array in {
        "shape": np.zeros((7, 8, 9)),
        "range": np.full((3, 8, 9), 7.0),
        "pickle": np.array([{}]),
    }.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(UsageError, match=rf"{name}\.npy"):
            load_media(tmp_path / f"{name}.npy")


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    for index in (1, 2, 10):
        Image.new("L", (6, 4), index).save(tmp_path / f"frame{index}.png")
    clip, fps = load_media(tmp_path)
    assert clip[0, :, 0, 0].tolist() == [1, 2, 10]
    assert fps is None
    Image.new("L", (6, 5)).save(tmp_path / "frame3.png")
    with pytest.raises(UsageError, match=r"frame3\.png is 5x6, but frame1\.png is 4x6"):
        load_media(tmp_path)


def test_export_converts_and_reports(tmp_path, gradient):
    np.save(tmp_path / "clip.npy", gradient[:, :, :31].numpy())
    said = export(tmp_path / "clip.npy", tmp_path / "clip.mp4", fps=5)
    assert "8 frames of 31x64" in said
    assert "5 fps" in said
    assert "padded from 31x64 to 32x64" in said
    said = export(tmp_path / "clip.mp4", tmp_path / "clip.gif")
    assert "5 fps" in said
    export(tmp_path / "clip.gif", tmp_path / "clip.png")
    with pytest.raises(UsageError, match="is also the input"):
        export(tmp_path / "clip.mp4", tmp_path / "clip.mp4")
    with pytest.raises(UsageError, match=r"\.mp4, \.gif, \.png"):
        export(tmp_path / "clip.mp4", tmp_path / "clip.flv")
    with pytest.raises(UsageError, match="there is no file or folder"):
        export(tmp_path / "nowhere", tmp_path / "a.mp4")


@pytest.fixture
def reads(monkeypatch):
    """The number of frames and the size of each call of `Video.read`."""
    found = []
    real = Video.read

    def read(self, indices, size=None):
        found.append((len(indices), size or self.size))
        return real(self, indices, size)

    monkeypatch.setattr(Video, "read", read)
    return found


def test_no_more_of_a_film_is_read_than_is_written(tmp_path, numbered, numbers, reads, monkeypatch):
    path = numbered(tmp_path / "film.mp4")
    export(path, tmp_path / "sheet.png")
    assert [count for count, _ in reads] == [8]
    reads.clear()
    monkeypatch.setattr("rin_video.cli.convert.BLOCK_PIXELS", 6 * 32 * 64)
    said = export(path, tmp_path / "copy.mp4")
    assert [count for count, _ in reads] == [6, 6, 6, 2]
    assert "20 frames of 32x64, 8 fps" in said
    with open_video(tmp_path / "copy.mp4") as video:
        assert numbers(video.read(range(20))) == list(range(20))
    odd = numbered(tmp_path / "odd.mkv", frames=2, size=(33, 51), pix_fmt="yuv444p")
    assert "padded from 33x51 to 34x52" in export(odd, tmp_path / "odd.mp4")


def test_a_context_is_measured_before_it_is_read_and_read_small(tmp_path, numbered, reads):
    path = numbered(tmp_path / "film.mp4", size=(64, 128))
    with pytest.raises(UsageError, match=r"has 20 frames at this stride or rate, not 30"):
        read_context(path, (3, 16, 16, 16), DataConfig(), 1, 30)
    assert reads == []
    assert read_context(path, (3, 16, 16, 16), DataConfig(stride=2), 2, 5, length=16).shape == (2, 3, 5, 16, 16)
    assert reads == [(5, (16, 32))]


def test_of_a_context_as_long_as_the_samples_the_start_is_taken(tmp_path, numbered, numbers, caplog):
    path = numbered(tmp_path / "film.mp4")
    caplog.set_level(logging.INFO)
    for frames, length, most, taken in ((None, 16, 8, 8), (None, 20, 99, 19), (None, 2, 1, 1), (None, 21, 8, 20)):
        context = read_context(path, (3, 16, 32, 64), DataConfig(), 1, frames, length, most)
        assert numbers(context[0].transpose(0, 1)) == list(range(taken))
    assert "context: the first 8 frames of 20 in" in caplog.text
    assert "context: the first 1 frame of 20 in" in caplog.text
    assert len(caplog.records) == 3


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (3, 1, 16, 16), (1, 3, 16, 16), (1, 1, 16, 16), (5, 3, 16, 16)])
def test_an_array_of_rank_four_is_written_as_a_clip_to_clip_formats(tmp_path, shape):
    """Channels come first, or frames if the first axis cannot be channels. As PNG it is a grid of images."""
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    export(tmp_path / "x.npy", tmp_path / "x.mp4")
    with open_video(tmp_path / "x.mp4") as video:
        assert video.num_frames == (shape[1] if shape[0] in (1, 3) else shape[0])
