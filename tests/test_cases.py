"""Real-world clips: the frames equal the output of the FFmpeg program, which provided these figures."""

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from mp4_boxes import with_edits, with_matrix, without
from PIL import Image

from rin_video.config import DataConfig
from rin_video.datasets import ClipFolder, probe
from rin_video.datasets.backends import suits
from rin_video.datasets.decoding import LostFramesError, open_video, probe_video
from rin_video.datasets.index import Probe, make_index
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.prepare import prepare
from rin_video.errors import UsageError

CASES = Path(__file__).parent / "cases"

# By file: frames, displayed (H, W), frames per second, seconds, mean levels of the first frames.
RIGHT = {
    "trimmed-edit-list.mp4": (52, (32, 64), 30, 1.733, [36, 39, 44, 47, 52]),
    "tag-not-utf8.avi": (10, (32, 64), 30, 0.333, [19, 39, 59, 80]),
    "tag-not-utf8.mov": (10, (32, 64), 30, 0.333, [19, 39, 60, 80]),
    "open-gop-cut.mkv": (36, (64, 64), 30, 1.2, [65, 69, 74, 80]),
    "starts-without-keyframe.mkv": (36, (64, 64), 30, 1.2, [65, 69, 74]),
    "one-field-a-packet.mp4": (3, (64, 64), 25, 0.12, [9, 19, 29]),
    "not-coded-pictures.mp4": (37, (32, 64), 23.125, 1.6, [5, 11, 17, 24, 30]),
    "dropped-pictures.avi": (40, (32, 64), 23.256, 1.72, [5, 11, 17, 24, 30]),
    "live-no-duration.webm": (60, (32, 64), 25.33, 2.369, [3, 8, 11, 16, 19]),
    "cover-art-is-stream-0.mp4": (20, (32, 64), 30, 0.667, [10, 19, 30, 39]),
    "preview-is-track-0.mkv": (20, (32, 64), 30, 0.666, [10, 19, 30, 39]),
    "mirrored.mp4": (8, (48, 96), 30, 0.267, [110, 111, 111, 112]),
    "turned-180.mkv": (8, (48, 96), 30, 0.266, [110, 111, 111, 112]),
    "pixel-aspect-2-1.mp4": (12, (64, 64), 8, 1.5, [118, 118, 118]),
    "alpha-vp9.webm": (10, (64, 64), 8, 1.25, [204, 204, 204]),
    "alpha-png.mov": (10, (64, 64), 8, 1.25, [204, 204, 204]),
    "hdr-hlg.mov": (8, (64, 96), 8, 1.0, [104, 104, 104]),
    "av1.mp4": (24, (64, 64), 8, 3.0, [10, 19, 30, 39]),
    "vp8-hidden-frames.webm": (18, (128, 128), 25, 0.72, [118, 118, 118]),
    "theora.ogv": (20, (32, 64), 8, 2.5, [30, 39, 47, 56]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_clip_is_what_is_shown(name, decoder):
    count, size, fps, seconds, levels = RIGHT[name]
    info = probe_video(CASES / name)
    assert (info.num_frames, info.size) == (count, size)
    assert info.fps == pytest.approx(fps, rel=2e-3)
    assert info.duration == pytest.approx(seconds, abs=2e-3)
    if not suits(decoder, info):
        return
    try:
        open_video(CASES / name, decoder, info).close()
    except UsageError:  # decord cannot open a file without duration; refusing it is correct too
        assert decoder != "pyav"
        return
    with open_video(CASES / name, decoder, info) as video:
        frames = video.read(range(count))
        assert frames.shape == (count, 3, *size)
        for level, frame in zip(levels, frames, strict=False):
            assert float(frame.float().mean()) == pytest.approx(level, abs=1.5)
        order = random.Random(0).sample(range(count), min(count, 12))
        for index in order:
            assert torch.equal(video.read([index])[0], frames[index])
    with open_video(CASES / name, decoder, info) as fresh:  # a decoder that has not read another frame before
        assert torch.equal(fresh.read([1]), frames[1:2])


@pytest.mark.parametrize("name", [*RIGHT, "damage", "long"])
def test_sampling_a_long_video_gives_the_same_as_decoding_all_of_it(name, numbered, tmp_path, monkeypatch):
    """Otherwise the complete file is decoded."""
    path = CASES / name
    if name == "damage":
        path = damaged(numbered(tmp_path / "a.mp4", options={"g": "5", "bf": "0", "sc_threshold": "0"}), 7)
    elif name == "long":
        path = numbered(tmp_path / "a.mp4", frames=24, options={"g": "6"})
        monkeypatch.setattr(probe, "_decode_all", lambda *_: pytest.fail("it was decoded"))
        monkeypatch.setattr(probe, "DECODED_PIXELS", 0)
        assert probe_video(path).num_frames == 24
        return
    whole = probe_video(path)
    monkeypatch.setattr(probe, "DECODED_PIXELS", 0)
    sampled = probe_video(path)
    if name == "damage":  # which is among the samples at the beginning
        assert sampled.lost == whole.lost == (7, 10)
    assert sampled == whole


def test_times_keep_their_gaps():
    info = probe_video(CASES / "dropped-pictures.avi")
    assert info.times[19:21] == pytest.approx([0.76, 0.92])


def test_the_index_and_the_dataset_report_special_properties(tmp_path):
    said = make_index(CASES, "video").describe()
    for name, text in {
        "hdr-hlg.mov": "HDR: HLG",
        "one-field-a-packet.mp4": "interlaced",
        "pixel-aspect-2-1.mp4": "pixel aspect: 2",
        "alpha-png.mov": "transparent",
        "alpha-vp9.webm": "transparent",
    }.items():
        assert f"{name}: {text}" in said
    data = ClipFolder(CASES, 16, 3).describe()
    for line in ("HDR: 1 of 20", "transparent: 2 of 20", "frame rates differ (", "data.fps=8 makes them equal"):
        assert line in data
    assert "frame rates differ" not in ClipFolder(CASES, 16, 3, fps=8).describe()


def test_transparency_is_white_and_a_picture_with_square_pixels_is_round():
    for name in ("alpha-vp9.webm", "alpha-png.mov"):
        with open_video(CASES / name) as video:
            assert int(video.read([3])[0, :, 0, 0].min()) > 250
    with open_video(CASES / "pixel-aspect-2-1.mp4") as video:
        disc = (video.read([0])[0, 0].float() - video.read([0])[0, 0, 0, 0]).abs() > 60
        assert abs(int(disc.any(0).sum()) - int(disc.any(1).sum())) <= 2


@pytest.mark.parametrize("orientation", range(8))
def test_a_display_matrix_is_one_of_eight(tmp_path, numbered, orientation):
    a, b, c, d = [
        (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
        (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0),
    ][orientation]  # fmt: skip
    path = tmp_path / "a.mp4"
    path.write_bytes(with_matrix(numbered(path, frames=2).read_bytes(), a, b, c, d))
    with open_video(tmp_path / "a.mp4") as video:
        picture = video.read([0])[0].permute(1, 2, 0).numpy()
    numbered(path, frames=2)
    with open_video(path) as video:
        stored = video.read([0])[0].permute(1, 2, 0).numpy()
    H, W = stored.shape[:2]
    y, x = np.mgrid[:H, :W]
    across, down = a * x + c * y, b * x + d * y
    expected = np.zeros_like(stored if a else stored.swapaxes(0, 1))
    expected[down - down.min(), across - across.min()] = stored
    assert np.array_equal(picture, expected)


EDITS = {  # (first, number) in frames of 1/8 s
    "two parts": ([(0, 8), (11, 8)], [*range(8), *range(11, 19)]),
    "in other order": ([(11, 8), (0, 8)], [*range(11, 19), *range(8)]),
    "twice the same": ([(6, 8), (6, 4)], [*range(6, 14), *range(6, 10)]),
    "from within": ([(6, 10)], range(6, 16)),
}


@pytest.mark.parametrize("name", EDITS)
def test_edit_lists_are_followed(tmp_path, numbered, numbers, name):
    edits, expected = EDITS[name]
    path = numbered(tmp_path / "a.mp4", options={"g": "4", "bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        unit = int(container.streams.video[0].time_base.denominator / 8)
    path.write_bytes(with_edits(path.read_bytes(), [(count * 125, first * unit) for first, count in edits]))
    with open_video(path) as video:
        assert numbers(video.read(range(video.num_frames))) == list(expected)
        for index in (5, 11 % len(expected), 2):
            assert numbers(video.read([index])) == [list(expected)[index]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("negative_cts_offsets", range(6, 20)), ("frag_keyframe+empty_moov+delay_moov", range(20))],
)
def test_time_stamps_may_be_below_0(tmp_path, numbers, flags, expected):
    """The edit list determines whether frames before 0 are displayed."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled", "movflags": flags}) as container:
        stream = container.add_stream("libx264", rate=8, options={"g": "5"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for index in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 10 * index + 10, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index - 6, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert next(container.demux(video=0)).pts < 0
    with open_video(path) as video:
        assert numbers(video.read(range(video.num_frames))) == list(expected)
        assert numbers(video.read([13, 0])) == [expected[13], expected[0]]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_file_without_a_table_of_keyframes_is_read_from_real_ones(tmp_path, numbered, numbers, codec):
    path = numbered(tmp_path / "a.mp4", codec=codec, options={"g": "5", "sc_threshold": "0"})
    path.write_bytes(without(path.read_bytes(), b"stss"))
    with open_video(path) as video:
        order = random.Random(0).sample(range(20), 20)
        assert [numbers(video.read([i])) for i in order] == [[i] for i in order]
        assert video.info.entries.size <= 4


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.ts", "libx264", {"container_format": "mpegts"}),
        ("a.mts", "mpeg2video", {"container_format": "mpegts", "rate": 25}),
        ("a.mpg", "mpeg2video", {"container_format": "vob", "rate": 25}),
        ("a.mpeg", "mpeg1video", {"container_format": "mpeg", "rate": 25}),
        ("a.wmv", "wmv2", {}),
        ("a.flv", "flv", {}),
        ("a.3gp", "mpeg4", {}),
        ("a.qt", "libx264", {"container_format": "mov"}),
        ("a.mkv", "libx265", {}),
        ("a.avi", "mpeg4", {}),
        ("a.avi", "libx264", {}),
    ],
)
def test_containers_of_cameras_and_of_old_are_read(tmp_path, numbered, numbers, name, codec, options):
    """The clips have B frames if the codec supports them, and are read in any order."""
    coding = {"g": "6", "b": "4M", "x265-params": "log-level=none:keyint=6"}
    if codec not in ("wmv2", "flv"):
        coding["bf"] = "2"
    numbered(tmp_path / name, size=(64, 96), codec=codec, options=coding, **options)
    data = ClipFolder(tmp_path, (64, 96), 20)
    assert numbers(data[0]["x"].transpose(0, 1)) == list(range(20))
    with open_video(tmp_path / name) as video:
        for index in (13, 3, 19, 7, 0):
            assert numbers(video.read([index])) == [index]


def test_a_size_that_changes_is_scaled_to_the_first_and_reported(tmp_path, numbered, numbers):
    parts = [
        numbered(tmp_path / f"{i}.ts", frames=6, size=size).read_bytes() for i, size in enumerate([(32, 64), (48, 48)])
    ]
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    with open_video(tmp_path / "a.ts") as video:
        frames = video.read(range(12))
    assert frames.shape == (12, 3, 32, 64)
    assert numbers(frames) == [*range(6), *range(6)]
    assert "size changes: 32x64, 48x48, all frames are scaled to 32x64" in video.info.notes


def damaged(path, first, last=None):
    """Overwrite the middle of packets with zeros."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in packets[first : (last or first) + 1]:
        content[place : place + size] = bytes(size)
    path.write_bytes(content)
    return path


def test_only_clips_with_damaged_frames_are_avoided(tmp_path, numbered, numbers, caplog):
    path = damaged(numbered(tmp_path / "a.mp4", options={"g": "5", "bf": "0", "sc_threshold": "0"}), 7)
    info = probe_video(path)
    assert (info.num_frames, info.lost_ranges) == (20, [(7, 10)])
    with open_video(path) as video:
        for _ in range(2):
            with pytest.raises(LostFramesError, match=r"frames 7 to 8 of .*a\.mp4 cannot be decoded") as caught:
                video.read([6, 7, 8])
            assert caught.value.frames == [7, 8]
            assert numbers(video.read([6, 10])) == [6, 10]
    data = ClipFolder(path, 16, 4)
    starts = {data.frames_of(0, epoch)[0] for epoch in range(200)}
    assert starts == {0, 1, 2, 3, *range(10, 17)}
    assert "damaged: frames 7 to 9 cannot be decoded, clips avoid them" in make_index(path, "video").describe()
    with pytest.raises(UsageError, match=r"no 12 consecutive frames that can be decoded \(frames 7 to 9 cannot\)"):
        ClipFolder(path, 16, 12)
    whole = ClipFolder(path, 16, 12, span="whole")
    assert not {7, 8, 9}.intersection(whole.frames_of(0, 0))


def test_no_clip_spans_missing_frames_if_frames_are_counted(tmp_path, numbered, numbers):
    """An AVI with B frames is an example: its timestamps do not identify frames."""
    coding = {"g": "5", "bf": "2", "b": "4M", "sc_threshold": "0"}
    path = numbered(tmp_path / "a.avi", size=(64, 96), options=coding)
    whole = probe_video(path)
    assert not whole.trusted
    assert not whole.lost
    info = probe_video(damaged(path, 11))
    left = list(range(info.num_frames))
    with open_video(path) as video:
        found = numbers(video.read(left))
    breaks = [i for i in left[1:] if found[i] != found[i - 1] + 1]
    assert breaks
    assert set(breaks) <= set(info.lost)
    data = ClipFolder(path, (64, 96), 4)
    for epoch in range(60):
        clip = numbers(data.draw(0, epoch)["x"].transpose(0, 1))
        assert clip == list(range(clip[0], clip[0] + 4))


def test_prepare_keeps_the_undamaged_part(tmp_path, numbered, numbers):
    (tmp_path / "data").mkdir()
    damaged(numbered(tmp_path / "data" / "a.mp4", options={"g": "5", "bf": "0", "sc_threshold": "0"}), 7)
    said = prepare(tmp_path / "data", "video", tmp_path / "shards", (32, 64), DataConfig(), workers=1)
    assert any("only frames 10 to 19 of" in line for line in said)
    data = ClipFolder(tmp_path / "shards", (32, 64), 10)
    assert numbers(data[0]["x"].transpose(0, 1)) == list(range(10, 20))


def test_damage_found_in_training_does_not_exclude_the_file(tmp_path, numbered, monkeypatch):
    """The index only samples a long video: drawing finds the damage, and gives the same result in every process."""
    path = damaged(numbered(tmp_path / "a.mp4", options={"g": "5", "bf": "0", "sc_threshold": "0"}), 7)
    whole = probe_video(path)
    monkeypatch.setattr(Probe, "_video", lambda self, source: replace(whole, lost=(), notes=()))
    data, again = ClipFolder(path, 16, 4), ClipFolder(path, 16, 4)
    batches = TrainLoader(data, data.config, 2, seed=0)
    for _ in range(20):
        next(batches)
    assert batches.num_bad == 0
    batches.close()
    for epoch in reversed(range(40)):
        again.draw(0, epoch)
    for epoch in range(40):
        assert torch.equal(data.draw(0, epoch)["x"], again.draw(0, epoch)["x"])
        assert not {7, 8, 9}.intersection(data.frames_of(0, epoch))


def test_the_usable_part_of_a_cut_file_is_used(tmp_path, numbered, numbers):
    path = tmp_path / "a.mp4"
    content = numbered(path, options={"g": "6", "bf": "0", "sc_threshold": "0"}, faststart=True).read_bytes()
    path.write_bytes(content[: len(content) * 19 // 20])
    info = probe_video(path)
    assert 5 < info.num_frames < 20
    assert f"truncated: only the first {info.num_frames} of 20 frames" in info.notes
    with open_video(path) as video:
        assert numbers(video.read(range(info.num_frames))) == list(range(info.num_frames))


def test_browsers_show_animations_without_delays_at_10_frames_a_second(tmp_path):
    pictures = [Image.new("RGB", (16, 16), (i * 60, 0, 0)) for i in range(4)]
    for name in ("a.webp", "a.gif"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=0, lossless=True)
        info = probe_video(tmp_path / name)
        assert (info.num_frames, round(info.fps, 3), round(info.duration, 3)) == (4, 10, 0.4)


def test_pointers_and_web_pages_are_distinguished_from_media(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name, kind in (("a.mp4", "video"), ("a.png", "image")):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(UsageError, match=r"Git LFS pointer.*git lfs pull"):
            make_index(tmp_path / name, kind).require_some(strict=True)
        (tmp_path / name).write_bytes(b"\n<!DOCTYPE html>\n<html><body>404</body></html>")
        with pytest.raises(UsageError, match=r"web page \(HTML\)"):
            make_index(tmp_path / name, kind).require_some(strict=True)


def test_ignored_files_are_counted_and_named(tmp_path, numbered):
    numbered(tmp_path / "a.mp4", frames=4)
    for name in ("a.txt", "b.txt", "c.txt", "LICENSE"):  # the first is a caption
        (tmp_path / name).write_text("words")
    said = "ignored: 3 files of other kinds (.txt 2, no extension 1): LICENSE, b.txt, c.txt"
    assert said in make_index(tmp_path, "video").describe()
    assert said in ClipFolder(tmp_path, 16, 4).describe()
