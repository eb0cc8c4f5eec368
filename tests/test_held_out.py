"""Held-out data: which files it has, that they are never trained on, and the splits of a dataset."""

import hashlib

import numpy as np
import pytest
import torch
from random_files import clips, pictures

from rin_video import UsageError
from rin_video.config import DataConfig, data_config
from rin_video.datasets import hub as hub_module
from rin_video.datasets.adapters import draw
from rin_video.datasets.epochs import name_of
from rin_video.datasets.held_out import file_keys, hash_of, hold_out
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.index import make_index
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.open import open_dataset, open_sides, open_split
from rin_video.datasets.prepare import prepare
from rin_video.datasets.shards import write_shard
from rin_video.datasets.splits import find_splits

IMAGE, CLIP = (3, 8, 8), (3, 4, 8, 8)


def names(dataset):
    return {name_of(dataset, i) for i in range(len(dataset))}


def drawn(dataset, epochs=2):
    """Return the names of all samples that training draws in some epochs."""
    loader, found = TrainLoader(dataset, DataConfig(num_workers=0), 2, seed=0), set()
    for _ in range(epochs * -(-len(dataset) // 2) + 2):
        next(loader)
        found |= {name_of(dataset, i) for i in loader.indices}
    return found


def check_apart(path, shape, options, changed=()):
    """Check that the sides are a partition into files of the data, and that training draws those of its side only."""
    train, held = (open_split(path, shape, options, split) for split in ("train", "validation"))
    everything = open_split(path, shape, options, "all")
    assert names(held) | names(train) == names(everything)
    assert not names(held) & names(train)
    assert drawn(train) == names(train)
    assert train.classes == held.classes == everything.classes
    for side in (train, held):
        assert [side.group_of(i) == side.group_of(j) for i in range(len(side)) for j in range(len(side))] == [
            name_of(side, i) == name_of(side, j) for i in range(len(side)) for j in range(len(side))
        ]
        for i in range(len(side)):  # the same item as in the complete dataset: no label and no embedding is mixed up
            j = next(j for j in range(len(everything)) if name_of(everything, j) == name_of(side, i))
            mine, whole = draw(side, i, 0), draw(everything, j, 0)
            assert mine["label"] == whole["label"]
            for key in {"embedding", "x"} & set(mine) - ({"x"} if "windows" in changed else set()):
                torch.testing.assert_close(mine[key], whole[key], rtol=0, atol=0)
    return train, held


# ---- which files


def test_the_share_of_many_names():
    """The number below a share is binomial: within five standard deviations."""
    held = hold_out([f"clip-{i}" for i in range(20000)], [None] * 20000, 0.1)
    assert abs(sum(held) - 2000) < 5 * (20000 * 0.1 * 0.9) ** 0.5
    values = np.array([hash_of(str(i)) for i in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(np.sort(values) - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / 4000**0.5  # Kolmogorov, p = 0.001


def test_a_hash_is_fixed():
    """The value is that of BLAKE2b: 48 bits, big endian; the composed and the decomposed form of a name agree."""
    assert hash_of("cat/1") == int(hashlib.blake2b(b"cat/1", digest_size=6).hexdigest(), 16) / 2**48
    assert hash_of("caf\u00e9") == hash_of("cafe\u0301")


def test_more_files_move_no_file():
    """A file stays on its side whatever is added, in a class with many files."""
    before = [f"a/{i}" for i in range(300)]
    after = sorted([*before, *(f"a/new-{i}" for i in range(300)), *(f"b/{i}" for i in range(5))])
    first = dict(zip(before, hold_out(before, ["a"] * 300, 0.05), strict=True))
    second = dict(zip(after, hold_out(after, [key[0] for key in after], 0.05), strict=True))
    assert {key: second[key] for key in before} == first


def test_each_class_of_two_files_has_both_sides():
    keys = [f"{name}/{i}" for name in "abcdefgh" for i in range(2)] + ["single/0"]
    names = [key.split("/")[0] for key in keys]
    for share in (0.01, 0.5):
        held = dict(zip(keys, hold_out(keys, names, share), strict=True))
        assert not held["single/0"]
        for name in "abcdefgh":
            pair = sorted((f"{name}/{i}" for i in range(2)), key=hash_of)
            assert [held[key] for key in pair] == [True, False]  # the smaller hash is held out


def test_copies_are_on_the_same_side():
    keys = [str(i) for i in range(200)]
    contents = [str(i // 4) for i in range(200)]
    held = hold_out(keys, [None] * 200, 0.2, contents)
    assert 0 < sum(held) < 200
    assert all(len(set(held[i : i + 4])) == 1 for i in range(0, 200, 4))


@pytest.mark.parametrize("value", [0, 0.6, -0.1, True, float("nan"), 1])
def test_a_share_out_of_range(value):
    with pytest.raises(UsageError, match=r"data.validation is .*: it must be a share above 0 and at most 0.5"):
        data_config(validation=value)


# ---- every kind of data


def test_images_in_classes(tmp_path):
    pictures(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)))
    _, held = check_apart(tmp_path, IMAGE, DataConfig(validation=0.2))
    assert {held.classes[held[i]["label"]] for i in range(len(held))} == {"cat", "dog"}
    assert open_split(tmp_path, IMAGE, DataConfig(), "validation") is None
    assert len(open_split(tmp_path, IMAGE, DataConfig(), "train")) == 12
    again = open_split(tmp_path, IMAGE, DataConfig(validation=0.2, crop="random", crop_scale=[0.5, 1]), "validation")
    assert names(again) == names(held)


def test_clips_with_windows_and_embeddings(tmp_path):
    """All windows of a file are on one side, also with other windows, and a file that is too short moves no other."""
    clips(tmp_path, *(f"{i}.mp4" for i in range(8)))
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", np.full((1 + (i == 3), 4), i, np.float32))
    options = DataConfig(validation=0.3, windows=2, embeddings=True)
    train, held = check_apart(tmp_path, CLIP, options, changed=["windows"])
    assert len(held) == 2 * len(names(held))
    assert train.embeddings.shape == held.embeddings.shape == (2, 4)
    for i in range(len(held)):
        assert f"{int(held[i]['embedding'][0, 0])}.mp4" == name_of(held, i).split("/")[-1].split("\\")[-1]
    longer = clips(tmp_path, "9.mp4", frames=3)
    assert names(open_split(longer, CLIP, DataConfig(validation=0.3), "validation")) <= names(held)
    assert "clips per epoch" in train.describe()


def test_captions_follow_the_files(tmp_path):
    clips(tmp_path, *(f"{i}.mp4" for i in range(6)))
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"caption {i}", encoding="utf-8")
    everything = open_dataset(tmp_path, CLIP, DataConfig())

    class Captions:
        shape = (1, 1)

        def __init__(self, rows):
            self.rows = rows

        def __getitem__(self, file):
            return torch.tensor([[float(self.rows[file])]])

        def select(self, files):
            return Captions([self.rows[file] for file in files])

    everything.embeddings = Captions(range(6))
    part = everything.select([1, 4])
    assert [float(part[i]["embedding"]) for i in range(2)] == [1, 4]


def test_arrays(tmp_path):
    """The rows of an array of many samples are separate samples."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "many.npy", rng.random((20, 2, 5), dtype=np.float32))
    np.save(tmp_path / "one.npy", rng.random((2, 5), dtype=np.float32))
    train, held = check_apart(tmp_path, (2, 5), DataConfig(validation=0.25))
    assert len(train) + len(held) == 21
    assert held.describe().startswith(f"{len(held)} array")


def test_shards_by_the_name_of_the_member(tmp_path):
    """A shard has the sides of the folder that it was made from, wherever its members are."""
    folder = pictures(tmp_path / "folder", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(8)))
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}
    (tmp_path / "shards").mkdir()
    for number, part in enumerate((sorted(content)[:5], sorted(content)[5:])):
        write_shard(tmp_path / "shards" / f"{number}.tar", {name: content[name] for name in part})
    options = DataConfig(validation=0.2)
    _, from_shards = check_apart(tmp_path / "shards", IMAGE, options)
    _, from_folder = check_apart(folder, IMAGE, options)
    assert {name.split(":")[-1] for name in names(from_shards)} == {
        path.split("folder")[-1][1:].replace("\\", "/") for path in names(from_folder)
    }


def test_the_files_of_a_sample_in_a_shard_are_on_one_side(tmp_path):
    pictures(tmp_path, *(f"{i}.{view}.png" for i in range(12) for view in ("left", "right")))
    write_shard(tmp_path / "views.tar", {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.png"))})
    _, held = check_apart(tmp_path / "views.tar", IMAGE, DataConfig(validation=0.3))
    views = {}
    for name in names(held):
        views.setdefault(name.split(":")[-1].split(".")[0], []).append(name)
    assert {len(each) for each in views.values()} == {2}


@pytest.mark.parametrize("with_name", [True, False])
def test_prepared_shards_have_the_sides_of_their_source(tmp_path, monkeypatch, with_name):
    """The keys of prepared shards are numbers that change when a file is added, so the source file counts."""
    monkeypatch.chdir(tmp_path)
    source = pictures(tmp_path / "in" / "pictures", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)))
    out = tmp_path / "out"
    out.mkdir()
    prepare("in/pictures", "image", out, (8, 8), DataConfig(), workers=1, files_per_shard=5)
    if not with_name:  # as written by an earlier version
        for shard in out.glob("*.tar"):
            shard.write_bytes(shard.read_bytes().replace(b'"name"', b'"nome"'))
    found = make_index(out, "image", DataConfig())
    keys = file_keys(out, [entry.source for entry in found.usable])
    assert keys == sorted(path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.png"))
    _, held = check_apart(out, IMAGE, DataConfig(validation=0.2))
    own = open_split(source, IMAGE, DataConfig(validation=0.2), "validation")
    pixels = {own[i]["x"].numpy().tobytes() for i in range(len(own))}
    assert {held[i]["x"].numpy().tobytes() for i in range(len(held))} == pixels


def test_clips_mixed_with_images(tmp_path):
    clips(tmp_path / "clips", *(f"{name}/{i}.mp4" for name in ("cat", "dog") for i in range(4)), frames=4)
    pictures(tmp_path / "images", *(f"{name}/{i}.png" for name in ("dog", "eel") for i in range(4)))
    options = DataConfig(images=str(tmp_path / "images"), validation=0.25)
    train, held = check_apart(tmp_path / "clips", CLIP, options)
    assert train.classes == held.classes == ["cat", "dog", "eel"]
    clips(tmp_path / "own", "dog/8.mp4", "cat/9.mp4", frames=4)
    sides = open_sides(tmp_path / "clips", CLIP, DataConfig(images=options.images, validation=str(tmp_path / "own")))
    assert (len(sides.train), len(sides.validation), sides.validation.labels) == (16, 2, [0, 1])


def test_a_dataset_of_the_hub(tmp_path, hub):
    """Rows are on the side that the hash of their number determines; the saved splits are recognised."""
    folder = pictures(tmp_path, *(f"{i}.png" for i in range(20)))
    cells = [{"bytes": (folder / f"{i}.png").read_bytes(), "path": None} for i in range(20)]
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])})

    def table(*rows):
        columns = {"image": [cells[i] for i in rows], "label": [i % 2 for i in rows]}
        return hub.Dataset.from_dict(columns, features=features)

    table(*range(20)).save_to_disk(tmp_path / "table")
    _, held = check_apart(tmp_path / "table", IMAGE, DataConfig(validation=0.2))
    expected = hold_out([str(i) for i in range(20)], [str(i % 2) for i in range(20)], 0.2)
    assert names(held) == {f"{tmp_path / 'table'}[{i}]" for i in range(20) if expected[i]}

    parts = {"train": table(*range(12)), "test": table(12, 13)}
    hub.DatasetDict(parts).save_to_disk(tmp_path / "two")
    hub.DatasetDict(parts | {"validation": table(*range(14, 20))}).save_to_disk(tmp_path / "three")
    for name, number in (("two", 2), ("three", 6)):
        sides = open_sides(tmp_path / name, IMAGE, DataConfig())
        assert (len(sides.train), len(sides.validation), sides.validation.classes) == (12, number, ["cat", "dog"])
    assert names(sides.validation) == {f"{tmp_path / 'three' / 'validation'}[{i}]" for i in range(6)}
    assert len(open_split(tmp_path / "three", IMAGE, DataConfig(validation=0.25), "validation")) < 6


def test_the_splits_of_a_name_on_the_hub(hub, monkeypatch):
    """They are only looked for if the name has no split; without a split `train`, the first one is used as before."""
    parts = {"hf:u/n": ["test", "train", "validation"], "hf:u/n:small:": ["train", "test"], "hf:u/odd": ["test", "dev"]}
    table = hub.Dataset.from_dict({"a": [1]})
    monkeypatch.setattr(
        hub,
        "load_dataset",
        lambda *names, split, **_: (
            table
            if split
            else hub.DatasetDict(dict.fromkeys(parts[f"hf:{':'.join(names)}{':' * (len(names) > 1)}"], table))
        ),
    )
    hub_module._load.cache_clear()
    assert find_splits("hf:u/n") == ("hf:u/n", "hf:u/n:validation")
    assert find_splits("hf:u/n:small:") == ("hf:u/n:small:", "hf:u/n:small:test")
    for name in ("hf:u/n:train", "hf:u/n:small:train", "hf:u/odd"):
        assert find_splits(name) == (name, None)
    hub_module._load.cache_clear()


# ---- splits and data of its own


@pytest.mark.parametrize("names_of", [("train", "val"), ("Train", "test", "valid"), ("training", "dev", "test")])
def test_folders_of_splits(tmp_path, names_of):
    for split in names_of:
        pictures(tmp_path, *(f"{split}/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)))
    sides = open_sides(tmp_path, IMAGE, DataConfig())
    there = next(name for name in names_of if name in ("val", "valid", "dev"))
    assert names(sides.train) == {str(p) for p in (tmp_path / names_of[0]).rglob("*.png")} == drawn(sides.train)
    assert names(sides.validation) == {str(p) for p in (tmp_path / there).rglob("*.png")}
    assert sides.train.classes == sides.validation.classes == ["cat", "dog"]
    assert str(tmp_path / there) in sides.note
    assert names(open_dataset(tmp_path, IMAGE, DataConfig())) == names(sides.train)


def test_shards_in_folders_of_splits(tmp_path):
    pictures(tmp_path / "in", *(f"{i}.png" for i in range(6)))
    content = {path.name: path.read_bytes() for path in sorted((tmp_path / "in").iterdir())}
    for split, chosen in (("train", "0123"), ("test", "45")):
        (tmp_path / "data" / split).mkdir(parents=True)
        write_shard(tmp_path / "data" / split / "0.tar", {f"{i}.png": content[f"{i}.png"] for i in chosen})
    sides = open_sides(tmp_path / "data", IMAGE, DataConfig())
    assert (len(sides.train), len(sides.validation)) == (4, 2)


def test_an_option_takes_precedence_over_folders_of_splits(tmp_path):
    pictures(tmp_path, *(f"{split}/{i}.png" for split in ("train", "val", "test") for i in range(4)))
    share = open_sides(tmp_path, IMAGE, DataConfig(validation=0.3))
    inside = {str(path) for path in (tmp_path / "train").iterdir()}
    assert names(share.train) | names(share.validation) == inside
    test = open_sides(tmp_path, IMAGE, DataConfig(validation=str(tmp_path / "test")))
    assert names(test.validation) == {str(path) for path in (tmp_path / "test").iterdir()}
    assert names(test.train) == inside


def test_splits_without_one_for_training(tmp_path):
    pictures(tmp_path, "val/a.png", "test/b.png")
    with pytest.raises(UsageError, match=r"contains the splits test, val, but none for training: pass the one to"):
        open_sides(tmp_path, IMAGE, DataConfig())
    pictures(tmp_path, "train/a.png", "training/b.png")
    with pytest.raises(UsageError, match=r"two of them for training: pass one, such as --data .*train"):
        open_sides(tmp_path, IMAGE, DataConfig())


@pytest.mark.parametrize("others", [("bus/0.png",), ("0.png",)])
def test_other_folders_or_files_mean_classes(tmp_path, others):
    pictures(tmp_path, "train/a.png", *others)
    sides = open_sides(tmp_path, IMAGE, DataConfig())
    assert (len(sides.train), sides.validation) == (2, None)


def test_a_split_without_media_and_files_that_are_none_do_not_count(tmp_path):
    pictures(tmp_path, "train/a.png", "val/b.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}", encoding="utf-8")
    (tmp_path / "test").mkdir()
    assert len(open_sides(tmp_path, IMAGE, DataConfig()).validation) == 1
    (tmp_path / "val" / "b.png").unlink()
    assert open_sides(tmp_path, IMAGE, DataConfig()).validation is None


def test_validation_data_of_its_own(tmp_path, caplog):
    """Its classes are numbered as those of the training data, even if some are missing."""
    data = pictures(tmp_path / "data", *(f"{name}/{i}.png" for name in ("ant", "bee", "cat") for i in range(3)))
    own = pictures(tmp_path / "own", "cat/1.png", "bee/2.png", "loose.png", seed=1)
    sides = open_sides(data, IMAGE, DataConfig(validation=str(own)), index=tmp_path / "run" / "index.jsonl")
    assert (len(sides.train), sides.validation.classes) == (9, ["ant", "bee", "cat"])
    assert [sides.validation[i]["label"] for i in range(3)] == [1, 2, -1]
    assert (tmp_path / "run" / "validation-index.jsonl").is_file()
    assert not caplog.records[1:]
    pictures(own, "dog/1.png")
    with pytest.raises(UsageError, match=r"has the class dog, which the training data has not .*ant, bee, cat"):
        open_sides(data, IMAGE, DataConfig(validation=str(own)))
    flat = pictures(tmp_path / "flat", "1.png", "2.png", seed=2)
    assert "without labels" in open_sides(data, IMAGE, DataConfig(validation=str(flat))).note
    (flat / "1.png").write_bytes((data / "ant" / "0.png").read_bytes())
    open_sides(data, IMAGE, DataConfig(validation=str(flat)))
    assert "1 file of the validation data is also in the training data" in caplog.text


def test_validation_data_inside_the_training_data(tmp_path):
    pictures(tmp_path, "a/0.png", "b/0.png")
    for own in (tmp_path, tmp_path / "a"):
        with pytest.raises(UsageError, match=r"overlap: move it to a folder beside it, or hold out a share"):
            open_sides(tmp_path, IMAGE, DataConfig(validation=str(own)))


def test_splits_within_a_shard(tmp_path):
    pictures(tmp_path, "train/a.png", "val/b.png")
    write_shard(tmp_path / "all.tar", {name: (tmp_path / name).read_bytes() for name in ("train/a.png", "val/b.png")})
    with pytest.raises(
        UsageError, match="contains the splits train, val, not classes: write each split to shards of its"
    ):
        open_sides(tmp_path / "all.tar", IMAGE, DataConfig())


def test_too_few_files(tmp_path):
    clips(tmp_path, "only.mp4", frames=40)
    with pytest.raises(UsageError, match=r"data.validation=0.1 leaves no file of .* there are 1 usable file"):
        open_sides(tmp_path, CLIP, DataConfig(validation=0.1, windows=5))


def test_without_the_option_the_data_is_as_before(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(5)))
    one, two = ImageFolder(tmp_path, 8), open_sides(tmp_path, IMAGE, DataConfig()).train
    assert one.files == two.files
    assert one.describe() == two.describe()
