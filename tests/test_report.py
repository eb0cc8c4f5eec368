"""The HTML report of a run, and the trackers."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import make_trainer
from torch.utils.data import Dataset

from rin_video import UsageError, cli
from rin_video.reports.page import write_report

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)


class Clips(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(index))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a <b> run"
    model = {"frames": 4, "patch_size": [2, 4, 4]}
    make_trainer(folder, model=model, data=Clips(), train_num_steps=12, save_and_sample_every=3).train()
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_everything_and_needs_nothing(run, tmp_path):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("video") == 4
    assert page.tags.count("svg") == 1
    assert all(link.startswith(("data:", "#")) for link in page.links)
    text = " ".join(page.words)
    for word in ("a <b> run", "step 3", "step 12", "train_lr: 0.001", "torch", "CPU thread", "loss"):
        assert word in text, word


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([], "started today."),
        (["1 May"], "started today, resumed once (first start 1 May)."),
        (["1 May", "2 May"], "started today, resumed 2 times (first start 1 May)."),
    ],
)
def test_the_summary_reports_how_often_a_run_was_resumed(tmp_path, starts, words):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(
            {"step": 1, "loss": 1.0, "samples_per_second": 2.0, "lr": 1e-3, "grad_norm": 1.0, "loss_by_t": [1.0] * 10}
        )
    )
    (tmp_path / "run.json").write_text(
        json.dumps({"started": "today", "earlier": [{"started": start} for start in starts]})
    )
    page = write_report(tmp_path, tmp_path / "report.html")
    assert words in " ".join(Page(page.read_text(encoding="utf-8")).words)


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")
def test_a_browser_shows_the_page_and_plays_the_clips(run, tmp_path):
    """The page reports the length of its clips and whether they were decoded; the screenshot is not blank."""
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
             "--window-size=1200,1800", "--hide-scrollbars", "--virtual-time-budget=20000"]  # fmt: skip
    page = (tmp_path / "page.html").as_uri()
    picture = tmp_path / "page.png"
    subprocess.run([BROWSER, *flags, f"--screenshot={picture}", page], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (1800, 1200, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    probe = """<script>setInterval(() => document.title = [...document.querySelectorAll('video')].map(
        v => v.readyState >= 2 && v.videoWidth > 0 && v.duration > 0 && !v.error).join(), 100)</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text((tmp_path / "page.html").read_text(encoding="utf-8").replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", probed.as_uri()], check=True, capture_output=True, timeout=120, text=True
    )
    assert re.search(r"<title>(.*?)</title>", done.stdout)[1] == "true,true,true,true"


# ---- trackers


def test_tensorboard_gets_numbers_and_clips(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = {"frames": 4, "patch_size": [2, 4, 4]}
    make_trainer(
        tmp_path, model=model, data=Clips(), train_num_steps=4, save_and_sample_every=2, trackers=["tensorboard"]
    ).train()
    (folder,) = {path.parent for path in tmp_path.rglob("*tfevents*")} - {
        path.parent for path in tmp_path.rglob("*tfevents*.1")
    }
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert {"clips", "samples"} <= set(events.Tags()["images"])
    assert events.Images("clips")[0].encoded_image_string[:3] == b"GIF"


@pytest.mark.slow
def test_wandb_gets_numbers_pictures_and_clips(tmp_path, monkeypatch):
    """wandb runs offline: its files are in the run's folder, and its log is read back."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    model = {"frames": 4, "patch_size": [2, 4, 4]}
    make_trainer(run, model=model, data=Clips(), train_num_steps=4, save_and_sample_every=2, trackers=["wandb"]).train()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (files,) = run.glob("wandb/offline-run-*/files/media")
    clips = sorted((files / "videos").glob("clips_*.mp4"), key=lambda path: path.stat().st_mtime)
    assert [clip.read_bytes() for clip in clips] == [
        (run / f"samples/step-{step:08d}.mp4").read_bytes() for step in (2, 4)
    ]
    assert len(list((files / "images").glob("samples_*.png"))) == 2
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    for name in (b"loss_by_t/", b"grad_norm", b"train.train_lr"):
        assert name in log.read_bytes(), name


def test_trackers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"train\.trackers=tensorbord is unknown: choose .*tensorboard"):
        make_trainer(tmp_path, trackers=["tensorbord"])
    from importlib.util import find_spec

    if find_spec("clearml") is None:
        with pytest.raises(UsageError, match="needs a package that is not installed: pip install 'clearml'"):
            make_trainer(tmp_path, trackers=["clearml"])
