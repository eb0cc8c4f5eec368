"""Results are not lost if a picture cannot be drawn, or because of its name."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_run import make_trainer

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError, cli, save_samples
from rin_video import media as exporting
from rin_video.config import Config
from rin_video.datasets import ImageFolder
from rin_video.media import check_target, sample_files
from rin_video.training.previews import is_previewed
from rin_video.weights import save_model

TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2,
        "image_size": 8, "patch_size": 4}  # fmt: skip


# ---- pictures of a training


def test_curves_that_cannot_be_drawn_do_not_end_a_training(tmp_path, monkeypatch, caplog):
    from rin_video.training import trainer

    def broken(*paths):
        raise ValueError("no backend\nand more")

    monkeypatch.setattr(trainer, "plot_metrics", broken)
    run = make_trainer(tmp_path, train_num_steps=1)
    run.train()
    assert "metrics.png could not be written, training continues: no backend" in caplog.text
    assert (tmp_path / "samples/step-00000001.png").is_file()
    assert (tmp_path / "model.safetensors").is_file()


def test_clips_that_cannot_be_encoded_leave_their_sheet(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(exporting, "ENCODER", "libx999")
    run = make_trainer(tmp_path, train_num_steps=1, mixture=True)
    run.train()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-00000001-images.png",
        "step-00000001.png",
    ]
    assert "step-00000001.mp4 could not be written" in caplog.text
    assert is_previewed(tmp_path, 1)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError("no memory")])
def test_a_full_disk_for_previews_does_not_end_a_training(tmp_path, monkeypatch, caplog, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(exporting, "_write_picture", full)
    make_trainer(tmp_path, train_num_steps=1).train()
    assert "step-00000001.png could not be written, training continues" in caplog.text
    assert (tmp_path / "checkpoints/step-00000001").is_dir()


def test_samples_that_are_no_pictures_are_numbers(tmp_path):
    """Samples with two channels are neither grey nor coloured."""
    diffusion = GaussianDiffusion(RIN(**TINY, channels=2), timesteps=2)
    run = Trainer(diffusion, torch.rand(4, 2, 8, 8), results_folder=tmp_path, num_workers=0, train_num_steps=1,
                  train_batch_size=2, num_samples=1, progress=False)  # fmt: skip
    run.train()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize("backend", ["module://not_here.backend_inline", "not_here"])
def test_a_backend_that_is_not_there_does_not_keep_curves_from_being_drawn(tmp_path, backend):
    """Colab sets MPLBACKEND for the notebook, but the command cannot import that module."""
    code = "import os; from rin_video.training.plots import _axes; _axes(1, 1); print(os.environ['MPLBACKEND'])"
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == backend


# ---- before the work


@pytest.mark.parametrize(
    ("name", "channels", "rank", "said"),
    [
        ("x.jpg", 4, 4, "cannot write transparency"),
        ("x.jpeg", 4, 5, "cannot write transparency"),
        ("x.mp4", 4, 5, "clips cannot have 4 channels"),
        ("x.png", 2, 4, r"pictures cannot have 2 channels: use \.npy or \.safetensors"),
        ("folder", 2, 5, "clips cannot have 2 channels"),
    ],
)
def test_what_cannot_be_written_is_refused_before(tmp_path, name, channels, rank, said):
    with pytest.raises(UsageError, match=said):
        check_target(tmp_path / name, rank, 8, channels)
    check_target(tmp_path / "x.npy", rank, 8, channels)


def test_the_command_refuses_before_it_samples(tmp_path, capsys, monkeypatch):
    model = RIN(**TINY, channels=4)
    save_model(tmp_path / "run", model, Config(model=model.config))
    monkeypatch.setattr(GaussianDiffusion, "sample", None)
    assert cli.main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "x.jpg")]) == 2
    assert "cannot write transparency" in capsys.readouterr().err


def test_a_missing_encoder_is_reported_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "ENCODER", "libx999")
    for name in ("x.mp4", "folder"):
        with pytest.raises(UsageError, match=r"built without libx999: pip install av .*, or use \.gif or \.png"):
            check_target(tmp_path / name, 5, 8, 3)
    check_target(tmp_path / "x.gif", 5, 8, 3)


# ---- names

NAMES = ["a" * 5000, "кот" * 200, "猫" * 300, "😀" * 100, "..", "con", "a/b\\c:d*?", "\udcff\udc80", "line\nline", " "]


def test_captions_of_any_length_and_alphabet_are_names_of_files(tmp_path):
    titles = [*NAMES, NAMES[2] + "!"]
    files = save_samples(torch.rand(len(titles), 3, 8, 8), tmp_path / "out", titles=titles)
    assert all(file.is_file() for file in files)
    assert len(set(files)) == len(titles)
    assert max(len(file.name.encode()) for file in files) <= 110
    assert sample_files(tmp_path, 1, ".png", ["猫 two"])[0].name == "0000-猫_two.png"
    save_samples(torch.rand(len(titles), 3, 8, 16), tmp_path / "grid.png", titles=titles)
    save_samples(torch.rand(2, 4, 8, 16), tmp_path / "alpha.png", titles=titles[:2])


def test_titles_without_freetype(tmp_path, monkeypatch):
    text = ImageDraw.ImageDraw.text

    def latin(self, place, string, **options):
        string.encode("latin-1")
        text(self, place, string, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", latin)
    exporting._title.cache_clear()
    save_samples(torch.rand(1, 3, 8, 16), tmp_path / "grid.png", titles=["猫"])
    exporting._title.cache_clear()


# ---- colours and transparency


def test_colours_change_and_transparency_stays(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    plain = ImageFolder(tmp_path, 8, channels=4).draw(0, 0)["x"]
    changed = ImageFolder(tmp_path, 8, channels=4, augment_color=1.0).draw(0, 0)["x"]
    assert torch.equal(changed[3], plain[3])
    assert not torch.equal(changed[:3], plain[:3])
    grey = ImageFolder(tmp_path, 8, channels=1, augment_color=1.0).draw(0, 0)["x"]
    assert grey.shape == (1, 8, 8)
