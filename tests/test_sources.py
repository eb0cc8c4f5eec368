"""Images of all formats, shards, arrays, the Hugging Face package, `prepare` and `preview`."""

import io
import os
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from rin_video.cli import main
from rin_video.config import DataConfig
from rin_video.datasets import ArrayFolder, ClipFolder, ImageFolder, open_video
from rin_video.datasets.array_files import probe_array
from rin_video.datasets.folders import detect_kind
from rin_video.datasets.hub import HubDataset, import_hub
from rin_video.datasets.open import open_dataset
from rin_video.datasets.reading import read_image
from rin_video.datasets.shards import expand, list_shards, members_of
from rin_video.errors import UsageError


def test_images_that_are_much_too_large_shrink_without_aliasing(tmp_path):
    """A chessboard of single pixels becomes grey; the oracle is a plain antialiased resize."""
    board = (np.indices((512, 768)).sum(0) % 2 * 255).astype(np.uint8)
    smooth = (np.indices((512, 768))[1] / 3).astype(np.uint8)
    for suffix in (".png", ".jpg"):
        Image.fromarray(board).save(tmp_path / f"board{suffix}", quality=100)
        Image.fromarray(smooth).save(tmp_path / f"smooth{suffix}", quality=100)
        small = read_image(tmp_path / f"board{suffix}", at_least=(16, 16))
        assert min(small.shape[1:]) in (32, 64)
        data = ImageFolder(tmp_path / f"board{suffix}", 16)
        assert (data[0]["x"].float() - 127.5).abs().max() < 3
        exact = ImageFolder(tmp_path / f"smooth{suffix}", 16).resize_crop(
            read_image(tmp_path / f"smooth{suffix}"), np.random.default_rng(0)
        )
        found = ImageFolder(tmp_path / f"smooth{suffix}", 16)[0]["x"]
        torch.testing.assert_close(found, exact, atol=2, rtol=0)


def test_pixel_bombs_are_refused_by_their_header(tmp_path):
    Image.new("1", (5000, 4000)).save(tmp_path / "bomb.png")
    with pytest.raises(UsageError, match=r"bomb\.png is 4000x5000 = 20,000,000 pixels, more than 1,000: .*data\.max_p"):
        ImageFolder(tmp_path, 8, max_pixels=1000)


def test_any_pillow_format(tmp_path):
    image = Image.new("RGB", (9, 7), (200, 30, 90))
    formats = ("png", "jpg", "webp", "bmp", "tiff", "ppm", "tga", "jp2", "avif", "qoi")
    known = [name for name in formats if f".{name}" in Image.registered_extensions()]
    for name in known:
        image.save(tmp_path / f"x.{name}")
    data = ImageFolder(tmp_path, (7, 9))
    assert len(data) == len(known) >= 7
    for item in data:
        assert (item["x"].float().mean((1, 2)) - torch.tensor([200.0, 30, 90])).abs().max() < 6


def write_tar(path, files):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_give_what_the_files_give(tmp_path, clips):
    names = ["plain.mp4", "short_gop.mp4", "vp9.webm", "mpeg4.avi"]
    for i, name in enumerate(names):
        stem, suffix = name.split(".")
        files = {name: (clips / name).read_bytes(), f"{stem}.cls": b"cat" if i % 2 else b"dog", f"{stem}.txt": b"hi"}
        write_tar(tmp_path / f"shards/{i:03d}.tar", files)
        assert suffix
    pattern = str(tmp_path / "shards/{000..003}.tar")
    for root in (pattern, tmp_path / "shards"):
        data = ClipFolder(root, (32, 64), 5, index=tmp_path / "index.jsonl", seed=2)
        assert len(data) == 4
        assert (data.classes, data.labels) == (["cat", "dog"], [1, 0, 1, 0])
        assert data.index.entries[0].caption == "hi"
        for i, name in enumerate(names):
            alone = ClipFolder(clips / name, (32, 64), 5, seed=2)
            frames = data.frames_of(i, 4)
            with open_video(alone.files[0]) as video:
                expected = video.read(frames, (32, 64)).transpose(0, 1)
            torch.testing.assert_close(data.draw(i, 4)["x"], expected, atol=3, rtol=0)
    assert detect_kind(pattern) == "video"


def test_shards_that_would_lead_elsewhere(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    path = write_tar(
        tmp_path / "s/0.tar", {"../../out.png": buffer.getvalue(), "/abs.png": b"x", "a.png": buffer.getvalue()}
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    members, refused = members_of(path)
    assert [member.name for member in members] == ["a.png"]
    assert len(refused) == 3
    data = ImageFolder(path, 4)
    assert len(data) == 1
    assert "has a path outside the shard" in data.describe()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["0.tar", "s"]


def test_shard_patterns_and_pipes(tmp_path):
    assert expand("a{08..11}b{1..2}") == [f"a{i}b{j}" for i in ("08", "09", "10", "11") for j in (1, 2)]
    with pytest.raises(UsageError, match="use an ascending range"):
        expand("{5..1}.tar")
    with pytest.raises(UsageError, match="names 10000000 shards: use an ascending range of at most 1,000,000"):
        expand("{0..999}/{0..9999}.tar")
    write_tar(tmp_path / "000.tar", {})
    with pytest.raises(UsageError, match=r"there is no shard .*001\.tar \(1 of 2"):
        list_shards(f"{tmp_path}/{{000..001}}.tar")
    with pytest.raises(UsageError, match=r"runs a command: .* data\.allow_pipe=true on the command line"):
        list_shards("pipe:touch x")
    if os.name != "nt":
        (shard,) = list_shards(f"pipe:cat {tmp_path}/000.tar", allow_pipe=True, cache=tmp_path / "cache")
        assert shard.read_bytes() == (tmp_path / "000.tar").read_bytes()
        with pytest.raises(UsageError, match="failed with exit code"):
            list_shards("pipe:false", allow_pipe=True, cache=tmp_path / "cache")
    (tmp_path / "not.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(UsageError, match="cannot be read as an uncompressed tar"):
        ImageFolder(tmp_path / "not.tar", 8)


def test_our_shards_and_those_of_webdataset_are_the_same_layout(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i:03d}", "png": np.full((4, 4, 3), i / 10, np.float32), "cls": i % 2})
    data = ImageFolder(tmp_path / "0.tar", 4)
    assert data.labels == [0, 1, 0]
    assert data[2]["x"].float().mean().item() == pytest.approx(51, abs=1)


def test_arrays_of_any_rank(tmp_path):
    rng = np.random.default_rng(0)
    one, many = rng.random((2, 5, 7), np.float32), rng.integers(0, 256, (3, 2, 5, 7), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "a/one.npy", one)
    np.save(tmp_path / "b/many.npy", many)
    save_file({"anything": torch.from_numpy(one) / 2}, tmp_path / "b/one.safetensors")
    np.save(tmp_path / "b/other.npy", one[:, :3])
    np.save(tmp_path / "b/object.npy", np.array([{}], dtype=object), allow_pickle=True)
    data = open_dataset(tmp_path, (2, 5, 7), DataConfig(), index=tmp_path / "index.jsonl")
    assert isinstance(data, ArrayFolder)
    assert (len(data), data.labels, data.classes) == (5, [0, 1, 1, 1, 1], ["a", "b"])
    torch.testing.assert_close(data[0]["x"], torch.from_numpy(one))
    torch.testing.assert_close(data[2]["x"], torch.from_numpy(many[1]))
    torch.testing.assert_close(data[4]["x"], torch.from_numpy(one) / 2)
    said = data.describe()
    assert "other.npy has shape (2, 3, 7), but the model takes (2, 5, 7)" in said
    assert "object.npy" in said
    np.save(tmp_path / "a/one.npy", one * 3)
    with pytest.raises(UsageError, match=r"scale them to \[0, 1\]"):
        ArrayFolder(tmp_path / "a", (2, 5, 7))[0]


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 6)])
def test_arrays_in_shards_give_what_the_files_give(tmp_path, shape):
    rng = np.random.default_rng(0)
    one, many = rng.random(shape, np.float32), rng.integers(0, 256, (3, *shape), dtype=np.uint8)
    files = {
        "a.npy": npy_bytes(one.astype(">f4")), "a.cls": b"cat",
        "b.safetensors": save({"samples": torch.from_numpy(many), "other": torch.zeros(3)}), "b.cls": b"dog",
        "c.safetensors": save({"x": torch.from_numpy(one) / 2}, {"made": "by hand"}), "c.cls": b"cat",
    }  # fmt: skip
    write_tar(tmp_path / "s/0.tar", files)
    data = open_dataset(tmp_path / "s", shape, DataConfig(), index=tmp_path / "index.jsonl")
    assert isinstance(data, ArrayFolder)
    assert (len(data), data.classes, data.labels) == (5, ["cat", "dog"], [0, 1, 1, 1, 0])
    for found, expected in zip(data, [one, *many, one / 2], strict=True):
        torch.testing.assert_close(found["x"], torch.from_numpy(expected), rtol=0, atol=0)


def header(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + bytes(24)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "its header would be 0 bytes long"),
        (header("{}", 2**60), "its header would be 1,152,921,504,606,846,976 bytes long"),
        (header("[]"), "cannot be read as an array"),
        (header("{}"), "contains no array"),
        (header('{"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}'), "do not fit an array of shape"),
        (header('{"x": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}'), "do not fit an array of shape"),
        (header('{"x": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]}}'), "save it as one of uint8"),
        (header("[" * 100_000), "cannot be read as an array"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path, content, said):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        probe_array(tmp_path / "x.safetensors")


def test_hugging_face_images(tmp_path, hub):
    images = [Image.new("RGB", (20, 10), (i * 60, 0, 0)) for i in range(4)]
    features = hub.Features({"picture": hub.Image(), "kind": hub.ClassLabel(names=["x", "y"])})
    hub.Dataset.from_dict({"picture": images, "kind": [0, 1, 0, 1]}, features=features).save_to_disk(tmp_path / "set")
    data = open_dataset(tmp_path / "set", (3, 8, 8), DataConfig())
    assert isinstance(data, HubDataset)
    assert (data.classes, len(data)) == (["x", "y"], 4)
    item = data.draw(3, 0)
    assert (item["label"], item["x"].shape, item["x"][0].float().mean().item()) == (1, (3, 8, 8), 180)
    with pytest.raises(UsageError, match="no column of type Video"):
        open_dataset(tmp_path / "set", (3, 4, 8, 8), DataConfig())


@pytest.mark.parametrize("stored", ["bytes", "path"])
def test_hugging_face_clips(tmp_path, clips, hub, numbers, stored):
    """A column of type Video, saved to disk or loaded by name, gives the same frames as the files."""
    names = ["plain.mp4", "short_gop.mp4", "vp9.webm"]
    cells = [
        {"bytes": (clips / name).read_bytes(), "path": name}
        if stored == "bytes"
        else {"bytes": None, "path": str(clips / name)}
        for name in names
    ]
    features = hub.Features({"video": hub.Video(decode=False), "kind": hub.ClassLabel(names=["x", "y"])})
    table = hub.Dataset.from_dict({"video": cells, "kind": [1, 0, 1]}, features=features)
    table.cast_column("video", hub.Video()).save_to_disk(tmp_path / "set")
    data = open_dataset(tmp_path / "set", (3, 5, 32, 64), DataConfig(fps=4))
    assert (len(data), data.classes, data.describe()) == (3, ["x", "y"], "3 rows of column video, 2 classes: x, y")
    for index, label in enumerate([1, 0, 1]):
        item = data.draw(index, 0)
        found = numbers(item["x"].transpose(0, 1))
        assert found == list(range(found[0], found[0] + 9, 2))
        assert item["label"] == label
    with pytest.raises(UsageError, match=r"set\[0\].* has 20 frames, but 30 are needed"):
        open_dataset(tmp_path / "set", (3, 30, 32, 64), DataConfig()).draw(0, 0)


def test_hugging_face_name_and_split(tmp_path, hub, monkeypatch):
    """NAME in `hf:NAME:SPLIT` is a folder in the hub's layout, which runs the same code without the network."""
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, classes in {"train": "aabb", "test": "ab"}.items():
        for i, name in enumerate(classes):
            (tmp_path / "set" / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i * 50, 0, 0)).save(tmp_path / "set" / split / name / f"{i}.png")
    for name, length in {"": 4, ":train": 4, ":test": 2}.items():
        data = open_dataset(f"hf:{tmp_path / 'set'}{name}", (3, 8, 8), DataConfig())
        assert (len(data), data.classes) == (length, ["a", "b"])
    assert data.draw(1, 0)["x"][0].float().mean().item() == 50
    with pytest.raises(UsageError, match="cannot be loaded: "):
        open_dataset(f"hf:{tmp_path / 'set'}:validation", (3, 8, 8), DataConfig())


def test_photos_of_phones(tmp_path):
    """HEIC is read with the package pillow-heif; without it there is a one-line error."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.full((16, 24, 3), (200, 30, 90), np.uint8)
    pillow_heif.from_bytes("RGB", (24, 16), pixels.tobytes()).save(tmp_path / "x.heic", quality=95)
    item = ImageFolder(tmp_path, (16, 24))[0]["x"]
    assert (item.float().mean((1, 2)) - torch.tensor([200.0, 30, 90])).abs().max() < 6


def test_a_photo_of_a_phone_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UsageError, match=r"x\.heic cannot be read as an image here: pip install 'rin-video\[heic\]'"):
        ImageFolder(tmp_path, 8)


def test_a_folder_called_datasets_is_distinguished_from_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    with pytest.raises(UsageError, match="not the Hugging Face package: run rin-video from another folder"):
        import_hub()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'rin-video\[hub\]'"):
        import_hub()


@pytest.fixture
def two_classes(tmp_path, clips):
    for name in ("cat/plain.mp4", "dog/short_gop.mp4"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes((clips / name[4:]).read_bytes())
    (tmp_path / "data/dog/short_gop.txt").write_text("a dog")
    return tmp_path / "data"


def test_prepare_writes_shards_resumes_and_refuses_others(two_classes, tmp_path, capsys, monkeypatch, numbers):
    monkeypatch.chdir(tmp_path)
    command = ["prepare", str(two_classes), "--size", "16x32", "--fps", "4", "--out", "shards", "--workers", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 files in 1 shard (0 existed already)" in said
    assert "per second from the source" in said
    first = (tmp_path / "shards/000000.tar").read_bytes()
    assert main(command) == 0
    assert "(1 existed already)" in capsys.readouterr().out
    assert (tmp_path / "shards/000000.tar").read_bytes() == first
    assert main([*command, "--fps", "2"]) == 2
    assert "fps was 4.0, now it is 2.0" in capsys.readouterr().err
    data = ClipFolder(tmp_path / "shards", (16, 32), 10)
    assert data.classes == ["cat", "dog"]
    assert data.index.entries[1].caption == "a dog"
    assert [info.num_frames for info in data.infos] == [10, 10]
    assert numbers(data[0]["x"].transpose(0, 1)) == list(range(0, 20, 2))


def test_prepare_keeps_images_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data/a.png")
    assert main(["prepare", "data", "--size", "8", "--out", "shards"]) == 0
    item = ImageFolder(tmp_path / "shards", 8)[0]["x"]
    assert (item.permute(1, 2, 0).numpy() == pixels).all()


def test_preview_and_index_report_the_data(two_classes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (two_classes / "dog/broken.mp4").write_bytes(b"\0" * 99)
    options = ["--frames", "4", "--size", "16", "--num", "2"]
    for out in ("sheet.png", "sheet.mp4"):
        assert main(["peek", str(two_classes), *options, "--out", out]) == 0
        assert (tmp_path / out).stat().st_size > 1000
    said = capsys.readouterr().out
    assert "samples per class: cat 1, dog 1" in said
    assert "durations: 2.50 s each" in said
    assert "2 samples of 3x4x16x16: mean 0." in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "sheet.mp4", "sheet.png"]
    assert main(["index", str(two_classes)]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 files can be used" in said
    assert "broken.mp4 cannot be read" in said
    assert (tmp_path / "runs/data/index.jsonl").is_file()
    for command in (["index", str(two_classes)], ["peek", str(two_classes), *options]):
        assert main([*command, "--strict"]) == 2
        assert "1 of 3 files cannot be used, and data.strict is true" in capsys.readouterr().err
    assert main(["peek", str(two_classes), *options, "--out", "sheet.xyz"]) == 2
    assert "cannot write a sheet" in capsys.readouterr().err
