"""Unusual folders and options give one line that states the problem, and exit code 2."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rin_video.cli import main


@pytest.fixture
def here(tmp_path, monkeypatch, clips) -> Path:
    """The working directory with unusual folders in which the commands run."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "images", "nested/a/b c/ü", "both", "zero", "notes", "arrays", "links", "clips"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("images/a.png", "nested/a/b c/ü/ö 名'.png", "both/a.png"):
        Image.new("RGB", (20, 20), (90, 120, 30)).save(tmp_path / name)
    for name in ("both/a.mp4", "clips/a clip.mp4"):
        (tmp_path / name).write_bytes((clips / "plain.mp4").read_bytes())
    for name in ("zero/a.png", "notes/a.txt", "file"):
        (tmp_path / name).write_bytes(b"")
    np.save(tmp_path / "arrays/a.npy", np.zeros((3, 8, 8), np.uint8))
    (tmp_path / "links/in").symlink_to(tmp_path / "images", target_is_directory=True)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("index empty", "empty contains no .png"),
        ("index nowhere", "there is no file or folder nowhere"),
        ("index notes", "notes contains no .png"),
        ("index links", "links to folders are not followed"),
        ("index zero", "a.png is empty: download the file again"),
        ("index both", "contains 1 image and 1 clip: choose the clips (--frames 16; index and prepare: --kind video)"),
        ("index images --kind audio", "unknown kind 'audio': use one of image, video, array"),
        ("index images --kind video", "it contains 1 image"),
        ("index images --out clips", "the index clips cannot be written"),
        ("index images --out file/index.jsonl", "cannot be written"),
        ("index images train.train_lr=1", "train.train_lr=1: index does not train, so it only takes data.key=value"),
        ("index hf:someone/something", "index takes files and shards"),
        ("peek images --frames 4", "it contains 1 image: leave out --frames"),
        ("peek clips --frames 4 --num 0", "--num is 0: it must be at least 1"),
        ("peek clips --frames 4 --size 7", "height 7 is not a multiple of its patch size"),
        ("peek clips --frames 4 data.fps=10 data.stride=2", "both choose frames: set only one"),
        ("peek clips --frames 4 data.buckets=[16x16]", "data.buckets has 16x16: write 16x48x80"),
        ("train --data clips --frames 40 --out out", "a clip.mp4 has 20 frames, but 40 are needed"),
        ("peek clips --frames 4 --out file/sheet.png", "cannot be written"),
        ("prepare images --size 8 --out file/shards", "--out file"),
        ("prepare images --size 8 --out images", "is in the folder of the data: use another folder"),
        ("prepare images --size 8 --out images/small", "is in the folder of the data: use another folder"),
        (
            "prepare images --size 8 --out out --kind audio",
            "prepare takes clips or images, but images is of kind audio",
        ),
        ("prepare arrays --size 8 --out out", "prepare takes clips or images, but arrays is of kind array"),
        ("prepare clips --size 8 --out out --fps 0", "data.fps is 0.0: it must be above 0"),
        ("prepare clips --size 8 --out out --workers 0", "--workers is 0: it must be at least 1"),
        ("train --data empty --out out", "empty contains no .png"),
        ("train --data images --out file", "--out file is a file: use a folder"),
        ("train --data images --steps 0 --out out", "train.train_num_steps is 0: it must be at least 1"),
        ("train --data clips --frames 40 --out out", "use --frames 20, or a smaller stride"),
    ],
)
def test_one_line_and_exit_code_2(here, capsys, command, said):
    assert main(command.split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rin-video")]
    assert len(lines) == 1
    assert lines[0].startswith("rin-video: error: ")
    assert said in lines[0].replace(os.sep, "/")


@pytest.mark.parametrize("name", ["nested", "loop"])
def test_odd_folders_that_can_be_used(here, capsys, name):
    (here / "loop").mkdir()
    (here / "loop/again").symlink_to(here / "loop", target_is_directory=True)
    (here / "loop/a.png").write_bytes((here / "images/a.png").read_bytes())
    (here / "loop/b.png").symlink_to(here / "loop/b.png")  # a link to itself
    assert main(["peek", name, "--size", "8", "--out", "new/sheet.png"]) == 0
    assert "1 sample of 3x8x8: mean 0.353 0.471 0.118, std 0.000 0.000 0.000" in capsys.readouterr().out
    assert (here / "new/sheet.png").is_file()


def test_files_without_permission_are_reported(here, capsys):
    Image.new("RGB", (4, 4)).save(here / "images/secret.png")
    (here / "images/secret.png").chmod(0)
    if os.access(here / "images/secret.png", os.R_OK):
        pytest.skip("permissions do not bind this user")
    (here / "nested/a").chmod(0)
    assert main(["index", "images"]) == 0
    assert "secret.png cannot be read: Permission denied" in capsys.readouterr().out
    assert main(["index", "nested"]) == 2
    (here / "nested/a").chmod(0o755)
    here.chmod(0o555)
    assert main(["index", "images", "--out", "new/index.jsonl"]) == 2
    assert "cannot be written (Permission denied)" in capsys.readouterr().err
