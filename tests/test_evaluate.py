"""`rin-video evaluate`: the same scores for a run and its samples, resume, protocols, and errors in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from means import Means

import rin_video
from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.cli import main
from rin_video.config import Config, DataConfig, SampleConfig
from rin_video.datasets.demo import SHAPES, render_clip
from rin_video.evaluation import drawing
from rin_video.evaluation.comparison import differences
from rin_video.evaluation.protocol import PUBLISHED, missing
from rin_video.evaluation.sets import open_samples
from rin_video.media import save_samples, write_video
from rin_video.training.locking import lock_run
from rin_video.weights import save_model

TINY = {"dim": 16, "num_latents": 4, "dim_latent": 16, "depth": 1, "latent_self_attn_depth": 1, "num_heads": 2,
        "latent_num_heads": 2, "image_size": 16, "frames": 4, "patch_size": (4, 4, 4)}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 clips of 4 frames of 16x16, in three classes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(24):
        shape = [*SHAPES][i % 3]
        (folder / shape).mkdir(exist_ok=True)
        write_video(torch.from_numpy(render_clip(shape, 16, 4, rng)), folder / shape / f"{i:02d}.mp4")
    return folder


def make_run(folder: Path, data: Path, **model) -> Path:
    """Write a model with random weights as a run on the data."""
    torch.manual_seed(0)
    network = RIN(**TINY | model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = Config(
        model=network.config, data=DataConfig(path=str(data), classes=sorted(SHAPES)), sample=SampleConfig()
    )
    config.data.classes = sorted(SHAPES) if model.get("num_classes") else []
    config.sample.steps, config.sample.fps = 2, 8
    if model.get("known_mask"):
        config.diffusion.known = {"none": 1, "first": 1}
    save_model(folder, network, config)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), data, num_classes=3)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, data) -> Path:
    return make_run(tmp_path_factory.mktemp("predictor"), data, known_mask=True)


def scores_of(path: Path) -> dict:
    return json.loads(path.read_text())["scores"]


def test_a_folder_of_samples_has_the_scores_of_the_run_to_the_last_digit(run, data, tmp_path):
    assert main(["sample", str(run), "--num", "20", "--out", str(tmp_path / "samples")]) == 0
    for name, source in (("run", run), ("folder", tmp_path / "samples")):
        command = ["evaluate", str(source), "--data", str(data), "--num", "20", "--features", "means"]
        assert main([*command, "--json", str(tmp_path / f"{name}.json")]) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "folder"))
    assert one["scores"] == two["scores"]
    assert not differences(one["protocol"], two["protocol"])
    assert one["protocol"]["source"]["sample_pixels"] == two["protocol"]["source"]["sample_pixels"]
    assert one["protocol"]["samples"]["codec"] == "h264"


def test_an_interrupted_evaluation_draws_only_what_is_left(run, data, tmp_path, monkeypatch):
    evaluate = {"num": 12, "features": "means", "max_batch": 4, "out": tmp_path / "out"}
    whole = rin_video.evaluate(run, data, **evaluate | {"out": tmp_path / "whole"})
    drawn = []
    draw = drawing.draw_chunk

    def fail_later(diffusion, plan, chunk):
        drawn.append(chunk.rows.start)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(diffusion, plan, chunk)

    monkeypatch.setattr(drawing, "draw_chunk", fail_later)
    with pytest.raises(KeyboardInterrupt):
        rin_video.evaluate(run, data, **evaluate)
    resumed = rin_video.evaluate(run, data, **evaluate)
    assert drawn == [0, 4, 4, 8]
    assert resumed.scores == whole.scores
    assert not list((tmp_path / "out").glob("samples-*"))  # the samples are deleted when they have been scored


def test_samples_are_kept_on_request_and_belong_to_their_options(run, data, tmp_path):
    rin_video.evaluate(run, data, num=8, features="means", keep=tmp_path / "kept", out=tmp_path / "out")
    assert len(list((tmp_path / "kept").glob("*.mp4"))) == 8
    with pytest.raises(UsageError, match="drawn with seed=0, now it is 1: choose another folder"):
        rin_video.evaluate(run, data, num=8, features="means", keep=tmp_path / "kept", seed=1, out=tmp_path / "out")
    with pytest.raises(UsageError, match="has other files"):
        rin_video.evaluate(run, data, num=8, features="means", keep=data, out=tmp_path / "out")


def test_all_views_have_distances_with_floors_and_intervals(run, data, tmp_path):
    result = rin_video.evaluate(run, data, num=12, features="means", out=tmp_path)
    for view in ("clip", "frame", "motion"):
        for name in ("frechet_distance", "kernel_distance"):
            score = result.scores[f"{view}/{name}"]
            assert score.low <= score.value <= score.high
            assert score.floor is not None
            assert score.floor_n == 12
    assert {"clip/precision", "clip/recall", "clip/density", "clip/coverage", "inception_score"} <= result.scores.keys()
    assert any("may contain the data of training" in warning for warning in result.warnings)
    assert (tmp_path / "samples.png").is_file()


def test_real_clips_score_better_than_noise(data, tmp_path):
    rng = np.random.default_rng(1)
    real = torch.stack([torch.from_numpy(render_clip([*SHAPES][i % 3], 16, 4, rng)) for i in range(24)])
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    good, bad = (rin_video.evaluate(x, data, features="means") for x in (real, noise))
    for name in ("clip/frechet_distance", "clip/kernel_distance", "frame/frechet_distance", "frame/kernel_distance"):
        assert good.scores[name].high < bad.scores[name].low, name
    assert good.scores["clip/precision"].value > bad.scores["clip/precision"].value


def test_predictions_are_scored_against_copying(predictor, data, tmp_path):
    result = rin_video.evaluate(predictor, data, num=12, given=2, best_of=2, features="means", out=tmp_path)
    assert result.protocol["samples"] == {"num": 12, "codec": "none", "best_of": 2}
    assert result.protocol["data"]["num"] == 6  # two samples for each of six clips
    names = [name for name in result.scores if name.startswith("prediction/")]
    assert any("psnr" in name for name in names)
    assert any("recall" in name for name in names)
    assert any("copy" in name for name in names)
    assert (tmp_path / "predictions.png").is_file()


def test_images_are_scored_too(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for name in ("real", "samples"):
        save_samples(torch.rand(12, 3, 16, 16, generator=rng), tmp_path / name)
    result = rin_video.evaluate(tmp_path / "samples", tmp_path / "real", features="means")
    assert result.protocol["clips"]["frames"] == 0
    assert result.protocol["samples"]["codec"] == "png"
    assert result.scores["image/frechet_distance"].value >= 0


def test_labels_come_from_file_names_and_folders(run, data, tmp_path):
    assert main(["sample", str(run), "--num", "6", "--out", str(tmp_path / "samples")]) == 0
    classes = sorted(SHAPES)
    assert open_samples(tmp_path / "samples", None, None, classes).labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert open_samples(data, None, None, classes).labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_a_run_stands_for_its_data(run, data, tmp_path):
    assert main(["sample", str(run), "--num", "8", "--out", str(tmp_path / "samples")]) == 0
    by_run = rin_video.evaluate(tmp_path / "samples", run, features="means")
    by_data = rin_video.evaluate(tmp_path / "samples", data, features="means")
    assert by_run.scores == by_data.scores


def test_results_compare_only_with_the_same_protocol(run, data, tmp_path, capsys):
    for name, options in {"a": [], "b": ["--seed", "1"], "c": ["--num", "9"], "d": ["--codec", "none"]}.items():
        command = ["evaluate", str(run), "--num", "8", "--features", "means", "--json", str(tmp_path / f"{name}.json")]
        assert main([*command, *options]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "model.seed: 0 and 1" in out
    assert f"B: {tmp_path / 'b.json'}" in out
    assert re.search(r"clip/frechet_distance +[\d.e-]+ +[\d.e-]+ to [\d.e-]+ +[\d.e-]+", out)
    for other, key in (("c", "samples.num is 8 and 9"), ("d", "samples.codec is 'h264' and 'none'")):
        assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / f"{other}.json")]) == 2
        assert key in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "bad.json")]) == 2
    assert "bad.json is not a result of `rin-video evaluate`" in capsys.readouterr().err


def test_published_protocols_say_what_is_missing(run, data, tmp_path):
    result = rin_video.evaluate(run, data, num=8, features="means", protocol="ucf101", out=tmp_path)
    texts = [text for text in result.warnings if "not the protocol ucf101" in text]
    assert [text.split(": ")[1].split(" ")[0] for text in texts] == [
        "features.name", "samples.num", "data.num", "clips.frames",
    ]  # fmt: skip
    for name, wanted in PUBLISHED.items():
        exact = {
            "features": {"name": wanted.features},
            "samples": {"num": wanted.num},
            "data": {"num": wanted.num_real, "split": wanted.split},
            "clips": {"frames": wanted.frames, "given": wanted.given, "size": [wanted.size, wanted.size]},
        }
        assert missing(name, exact) == []


def test_kept_predictions_belong_to_their_real_clips(predictor, data, tmp_path):
    """Other real clips, or the same ones read in another way, need another folder."""
    options = {"num": 4, "given": 2, "features": "means", "keep": tmp_path / "kept", "out": tmp_path / "out"}
    rin_video.evaluate(predictor, data, **options)
    rin_video.evaluate(predictor, data, **options)
    for other in ({"num": 5}, {"overrides": ["data.validation=0.3"]}):
        with pytest.raises(UsageError, match="has samples that were drawn with"):
            rin_video.evaluate(predictor, data, **options | other)


def test_training_data_is_not_declared_held_out(run, data, tmp_path):
    """An override makes a part of the data of training the real data; the model has seen it all the same."""
    options = {"num": 6, "features": "means", "out": tmp_path}
    result = rin_video.evaluate(run, overrides=["data.validation=0.3"], **options)
    assert result.protocol["data"]["split"] == "validation (0.3)"
    assert any("may contain the data of training" in warning for warning in result.warnings)


def test_two_evaluations_do_not_share_a_folder(run, data, tmp_path):
    with lock_run(tmp_path / "kept"), pytest.raises(UsageError, match="another process is drawing samples in"):
        rin_video.evaluate(run, data, num=4, features="means", keep=tmp_path / "kept", out=tmp_path)


def test_a_result_that_cannot_be_written_is_refused_before_any_work(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "draw_chunk", None)
    (tmp_path / "file").write_text("")
    for name, message in (("file/x.json", "is a file, not a folder"), ("x.txt", "use one that ends in .json")):
        with pytest.raises(UsageError, match=message):
            rin_video.evaluate(run, data, num=4, features="means", out=tmp_path, json=tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "vp9"}, "--codec=vp9 is unknown: choose auto, h264, none"),
        ({"split": "dev"}, "--split=dev is unknown: choose auto, train, validation, all"),
        ({"device": "nowhere"}, "device nowhere cannot be used"),
        ({"num": 50}, "there are 4 samples, not 50"),
        ({"source": [1, 2]}, "the samples are list: pass a folder, a model, or a tensor"),
        ({"source": torch.rand(8, 3)}, "the samples are of shape (8, 3): pass"),
        (
            {"data": torch.rand(4, 3, 16, 16)},
            "the samples have shape (3, 4, 16, 16), but the real ones have (3, 16, 16)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_in_python_get_one_line(options, message, data):
    arguments = {"source": torch.rand(4, 3, 4, 16, 16), "data": data, "features": "means"} | options
    with pytest.raises(UsageError, match=re.escape(message)):
        rin_video.evaluate(**arguments)


def test_the_model_in_memory_is_scored(run, data):
    diffusion = GaussianDiffusion.from_pretrained(run)
    result = rin_video.evaluate(diffusion, data, num=8, features="means", overrides=["sample.steps=2"])
    assert result.protocol["samples"]["num"] == 8


def test_the_report_and_the_card_show_the_scores(run, data, tmp_path):
    from rin_video.reports.card import model_card
    from rin_video.reports.results import results_of

    assert main(["evaluate", str(run), "--num", "8", "--features", "means"]) == 0
    (found,) = results_of(run)
    card = model_card(run, "user/name")
    assert "## Scores" in card
    assert "| clip/frechet\\_distance | " in card
    assert f"{found['scores']['clip/frechet_distance']['value']:.4g}" in card
    assert "8 samples of 4x16x16 (h264) against" in card


def break_file(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_video(torch.zeros(3, 4, 32, 32, dtype=torch.uint8), p / "z.mp4"), "4x32x32, but the samples"),
        (lambda p: write_video(torch.zeros(3, 6, 16, 16, dtype=torch.uint8), p / "z.mp4"), "6x16x16, but the samples"),
        (lambda p: break_file(p / "01.mp4"), "01.mp4"),
    ],
    ids=["another size", "another length", "a broken file"],
)
def test_samples_that_differ_are_named(make, message, data, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(4):
        write_video(torch.randint(0, 256, (3, 4, 16, 16), dtype=torch.uint8), folder / f"{i:02d}.mp4")
    make(folder)
    with pytest.raises(UsageError, match=re.escape(message)):
        rin_video.evaluate(folder, data, features="means")


def test_a_folder_of_one_file_repeated_is_refused_or_noted(data, tmp_path):
    clip = torch.randint(0, 256, (3, 4, 16, 16), dtype=torch.uint8)
    samples = clip.expand(12, -1, -1, -1, -1).clone()
    with pytest.raises(UsageError, match="equal features: is it one file repeated"):
        rin_video.evaluate(samples, data, features="means")
    samples[:6] = torch.randint(0, 256, (6, 3, 4, 16, 16), dtype=torch.uint8)
    result = rin_video.evaluate(samples, data, features="means")
    assert "5 of 12 samples are copies of another one, pixel by pixel" in result.warnings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "1"], "--num is 1: it must be at least 2"),
        (["--given", "2", "--best-of", "0"], "--best-of is 0: it must be at least 1"),
        (["--given", "4"], "--given is 4, but the clips have 4 frames: use 1 to 3"),
        (["--given", "2"], "was trained without an observed mask"),
        (["--best-of", "3"], "--best-of 3 is for predictions: add --given N"),
        (["--given", "2", "--best-of", "3"], "--num is 4, which is no multiple of --best-of 3: use 3"),
        (["--features", "nothing"], "unknown feature extractor 'nothing'"),
        (["--protocol", "mine"], "--protocol mine is unknown: choose fid50k"),
        (["--split", "validation"], "has no held-out part"),
        (["--data", "nowhere"], "nowhere"),
        (["train.train_lr=1"], "cannot change a trained model"),
        (["--json", "result.txt"], "use one that ends in .json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(options, message, run, capsys):
    assert main(["evaluate", str(run), "--num", "4", "--features", "means", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rin-video: error: ")
    assert message in error


def test_features_that_are_not_finite_are_refused(data, monkeypatch):
    monkeypatch.setattr(Means, "extract", lambda self, x: {"clip": torch.full((len(x), 3), float("nan"))})
    with pytest.raises(UsageError, match=r"clip features of .* are not finite"):
        rin_video.evaluate(torch.zeros(4, 3, 4, 16, 16, dtype=torch.uint8), data, features="means")
