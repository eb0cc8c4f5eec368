"""Real-world folders, shards and pictures: classes, splits, stray files, captions, orientation, bit depth."""

import codecs
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rin_video import UsageError, cli
from rin_video.datasets import ClipFolder, ImageFolder, detect_kind
from rin_video.datasets import folders as finding
from rin_video.datasets.embeddings import EmbeddingFiles
from rin_video.datasets.index import make_index
from rin_video.datasets.reading import probe_image, read_image
from rin_video.datasets.shards import is_shards, write_shard
from rin_video.datasets.sources import decode_text, not_media
from rin_video.labels import class_index


@pytest.fixture(autouse=True)
def say_again():
    finding._warn_once.cache_clear()


def pictures(root, *names, size=(8, 8)):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 30)).save(root / name)
    return root


def test_folders_that_are_numbers_are_classes_in_their_order_and_mean_themselves(tmp_path):
    pictures(tmp_path, *(f"{i}/a.png" for i in range(1, 13)))
    data = ImageFolder(tmp_path, 8)
    assert data.classes == [str(i) for i in range(1, 13)]
    for wanted in ("10", 10):  # --class 10, sample.label=10
        assert data.classes[class_index(wanted, data.classes, 12)] == "10"
    with pytest.raises(UsageError, match="the model has no class 0: it has 1, 2, 3"):
        class_index(0, data.classes, 12)
    assert class_index(3, ["01", "02", "03"], 3) == 2
    assert class_index("1", ["cat", "dog"], 2) == class_index(1, [], 2) == 1
    assert class_index(2, ["0", "1", "10", "2"], 4) == 3  # an earlier run with another order of classes


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test", "valid"), ("training", "dev")])
def test_splits_are_no_classes(tmp_path, names):
    pictures(tmp_path, *(f"{split}/{name}/a.png" for split in names for name in ("cat", "dog")))
    with pytest.raises(UsageError, match=r"contains the splits .*, not classes: use one of them, .*[Tt]rain"):
        ImageFolder(tmp_path, 8)
    assert ImageFolder(tmp_path / names[0], 8).classes == ["cat", "dog"]


@pytest.mark.parametrize("names", [("train", "bus"), ("test", "val"), ("train",)])
def test_other_folders_are_no_splits(tmp_path, names):
    pictures(tmp_path, *(f"{name}/a.png" for name in names))
    assert len(ImageFolder(tmp_path, 8)) == len(names)


def test_a_stray_file_does_not_switch_classes_off(tmp_path, caplog):
    pictures(tmp_path, "cat/1.png", "dog/1.png", "dog/2.png", "stray.png")
    data = ImageFolder(tmp_path, 8)
    assert data.classes == ["cat", "dog"]
    assert data.labels == [0, 1, 1, -1]
    assert "1 of 4 files are in no class folder and get no label" in caplog.text
    pictures(tmp_path, *(f"{i}.png" for i in range(9)))
    assert ImageFolder(tmp_path, 8).classes == []
    assert "10 of 13 files are outside the folders cat, dog: the folders are not used as classes" in caplog.text


def test_ignored_files_are_counted_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", "a.png", "b.png")
    for name in ("a.txt", "b.npy", "clip.rmvb", "list.csv", "list2.csv", "c.txt", "LICENSE"):
        (tmp_path / "data" / name).write_bytes(b"")
    assert cli.main(["index", "data"]) == 0
    said = capsys.readouterr().out
    assert "ignored: 5 files of other kinds (.csv 2, no extension 1, .txt 1, .rmvb 1): " in said
    for name in ("clip.rmvb", "list.csv", "list2.csv", "c.txt", "LICENSE"):
        assert name in said
    assert "ignored: 5 files of other kinds" in ImageFolder(tmp_path / "data", 8).describe()


def test_links_to_class_folders_are_reported(tmp_path, caplog):
    pictures(tmp_path / "data", "cat/1.png", "dog/1.png")
    pictures(tmp_path / "elsewhere", "1.png")
    (tmp_path / "data/owl").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert ImageFolder(tmp_path / "data", 8).classes == ["cat", "dog"]
    assert "owl is a link to the folder" in caplog.text
    assert "and is not followed" in caplog.text


def test_gifs_of_one_frame_are_images_and_a_stray_animation_is_ignored(tmp_path, numbered):
    pictures(tmp_path, "0.gif", *(f"{i}.png" for i in range(20)))
    assert detect_kind(tmp_path) == "image"
    assert len(ImageFolder(tmp_path, 8)) == 21
    numbered(tmp_path / "moving.gif", codec="gif", frames=3)
    assert detect_kind(tmp_path) == "image"
    said = ImageFolder(tmp_path, 8).describe()
    assert "ignored: 1 file of other kinds (.gif 1): " in said
    assert "moving.gif" in said
    assert len(ClipFolder(tmp_path, 8, 3)) == 1


@pytest.mark.parametrize("name", ["frame_{:04d}.png", "shot{:d}.jpg"])
def test_numbered_frames_are_answered(tmp_path, capsys, monkeypatch, caplog, name):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", *(f"{clip}/{name.format(i)}" for clip in ("one", "two") for i in range(1, 10)))
    assert cli.main(["train", "--data", "data", "--frames", "4", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert "in each of 2 folders the files are numbered consecutively (starting with data" in said
    assert "convert each folder to a clip: rin-video export FOLDER clip.mp4" in said
    ImageFolder("data", 8)
    assert ("they are used as separate images. If they are frames" in caplog.text) == ("frame" in name)


@pytest.mark.parametrize("suffix", [".3gp", ".qt", ".MP4"])
def test_clips_under_other_names(tmp_path, numbered, suffix):
    numbered(tmp_path / "a.mp4", frames=4).rename(tmp_path / f"a{suffix}")
    assert len(ClipFolder(tmp_path, 8, 4)) == 1


@pytest.mark.parametrize("suffix", [".mpg", ".mpeg", ".wmv", ".mts", ".m2ts", ".ogv", ".flv", ".3g2"])
def test_clips_that_cannot_be_read_are_named(tmp_path, numbered, suffix):
    """Every clip is tried, because only FFmpeg knows whether it can read it: none is skipped."""
    numbered(tmp_path / "a.mp4", frames=4)
    (tmp_path / f"b{suffix}").write_bytes(b"nothing of the kind" * 99)
    index = make_index(tmp_path, "video")
    assert [path.name for path, _ in index.unusable] == [f"b{suffix}"]
    assert not index.ignored


# ---- shards


def test_keys_of_shards_end_at_the_first_dot(tmp_path):
    picture = (pictures(tmp_path, "p.png") / "p.png").read_bytes()
    np.save(tmp_path / "v.npy", np.ones(3, np.float32))
    vector = (tmp_path / "v.npy").read_bytes()
    files = {"a/x.left.png": picture, "a/x.right.png": picture, "a/x.right.txt": b"right", "a/x.txt": b"both",
             "a/x.cls": b"cat", "v1.0/y.png": picture, "v1.0/y.cls": b"dog", "v1.0/y.npy": vector}  # fmt: skip
    write_shard(tmp_path / "0.tar", files)
    data = ImageFolder(tmp_path / "0.tar", 8)
    assert [entry.caption for entry in data.index.entries] == ["both", "right", None]
    assert (data.classes, data.labels) == (["cat", "dog"], [0, 0, 1])
    assert [file is not None for file in EmbeddingFiles(data.files).files] == [False, False, True]


@pytest.mark.parametrize("beside", ["part.parquet", "_SUCCESS", "list.csv", "notes.md", "sizes.json"])
def test_tables_next_to_shards_do_not_hide_them(tmp_path, beside):
    (tmp_path / "s").mkdir()
    write_shard(tmp_path / "s/0.tar", {"a.png": (pictures(tmp_path, "p.png") / "p.png").read_bytes()})
    (tmp_path / "s" / beside).write_bytes(b"")
    assert is_shards(tmp_path / "s")
    assert len(ImageFolder(tmp_path / "s", 8)) == 1
    pictures(tmp_path / "s", "b.png")
    assert not is_shards(tmp_path / "s")


# ---- captions


@pytest.mark.parametrize(
    "content",
    [
        "ein Hündchen für 5 €".encode(),
        codecs.BOM_UTF8 + "ein Hündchen für 5 €".encode(),
        "ein Hündchen für 5 €".encode("utf-16"),
        codecs.BOM_UTF16_BE + "ein Hündchen für 5 €".encode("utf-16-be"),
        "ein Hündchen für 5 €\r\n".encode("cp1252"),
    ],
)
def test_captions_in_any_usual_encoding(tmp_path, content):
    pictures(tmp_path / "data", "a.png")
    (tmp_path / "data/a.txt").write_bytes(content)
    write_shard(tmp_path / "0.tar", {"a.png": (tmp_path / "data/a.png").read_bytes(), "a.txt": content})
    for root in ("data", "0.tar"):
        assert make_index(tmp_path / root, "image").entries[0].caption == "ein Hündchen für 5 €"


def test_a_caption_that_is_cut_within_a_character():
    assert decode_text("añ".encode()[:-1]) == "a"
    assert decode_text("日本".encode()[:-1]) == "日"
    assert decode_text("日本".encode("utf-16")[:-1]) == "日"


# ---- pictures


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_orientation_is_the_same_for_the_probe_and_the_reader(tmp_path, orientation, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    image = read_image(path)
    assert (image.permute(1, 2, 0).numpy() == wanted).all()
    assert probe_image(path).size == tuple(image.shape[1:]) == ((10, 6) if orientation > 4 else (6, 10))


@pytest.mark.parametrize("what", ["getexif", "tobytes"])
def test_broken_exif_does_not_cost_the_picture(tmp_path, monkeypatch, what):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (10, 6)).save(tmp_path / "a.jpg", exif=exif)

    def broken(*args, **options):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(*((Image.Image, what) if what == "getexif" else (Image.Exif, what)), broken)
    size = (6, 10) if what == "getexif" else (10, 6)
    assert probe_image(tmp_path / "a.jpg").size == size
    assert read_image(tmp_path / "a.jpg").shape == (3, *size)


def test_sixteen_bits_keep_their_transparency_and_twelve_are_reported(tmp_path):
    grey = (np.arange(48).reshape(6, 8) * 1000).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=5000)
    image = read_image(tmp_path / "a.png", 4)
    assert torch.equal(image[3] == 0, torch.from_numpy(grey.astype(np.int64) == 5000))
    assert read_image(tmp_path / "a.png")[:, 0, 5].tolist() == [255] * 3
    Image.fromarray(grey // 12).save(tmp_path / "b.png")  # up to 3916
    (note,) = probe_image(tmp_path / "b.png").notes
    assert note.startswith("16-bit values only up to 3916, like 12 bits, look dark")
    assert not probe_image(tmp_path / "a.png").notes
    data = ImageFolder(tmp_path, 6, index=tmp_path / "index.jsonl")
    assert "1 of 2: 16-bit values only up to 3916" in data.describe()
    again = ImageFolder(tmp_path, 6, index=tmp_path / "index.jsonl")
    assert "b.png: 16-bit values only up to 3916" in again.index.describe()


def test_one_animation_among_few_pictures_is_a_stray(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(3)))
    frames = [Image.new("L", (4, 4), level) for level in (0, 90, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert detect_kind(tmp_path) == "image"
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").unlink()
    with pytest.raises(UsageError, match="contains 1 image and 1 clip"):
        detect_kind(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"../.git/annex/objects/a/b/c.mp4", "is a git-annex pointer"),
        (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "is text (XML or JSON), perhaps a server error, not media",
        ),
        (b'{"error": "expired"}', "is text (XML or JSON), perhaps a server error, not media"),
    ],
)
def test_files_that_are_not_media_are_reported(tmp_path, content, said):
    for name in ("x.mp4", "x.png"):
        (tmp_path / name).write_bytes(content)
        assert said in not_media(tmp_path / name)


def test_files_beside_shards_are_named(tmp_path):
    write_shard(tmp_path / "0.tar", {"a.pgm": b"P5 4 4 255\n" + bytes(16)})
    for name in ("_SUCCESS", "rows.parquet"):
        (tmp_path / name).write_bytes(b"x")
    said = "ignored: 2 files of other kinds (no extension 1, .parquet 1): _SUCCESS, rows.parquet"
    assert said in make_index(tmp_path, "image").describe()


def test_folders_of_runs_are_no_data(tmp_path, numbered, caplog):
    """A run may be written into the folder of its data: its samples are no clips, and no class."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        numbered(tmp_path / name / "a.mp4", frames=4)
    (tmp_path / "runs/x/samples").mkdir(parents=True)
    (tmp_path / "runs/x/run.json").write_text("{}")
    numbered(tmp_path / "runs/x/samples/step-1.mp4", frames=4)
    assert ClipFolder(tmp_path, 8, 4).classes == ["cat", "dog"]
    assert "runs/x is the folder of a training run and is skipped" in caplog.text.replace(os.sep, "/")
