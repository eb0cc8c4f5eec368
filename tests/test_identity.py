"""A run belongs to its data: default folders do not collide, and a run only resumes with the same data."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError
from rin_video.datasets import index as indexing
from rin_video.datasets.index import make_index
from rin_video.datasets.open import INDEX
from rin_video.datasets.probing import _crash_error
from rin_video.errors import TimeLimitError, TransientError
from rin_video.training.identity import check_same_data, run_folder

TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2,
        "image_size": 8, "patch_size": 4}  # fmt: skip


def pictures(folder, *classes, seed=0):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed + number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "a.png")
    return folder


def run_of(data, out, classes=2, steps=1):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**TINY, num_classes=classes), timesteps=2)
    run = Trainer(diffusion, data, results_folder=out, progress=False, num_samples=1, train_batch_size=2,
                  train_num_steps=steps, num_workers=0)  # fmt: skip
    run.resume()
    return run


@pytest.mark.parametrize(
    ("one", "other"),
    [("a/clips", "b/clips"), ("v1.0", "v1.5"), ("ucf.split1", "ucf.split2"), ("x/{0..1}.tar", "y/{0..1}.tar")]
)  # fmt: skip
def test_default_folders_do_not_collide(tmp_path, monkeypatch, one, other):
    monkeypatch.chdir(tmp_path)
    for name in (one, other):
        folder = tmp_path / (name if "{" not in name else name[0])
        pictures(folder, "c")
    first = run_folder(one)
    make_index("x" if "{" in one else one, "image", path=first / INDEX)
    if "{" in one:  # the header of an index of shards
        (first / INDEX).write_text(json.dumps({"root": os.path.abspath(one)}) + "\n")
    assert run_folder(other) != first
    assert run_folder(one) == first  # the same command resumes
    assert run_folder(os.path.abspath(one)) == first


def test_a_refused_start_does_not_change_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "a/clips", "c")
    pictures(tmp_path / "b/clips", "c", seed=5)
    run = run_folder("a/clips")
    run_of("a/clips", run, classes=0).train()
    with pytest.raises(UsageError, match="was trained on"):
        run_of("b/clips", run, classes=0)
    assert run_folder("a/clips") == run
    assert run_folder("b/clips") != run
    (tmp_path / "a").rename(tmp_path / "moved")
    assert run_folder("moved/clips") == run


@pytest.mark.parametrize(
    ("data", "folder"),
    [("v1.0", "v1.0"), ("clip.mp4", "clip"), ("hf:user/name:train", "user-name-train"), ("hf:../x", "x")],
)
def test_default_folders_are_named_after_the_data(tmp_path, monkeypatch, data, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1.0").mkdir()
    (tmp_path / "clip.mp4").touch()
    assert run_folder(data).as_posix() == f"runs/{folder}"


def test_a_run_does_not_resume_with_other_data(tmp_path, caplog):
    one, other = pictures(tmp_path / "one", "a", "b"), pictures(tmp_path / "other", "a", "b", seed=7)
    run_of(one, tmp_path / "run").save()
    index = (tmp_path / "run" / INDEX).read_text()
    said = r"was trained on .*one, now the data is .*other: use another folder \(--out\), with --init-from .*run to"
    with pytest.raises(UsageError, match=said):
        run_of(other, tmp_path / "run")
    assert (tmp_path / "run" / INDEX).read_text() == index
    renamed = pictures(tmp_path / "renamed", "a", "c")
    with pytest.raises(UsageError, match=r"was trained with the classes a, b, now they are a, c: use another folder"):
        run_of(renamed, tmp_path / "run")
    with pytest.raises(UsageError, match="was trained with the classes a, b"):
        run_of(pictures(tmp_path / "fewer", "a", "b", "c"), tmp_path / "run", classes=3)
    assert "changed since" not in caplog.text


def test_a_run_resumes_with_data_that_moved_or_grew(tmp_path, caplog):
    pictures(tmp_path / "one", "a", "b")
    run_of(tmp_path / "one", tmp_path / "run").save()
    (tmp_path / "one").rename(tmp_path / "moved")
    run_of(tmp_path / "moved", tmp_path / "run")
    assert "changed since" not in caplog.text
    (tmp_path / "moved").rename(tmp_path / "one")
    Image.new("RGB", (8, 8)).save(tmp_path / "one/a/more.png")
    run_of(tmp_path / "one", tmp_path / "run")
    assert "have changed since the last checkpoint: training continues with them" in caplog.text


def test_a_checkpoint_of_an_earlier_version_is_accepted(tmp_path, monkeypatch):
    from rin_video.training import trainer

    monkeypatch.setattr(trainer, "identify", lambda *_: None)
    run_of(pictures(tmp_path / "one", "a", "b"), tmp_path / "run").save()
    monkeypatch.undo()
    run_of(pictures(tmp_path / "other", "a", "b", seed=7), tmp_path / "run")


# ---- what an index keeps


def probed(monkeypatch, results):
    """Replace probing: return `results` one after the other, and list the requested files."""
    asked = []

    def run(tasks, work, **options):
        asked.append([task.name for task in tasks])
        for i, result in enumerate(results):
            if i == len(tasks):
                return
            if isinstance(result, BaseException) and not isinstance(result, UsageError):
                raise result
            yield i, work(tasks[i]) if result is None else result

    monkeypatch.setattr(indexing, "run_in_subprocess", run)
    return asked


def test_an_interrupted_index_keeps_what_it_found(tmp_path, monkeypatch):
    pictures(tmp_path / "data", *"abcd")
    asked = probed(monkeypatch, [None, None, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        make_index(tmp_path / "data", "image", path=tmp_path / INDEX)
    results = [None] * 4
    asked += probed(monkeypatch, results)
    index = make_index(tmp_path / "data", "image", path=tmp_path / INDEX)
    assert [len(entry.hash) for entry in index.usable] == [32] * 4
    asked = probed(monkeypatch, results)
    make_index(tmp_path / "data", "image", path=tmp_path / INDEX)
    assert asked == [[]]


def test_the_second_search_is_for_the_rest(tmp_path, monkeypatch):
    pictures(tmp_path / "data", *"abcd")
    probed(monkeypatch, [None, UsageError("broken"), KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        make_index(tmp_path / "data", "image", path=tmp_path / INDEX)
    asked = probed(monkeypatch, [None] * 4)
    index = make_index(tmp_path / "data", "image", path=tmp_path / INDEX)
    assert [len(tasks) for tasks in asked] == [2]
    assert [reason for _, reason in index.unusable] == ["broken"]


def test_refusals_that_were_not_the_file_s_are_tried_again(tmp_path, monkeypatch):
    from rin_video.config import DataConfig

    pictures(tmp_path / "data", *"abc")
    probed(monkeypatch, [UsageError("its own"), TransientError("no package"), TimeLimitError("slow")])
    path = tmp_path / INDEX
    assert len(make_index(tmp_path / "data", "image", DataConfig(read_timeout=5), path=path).unusable) == 3
    asked = probed(monkeypatch, [None] * 3)
    index = make_index(tmp_path / "data", "image", DataConfig(read_timeout=5), path=path)
    assert [len(tasks) for tasks in asked] == [1]
    assert {reason for _, reason in index.unusable} == {"its own", "slow"}
    asked = probed(monkeypatch, [None] * 3)
    index = make_index(tmp_path / "data", "image", DataConfig(read_timeout=9), path=path)
    assert [len(tasks) for tasks in asked] == [1]
    assert [reason for _, reason in index.unusable] == ["its own"]


def test_which_refusals_are_not_the_file_s(tmp_path):
    assert isinstance(_crash_error("x", -9), TransientError)
    assert isinstance(_crash_error("x", -signal.SIGTERM), TransientError)
    assert not isinstance(_crash_error("x", -signal.SIGSEGV), TransientError)


def test_a_long_indexing_logs_what_is_saved(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="rin_video")
    monkeypatch.setattr(indexing, "MANY", 2)
    pictures(tmp_path / "data", *"abc")
    make_index(tmp_path / "data", "image", progress=True)
    assert "indexing 3 files; the index is not saved: `rin-video index" in caplog.text
    make_index(tmp_path / "data", "image", path=tmp_path / INDEX, progress=True)
    assert "indexing 3 files; the index is saved" in caplog.text


def test_other_images_with_the_same_clips_are_refused():
    then = {"path": "/clips", "images": "/a", "classes": [], "content": "1-2", "columns": [None, None]}
    check_same_data(Path("run"), then, then)
    check_same_data(Path("run"), then, {**then, "images": "/moved"})  # the same content
    with pytest.raises(UsageError, match=r"was trained with the images /a, now they are /b"):
        check_same_data(Path("run"), then, {**then, "images": "/b", "content": "1-3"})


def test_other_columns_of_a_data_set_are_refused():
    then = {"path": "hf:x", "images": None, "classes": [], "content": None, "columns": ["pic", "fine"]}
    check_same_data(Path("run"), then, then)
    check_same_data(Path("run"), {name: then[name] for name in then if name != "columns"}, then)  # of the earlier run
    with pytest.raises(UsageError, match=r"was trained on the columns pic and fine, now they are pic2 and fine"):
        check_same_data(Path("run"), then, {**then, "columns": ["pic2", "fine"]})
