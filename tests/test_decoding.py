"""read([i]) returns frame i, for every kind of file, in any order, with every decoder that supports the file."""

import importlib.machinery
import os
import random
import sys
import types
from unittest import mock

import av
import pytest
import torch

from rin_video.datasets import backends, decoding
from rin_video.datasets.backends import DECODERS, DecordReader, PyAVReader, suits, torchcodec_problem
from rin_video.datasets.decoding import OPEN_FILES, Video, backends_for, open_cached, open_video, probe_video
from rin_video.datasets.video_info import LostFramesError, pack_table, unpack_table
from rin_video.errors import UsageError
from rin_video.media import write_video

NUM_FRAMES = {"variable_rate.mp4": 10, "one_frame.mp4": 1}
NAMES = [
    "plain.mp4",
    "short_gop.mp4",
    "scene_cuts.mp4",
    "open_gop.mp4",
    "odd.mkv",
    "vp9.webm",
    "mpeg4.avi",
    "b_frames.avi",
    "variable_rate.mp4",
    "one_frame.mp4",
    "animation.gif",
    "animation.webp",
    "av1.mp4",
    "ten_bits.mp4",
    "with_sound.mp4",
    "turned.mp4",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_is_the_one_asked_for(clips, numbers, decoder, name):
    path = clips / name
    if not suits(decoder, probe_video(path)):
        with pytest.raises(UsageError, match=r"data\.decoder="):
            open_video(path, decoder)
        return
    with open_video(path, decoder) as video:
        order = list(range(video.num_frames))
        assert len(order) == NUM_FRAMES.get(name, 20)
        assert numbers(video.read(order)) == order
        for index in reversed(order):
            assert numbers(video.read([index])) == [index]
        random.Random(0).shuffle(order)
        assert numbers(video.read(order)) == order
        assert numbers(video.read([order[0]] * 3)) == [order[0]] * 3
    for index in (video.num_frames - 1, video.num_frames // 2):
        with open_video(path, decoder) as fresh:
            assert numbers(fresh.read([index])) == [index]


@pytest.mark.parametrize("name", NAMES)
def test_decoders_agree(clips, name):
    """They agree on the pixels, and on pixels that are resized while decoding, apart from rounding."""
    info = probe_video(clips / name)
    frames, small = [], []
    for decoder in backends_for(info):
        with open_video(clips / name, decoder, info) as video:
            frames.append(video.read([info.num_frames - 1, 0]))
            small.append(video.read([info.num_frames - 1, 0], (16, 16)))
    for one, other in zip(frames[1:], small[1:], strict=True):
        torch.testing.assert_close(one, frames[0], atol=1, rtol=0)
        assert other.shape == (2, 3, 16, 16)
        assert (other.int() - small[0].int()).abs().float().mean() < 2
    assert small[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video", "libsvtav1", "libvpx-vp9"])
def test_skipped_frames_change_no_pixel(tmp_path, codec):
    """PyAV skips frames that are neither requested nor referred to: most B frames, if the codec marks them."""
    path = tmp_path / "drift.mp4"
    noise = torch.randint(0, 256, (3, 64, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {"g": "12", "bf": "2", "x265-params": "log-level=none:keyint=12", "preset": "12"}
    options = {name: value for name, value in options.items() if name != "preset" or codec == "libsvtav1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for f in range(40):
            picture = noise.roll(f, -1)[..., :64].permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with open_video(path, "pyav") as video:
        every = video.read(range(40))
        for wanted in ([39], [7], [3, 30], range(1, 40, 4), [20, 5, 20]):
            assert torch.equal(video.read(list(wanted)), every[list(wanted)])


def test_auto_never_takes_decord_and_decord_only_what_is_plain(clips):
    for name in NAMES:
        assert "decord" not in backends_for(probe_video(clips / name))
    for name in ("scene_cuts.mp4", "open_gop.mp4", "b_frames.avi", "animation.gif", "turned.mp4"):
        with pytest.raises(UsageError, match=r"data.decoder=pyav|not installed"):
            open_video(clips / name, "decord")
        assert "decord" not in backends_for(probe_video(clips / name), "decord", strict=False)
    if not torchcodec_problem():
        with open_video(clips / "plain.mp4") as video:
            assert video.backend == "torchcodec"
    assert backends_for(probe_video(clips / "animation.webp")) == ["pillow"]


def test_torchcodec_that_does_not_work_is_skipped_with_the_reason(clips, monkeypatch):
    """Without a shared FFmpeg it can be imported, but opening a file fails."""
    module = types.ModuleType("torchcodec")
    module.__spec__ = importlib.machinery.ModuleSpec("torchcodec", None)
    module.decoders = types.SimpleNamespace(VideoDecoder=lambda *_: (_ for _ in ()).throw(OSError("no libavutil.so")))
    monkeypatch.setitem(sys.modules, "torchcodec", module)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module.decoders)
    torchcodec_problem.cache_clear()
    try:
        assert "torchcodec" not in backends_for(probe_video(clips / "plain.mp4"))
        with pytest.raises(UsageError, match=r"torchcodec cannot be used here \(no libavutil\.so\)"):
            open_video(clips / "plain.mp4", "torchcodec")
    finally:
        torchcodec_problem.cache_clear()


def test_playlists_are_not_followed(tmp_path, clips):
    """FFmpeg would open the files that playlists name."""
    for name, text in (
        ("list.mp4", f"ffconcat version 1.0\nfile {clips / 'plain.mp4'}\n"),
        ("live.mp4", f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{clips / 'plain.mp4'}\n#EXT-X-ENDLIST\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match="cannot be read"):
            open_video(tmp_path / name)


def test_videos_that_stay_open_are_few_and_each_process_has_its_own(tmp_path, numbered):
    files = [numbered(tmp_path / f"{i}.mp4", frames=2) for i in range(OPEN_FILES + 3)]
    videos = [open_cached(file, "pyav", probe_video(file)) for file in files]
    assert open_cached(files[-1], "pyav", videos[-1].info) is videos[-1]
    assert open_cached(files[0], "pyav", videos[0].info) is not videos[0]
    from rin_video.datasets import decoding

    assert len(decoding._open[os.getpid()]) == OPEN_FILES


def test_tables_survive_packing():
    for values in ([0], [0, 1, 2, 5, 9], list(range(0, 10**7, 512)), [-3, 0, 2**40]):
        assert unpack_table(pack_table(values)).tolist() == values
    assert len(pack_table(range(0, 10**6, 512))) < 100


def test_another_backend_is_used_if_one_fails_or_returns_other_frames(tmp_path, numbered, numbers, monkeypatch):
    class Failing(PyAVReader):
        def read(self, indices, size):
            frames = super().read(indices, None)
            if 7 in indices:
                raise RuntimeError("as decord raises")
            return frames

    class Misfit(PyAVReader):  # like the checks of decord and torchcodec
        def read(self, indices, size):
            raise UsageError("another size")

    path = numbered(tmp_path / "a.mp4")
    monkeypatch.setitem(DECODERS, "torchcodec", Failing)
    with Video(path, probe_video(path), ["torchcodec", "pyav"]) as video:
        assert numbers(video.read([2])) == [2]
        assert video.backend == "torchcodec"
        assert numbers(video.read([7, 2])) == [7, 2]
        assert video.backend == "pyav"
    monkeypatch.setitem(DECODERS, "decord", Misfit)
    with Video(path, probe_video(path), ["decord", "torchcodec", "pyav"]) as video:
        assert numbers(video.read([2, 3])) == [2, 3]
        assert video.backend == "torchcodec"
    with open_video(path, "torchcodec") as video:
        for _ in range(2):  # a video can be read again after a failed read
            with pytest.raises(UsageError, match=r"a\.mp4 cannot be read: as decord raises"):
                video.read([7, 2])
            assert numbers(video.read([2])) == [2]


def test_decord_is_refused_if_its_pixels_differ(clips, monkeypatch):
    pytest.importorskip("decord")
    path = clips / "short_gop.mp4"
    monkeypatch.setattr(backends, "_verified", set())
    with open_video(path, "decord") as video:
        assert video.backend == "decord"
    monkeypatch.setattr(backends, "_verified", set())
    right = DecordReader.read
    monkeypatch.setattr(DecordReader, "read", lambda self, i, size: right(self, [k // 4 * 4 for k in i], size))
    with pytest.raises(UsageError, match="decord returns other frames"):
        open_video(path, "decord")
    assert suits("decord", probe_video(path))


def test_times_are_those_of_the_frames(clips):
    torch.testing.assert_close(
        torch.from_numpy(probe_video(clips / "variable_rate.mp4").times * 30),
        torch.tensor([0, 1, 2, 5, 6, 10, 20, 21, 22, 30], dtype=torch.float64),
        atol=1e-3,
        rtol=0,
    )
    assert probe_video(clips / "animation.gif").fps == pytest.approx(1 / 0.12)
    assert probe_video(clips / "plain.mp4").fps == 8


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_rotation_is_applied(tmp_path, numbered, decoder, rotation, corner):
    """The white corner is at the upper left of the stored frames."""
    if decoder != "pyav":  # other decoders are not used for rotated clips
        return
    try:
        path = numbered(tmp_path / "turned.mp4", frames=3, rotation=rotation)
    except AttributeError:
        pytest.skip("this PyAV cannot write a rotation")
    with open_video(path, decoder) as video:
        assert video.size == ((32, 64) if rotation == 180 else (64, 32))
        frame = video.read([1])[0]
    assert frame.shape[1:] == video.size
    assert frame[1][corner] > 200
    assert frame[1][0, 0] < 100


def test_a_truncated_file_is_read_to_its_end(tmp_path, numbered, numbers):
    whole = numbered(tmp_path / "whole.mkv", frames=20, options={"g": "4"}).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with open_video(path) as video:
        assert 0 < video.num_frames < 20
        last = video.num_frames - 2
        assert numbers(video.read([last, 0])) == [last, 0]


@pytest.mark.parametrize("content", [random.Random(0).randbytes(20_000), b"", b"\0" * 5000, b"not a video"])
def test_files_that_are_not_videos_are_reported(tmp_path, content):
    path = tmp_path / "noise.mp4"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"noise\.mp4 cannot be read" if content else r"noise\.mp4 is empty: download"):
        open_video(path)


def test_cut_header_missing_file_and_unknown_names_are_usage_errors(tmp_path, clips):
    path = tmp_path / "cut.mp4"
    path.write_bytes((clips / "plain.mp4").read_bytes()[:1500])
    with pytest.raises(UsageError, match=r"cut\.mp4"):
        open_video(path)
    with pytest.raises(UsageError, match="there is no file"):
        open_video(tmp_path / "nowhere.mp4")
    with pytest.raises(UsageError, match="auto, torchcodec, decord, pyav"):
        open_video(clips / "plain.mp4", "vlc")


def test_frames_that_are_not_there_are_index_errors(clips):
    with open_video(clips / "plain.mp4") as video:
        for index in (20, -1):
            with pytest.raises(IndexError, match="20 frames"):
                video.read([0, index])
        assert video.read([]).shape == (0, 3, 32, 64)


@pytest.fixture
def short_clips(tmp_path):
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    for i, path in enumerate(paths):
        write_video(torch.rand(3, 6, 16, 16, generator=torch.Generator().manual_seed(i)), path)
    return [(path, probe_video(path)) for path in paths]


def test_frames_of_small_files_are_decoded_once(short_clips):
    path, info = short_clips[0]
    cache = decoding.FrameCache()
    with decoding.Video(path, info, backends_for(info), keep=cache) as video, open_video(path, info=info) as other:
        decode = mock.Mock(side_effect=video.decode)
        with mock.patch.object(video, "decode", decode):
            for indices in ([0, 2, 4], [5, 5, 1]):
                for size in (None, (8, 8)):
                    assert torch.equal(video.read(indices, size), other.read(indices, size))
        assert decode.call_count == 2  # once for each size
        assert video.read([]).shape == (0, 3, 16, 16)
        with pytest.raises(IndexError, match="frame 6 does not exist"):
            video.read([6])
        video.read([1])[:] = 0  # what is returned is not the kept frame
        assert torch.equal(video.read([1]), other.read([1]))


def test_kept_frames_have_a_limit(short_clips, monkeypatch):
    cache, one = decoding.FrameCache(), 6 * 3 * 16 * 16
    monkeypatch.setattr(decoding, "KEPT_FILES", 2 * one)
    for path, info in short_clips:
        with decoding.Video(path, info, backends_for(info), keep=cache) as video:
            video.read([0])
        assert cache.bytes == sum(frames.numel() for frames in cache.frames.values()) <= 2 * one
    assert [key[0] for key in cache.frames] == [path for path, _ in short_clips[1:]]
    monkeypatch.setattr(decoding, "KEPT_FILE", one - 1)
    assert not cache.fits(6, (16, 16))


def test_a_file_that_changed_is_decoded_again(short_clips):
    (path, info), (other, _), _ = short_clips
    cache = decoding.FrameCache()
    with decoding.Video(path, info, backends_for(info), keep=cache) as video:
        before = video.read([0, 3])
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(1, 1))
    with decoding.Video(path, info, backends_for(info), keep=cache) as video, open_video(other) as wanted:
        assert torch.equal(video.read([0, 3]), wanted.read([0, 3]))
        assert not torch.equal(video.read([0, 3]), before)


@pytest.mark.parametrize("error", [LostFramesError, UsageError])
def test_damaged_files_are_not_kept(short_clips, error):
    path, info = short_clips[0]
    cache = decoding.FrameCache()
    with decoding.Video(path, info, backends_for(info), keep=cache) as video:
        decode = video.decode

        def damaged(indices, size):
            if 3 in indices:
                raise error(path, [3])
            return decode(indices, size)

        with mock.patch.object(video, "decode", damaged):
            assert video.read([0, 1]).shape == (2, 3, 16, 16)
            with pytest.raises(error):
                video.read([2, 3])
    assert not cache.frames
