"""Real-world datasets of the Hugging Face package: rows without a picture, columns of any name."""

import numpy as np
import pytest
from PIL import Image

from rin_video import UsageError, cli
from rin_video.config import DataConfig
from rin_video.datasets import hub as hub_module
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.open import open_dataset


def png(folder, value):
    path = folder / f"{value}.png"
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    return {"bytes": path.read_bytes(), "path": None}


def saved(hub, folder, columns, features=None):
    hub.Dataset.from_dict(columns, features=features and hub.Features(features)).save_to_disk(folder)
    return folder


def test_a_row_without_picture_only_excludes_itself(tmp_path, hub, caplog):
    cells = [png(tmp_path, 10), None, {"bytes": None, "path": str(tmp_path / "gone.png")}, png(tmp_path, 40)]
    saved(hub, tmp_path / "typed", {"image": [png(tmp_path, 1)] * 4}, {"image": hub.Image()})
    data = open_dataset(tmp_path / "typed", (3, 8, 8), DataConfig())
    data.table = [{"image": cell} for cell in cells]
    with pytest.raises(UsageError, match=r"typed\[1\] has no value in column image"):
        data.draw(1, 0)
    with pytest.raises(UsageError, match=r"typed\[2\]: .*gone\.png cannot be read"):
        data.draw(2, 0)
    batches = TrainLoader(data, DataConfig(num_workers=0), 4, seed=0)
    values = [int(value) for _ in range(2) for value in next(batches).x[:, 0, 0, 0]]
    assert sorted(set(values)) == [10, 40]
    assert batches.num_bad == 2


@pytest.mark.parametrize("option", ["buckets=[8x8]", "avoid_cuts=True", "sampling='time'"])
def test_options_without_effect_are_refused(tmp_path, hub, option):
    folder = saved(hub, tmp_path / "set", {"image": [png(tmp_path, 1)]}, {"image": hub.Image()})
    name, value = option.split("=")
    options = DataConfig(**{name: ["8x8"] if name == "buckets" else eval(value)})
    with pytest.raises(UsageError, match=f"data.{name}=.* requires folders or shards"):
        open_dataset(folder, (3, 8, 8), options)


def test_the_option_windows_takes_effect(tmp_path, hub, clips, numbers):
    cells = [{"bytes": (clips / "plain.mp4").read_bytes(), "path": None}]
    folder = saved(hub, tmp_path / "set", {"v": cells}, {"v": hub.Video(decode=False)})
    hub.load_from_disk(folder).cast_column("v", hub.Video()).save_to_disk(tmp_path / "typed")
    data = open_dataset(tmp_path / "typed", (3, 4, 32, 64), DataConfig(windows=2))
    assert (len(data), data.name_of(1)) == (2, f"{tmp_path / 'typed'}[0]")
    first, second = ([numbers(data.draw(i, e)["x"].transpose(0, 1))[0] for e in range(6)] for i in range(2))
    assert max(first) < min(second)


def test_columns_by_name(tmp_path, hub):
    """Pictures are untyped bytes; labels are integers or text."""
    columns = {
        "first": [png(tmp_path, i) for i in (1, 2, 3)],
        "photo": [png(tmp_path, i)["bytes"] for i in (10, 20, 30)],
        "kind": [7, 3, None],
        "name": ["b", "a", "b"],
    }
    folder = saved(hub, tmp_path / "set", columns)
    hub.load_from_disk(folder).cast_column("first", hub.Image()).save_to_disk(tmp_path / "typed")
    data = open_dataset(tmp_path / "typed", (3, 8, 8), DataConfig())
    said = "no labels; integer columns: kind; --label-column kind uses one"
    assert data.describe() == f"3 rows of column first\n{said}"
    data = open_dataset(tmp_path / "typed", (3, 8, 8), DataConfig(image_column="photo", label_column="kind"))
    assert data.classes == ["3", "7"]
    assert [(item["label"], int(item["x"].max())) for item in (data[0], data[1], data[2])] == [
        (1, 10),
        (0, 20),
        (-1, 30),
    ]
    data = open_dataset(tmp_path / "typed", (3, 8, 8), DataConfig(label_column="name"))
    assert (data.classes, data.labels) == (["a", "b"], [1, 0, 1])
    for options, said in [
        ({"image_column": "picture"}, r"has no column picture: it has first \(Image\), photo \(Value\)"),
        ({"image_column": "kind"}, "column kind contains no images"),
        ({"label_column": "first"}, "not class labels"),
    ]:
        with pytest.raises(UsageError, match=said):
            open_dataset(tmp_path / "typed", (3, 8, 8), DataConfig(**options))
    with pytest.raises(UsageError, match="which this is not: leave it out"):
        open_dataset(tmp_path, (3, 8, 8), DataConfig(label_column="name"))


def test_a_dataset_of_images_is_detected(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(
        hub,
        tmp_path / "set",
        {"image": [png(tmp_path, 9)] * 2, "kind": [0, 1]},
        {"image": hub.Image(), "kind": hub.Value("int64")},
    )
    assert cli.main(["peek", "set", "--size", "8", "--label-column", "kind", "--out", "sheet.png"]) == 0
    said = capsys.readouterr().out
    assert "2 rows of column image, 2 classes: 0, 1" in said
    assert "2 samples of 3x8x8" in said
    both = {"image": [png(tmp_path, 9)], "clip": [{"bytes": b"", "path": None}]}
    saved(hub, tmp_path / "both", both, {"image": hub.Image(), "clip": hub.Video(decode=False)})
    hub.load_from_disk(tmp_path / "both").cast_column("clip", hub.Video()).save_to_disk(tmp_path / "two")
    assert cli.main(["peek", "two", "--size", "8"]) == 2
    assert (
        "has images (image) and clips (clip): choose the clips (--frames 16) or the images" in capsys.readouterr().err
    )
    saved(hub, tmp_path / "none", {"image": []}, {"image": hub.Image()})
    assert cli.main(["peek", "none", "--size", "8"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("rin-video: error: none ")


def test_a_configuration_can_be_named(hub, monkeypatch):
    calls = []

    def load(*names, split, trust_remote_code):
        assert not trust_remote_code
        calls.append((*names, split))
        if len(names) == 1 and split is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['small', 'large']")
        return hub.Dataset.from_dict({"a": [1]})

    monkeypatch.setattr(hub, "load_dataset", load)
    hub_module._load.cache_clear()
    for name in ("hf:u/n:test", "hf:u/n:small:test", "hf:u/n:small:"):
        hub_module.load_table(name)
    assert calls == [("u/n", "test"), ("u/n", "small", "test"), ("u/n", "small", None)]
    with pytest.raises(UsageError, match=r"pick one among .*'small', 'large'\]: write hf:u/n:NAME:train"):
        hub_module.load_table("hf:u/n")
    hub_module._load.cache_clear()
