"""The command line: help without torch, one-line errors, and the complete workflow on tiny generated files."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from rin_video import cli
from rin_video.cli import options
from rin_video.cli.parser import make_parser, read_options, split_overrides
from rin_video.config_files import load_config, presets, to_yaml
from rin_video.media import write_video

TINY = [
    "model.dim=32",
    "model.dim_latent=32",
    "model.num_latents=8",
    "model.depth=1",
    "model.num_heads=2",
    "model.latent_num_heads=2",
    "model.latent_self_attn_depth=1",
    "sample.steps=2",
    "sample.num_samples=2",
    "data.num_workers=0",
    "train.log_every=1",
    "train.warmup_steps=0",
]
COMMANDS = [name for name in make_parser().commands if name != "peek"]  # an alias of preview


@pytest.fixture
def fails(capfd):
    """A function that runs a command that must fail, and returns its one line on stderr."""

    def run(*argv) -> str:
        capfd.readouterr()
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        assert code == 2
        assert not out
        (line,) = err.splitlines()
        assert re.match("rin-video( [a-z]+)?: error: ", line)
        return line

    return run


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three small MP4s of 6 frames."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(3):
        write_video(torch.rand(3, 6, 24, 32, generator=torch.Generator().manual_seed(i)), folder / f"{i}.mp4")
    return folder


@pytest.fixture(scope="module")
def train_clips(clips, tmp_path_factory):
    """The command that trained 3 steps on the clips, to be repeated, and the folder of the run."""
    out = tmp_path_factory.mktemp("runs") / "clips"
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--batch-size", "2", "--out", str(out)]
    assert cli.main([*command, "--steps", "3", *TINY]) == 0
    return command, out


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def decode(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    ("steps", "lr", "said"),
    [
        (
            ["--steps", "4"],
            [0.5, 1],
            "warm-up: 2 steps, half of the training, instead of 1000 (train.warmup_steps=1000",
        ),
        (["train.train_num_steps=4"], [0.5, 1], "warm-up: 2 steps, half of the training, instead of 1000"),
        (["--steps", "4", "train.warmup_steps=4"], [0.25, 0.5], ""),
    ],
)
def test_a_default_warm_up_is_shortened_and_logged_but_an_explicit_one_is_kept(
    clips, tmp_path, caplog, steps, lr, said
):
    caplog.set_level(logging.INFO)
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--batch-size", "2"]
    assert cli.main([*command, "--out", str(tmp_path), *TINY[:-1], *steps]) == 0
    peak = load_config("video64").train.train_lr
    assert [line["lr"] for line in metrics(tmp_path)][:2] == pytest.approx([peak * share for share in lr])
    assert said in caplog.text
    assert bool(said) == ("warm-up" in caplog.text)


# ---- help


def test_help_imports_no_torch(tmp_path):
    code = """
import sys
from rin_video import cli
for command in ([], ["train"], ["sample"], ["diagnose"], ["export"], ["info"], ["demo"]):
    try:
        cli.main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command
heavy = {"torch", "numpy", "timm", "accelerate", "omegaconf", "av", "PIL"}
print("imported:", *heavy & {name.split(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"
    assert done.stdout.count("usage: rin-video") == 7
    assert not done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: rin-video {command}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("rin-video 0.")


# ---- parsing


def test_overrides_may_appear_anywhere_except_as_the_value_of_an_option():
    parser = make_parser()
    for argv in (
        ["a.b=1", "train", "--data", "x", "c.d=[1,2]"],
        ["train", "a.b=1", "--data", "x", "c.d=[1,2]"],
        ["train", "--data", "x", "a.b=1", "c.d=[1,2]"],
        ["train", "--data=x", "a.b=1", "--strict", "c.d=[1,2]"],
        ["train", "--da", "x", "a.b=1", "c.d=[1,2]"],
    ):
        arguments, overrides = split_overrides(parser, argv)
        assert overrides == ["a.b=1", "c.d=[1,2]"]
        assert parser.parse_args(arguments).data == "x"
    arguments, overrides = split_overrides(parser, ["train", "--data", "a.b=1", "--out", "c.d=2"])
    assert overrides == []
    options = parser.parse_args(arguments)
    assert (options.data, options.out) == ("a.b=1", "c.d=2")
    assert split_overrides(parser, ["sample", "./a=b", "x.y=1"]) == (["sample", "./a=b"], ["x.y=1"])


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["train", "--data", "x", "--steps", "10", "train.seed=1"], ["train.seed=1", "train.train_num_steps=10"]),
        (["train", "--data", "x", "--strict", "--init-from", "y"], ["data.strict=True", "train.init_from=y"]),
        (["sample", "x", "--class", "all", "--guidance", "2"], ["sample.label=null", "sample.guidance=2.0"]),
        (["sample", "x", "--spacing", "null", "--num", "3"], ["sample.num_samples=3", "sample.spacing=null"]),
        (["prepare", "x", "--size", "8", "--out", "y", "--fps", "5"], ["data.fps=5.0"]),
    ],
)
def test_flags_are_overrides(argv, overrides):
    assert read_options(argv).overrides == overrides


def test_a_configuration_is_loaded_once(clips, tmp_path, monkeypatch):
    loaded = []
    load = options.load_config
    monkeypatch.setattr(options, "load_config", lambda *given: loaded.append(given) or load(*given))
    command = ["train", "--data", str(clips), "--size", "16", "--frames", "4", "--batch-size", "2", "--steps", "1"]
    assert cli.main([*command, "--out", str(tmp_path), *TINY]) == 0
    ((preset, overrides),) = loaded
    assert preset == "video64"
    assert {"train.train_num_steps=1", "train.train_batch_size=2", "model.frames=4"} <= set(overrides)


@pytest.mark.parametrize(("text", "size"), [("64", 64), ("48x64", [48, 64])])
def test_size(text, size):
    from rin_video.cli.options import parse_size

    assert parse_size(text) == size


# ---- mistakes


def test_no_command_and_unknown_options(fails):
    for argv, words in (
        ((), "the command is missing: use one of train, index, preview"),
        (("tarin", "--data", "x"), "unknown command tarin: did you mean train?"),
        (("zzz",), "unknown command zzz: choose train, index"),
        (("train", "--stps", "3"), "unknown option --stps: did you mean --steps?"),
        (("train", "--dta", "x"), "unknown option --dta: did you mean --data?"),
        (("train", "--zzz"), "unknown option --zzz: see rin-video train --help"),
        (("--data", "x", "train"), "unknown option --data: options follow the command"),
        (("train", "--i", "x"), "option --i is ambiguous: use --images or --image-column or --init-from"),
        (("train", "depth=1"), "depth=1: did you mean model.depth=1?"),
        (("train", "lr=1e-4"), "lr=1e-4: did you mean train.train_lr=1e-4?"),
        (("info", "zzzzz=1"), "zzzzz=1: write section.key=value"),
        (("train", "clips"), "clips is not an option: did you mean --data clips?"),
        (("sample", "--caption", "a", "b=1"), "the following arguments are required: DIR"),
        (("train",), "the following arguments are required: --data"),
        (("train", "--data", "x", "--frames", "many"), "argument --frames: invalid int value: 'many'"),
        (("report", "a", "b"), "unrecognized arguments: b"),
    ):
        line = fails(*argv)
        assert words in line, line


def test_mistakes_before_any_file_is_read(fails, clips, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    train = ("train", "--data", clips, "--frames", 4)
    for argv, words in (
        (("info", "--config", "cifar11"), "there is no preset and no file cifar11"),
        ((*train, "--config", "cifar11"), "there is no preset and no file cifar11"),
        ((*train, "model.dimm=3"), "unknown key model.dimm: did you mean model.dim?"),
        ((*train, "model.dim=wide"), "model.dim"),
        ((*train, "--size", "abc"), "--size abc is not a size"),
        ((*train, "--size", "16x"), "--size 16x is not a size"),
        (
            (*train, "--size", "18"),
            "height 18 is not a multiple of its patch size 4: the nearest sizes that fit are 16",
        ),
        ((*train, "--size", "16", "--batch-size", "0"), "train.train_batch_size is 0"),
        ((*train, "--size", "16", "--steps", "0"), "train.train_num_steps is 0"),
        (("train", "--data", clips, "--frames", "-1"), "--frames is -1"),
        (("train", "--data", clips, "--frames", "3"), "frames 3 is not a multiple of its patch size 2"),
        (("train", "--data", tmp_path / "nowhere"), "there is no file or folder"),
        (("train", "--data", tmp_path / "nowhere", "--frames", "4"), "there is no file or folder"),
        (("train", "--data", empty), "contains no"),
        (("train", "--data", empty, "--frames", "4"), "contains no"),
        (("train", "--data", clips, "--frames", "0", "--size", "16"), "it contains 3 clips: use --frames 16"),
        ((*train[:-1], 8, "--size", "16", *TINY), "6 frames, but 8 "),
        (("sample", empty), "has no config.yaml"),
        (("sample", tmp_path / "nowhere"), "there is no folder"),
        (("info", empty), "has no config.yaml"),
        (("info", empty, "--config", "demo"), "not both"),
        (("export", tmp_path / "nowhere.gif", tmp_path / "x.mp4"), "there is no file or folder"),
        (("export", clips / "0.mp4", tmp_path / "x.doc"), "x.doc"),
        (
            ("export", clips / "0.mp4", tmp_path / "x.gif", "model.dim=3"),
            "export takes no key=value argument: model.dim=3",
        ),
    ):
        line = fails(*argv)
        assert words in line, line
    assert not list(empty.iterdir())
    assert not (tmp_path / "nowhere").exists()


def test_mistakes_with_a_run(fails, train_clips):
    command, run = train_clips
    for argv, words in (
        (("sample", run, "--num", "0"), "sample.num_samples is 0"),
        (("sample", run, "--sampler", "rk4"), "rk4"),
        (("sample", run, "--sampler", "ddim", "sample.sampler.eta=2"), "sampler.eta is 2"),
        (("sample", run, "--sampler", "heun", "sample.sampler.churn=-5"), "sampler.churn is -5"),
        (("sample", run, "--sampler", "ddim", "sample.sampler.eta=.nan"), "sampler.eta is nan"),
        (("sample", run, "--schedule", "cosine", "sample.schedule.start=2"), "does not decrease from signal"),
        (("sample", run, "sample.schedule.tau=0"), "does not decrease from signal to noise"),
        (("sample", run, "--schedule", "rectified_flow"), "on another path than sigmoid"),
        (("sample", run, "sample.guidance_interval=[0.9,0.1]"), "sample.guidance_interval is [0.9, 0.1]"),
        (("sample", run, "--guidance", "nan"), "sample.guidance is nan"),
        (("sample", run, "--fps", "inf"), "fps is inf"),
        (("sample", run, "--out", run / "config.yaml" / "x.png"), "config.yaml is a file"),
        (("sample", run / "config.yaml"), "config.yaml is a file: pass the folder of a run"),
        (("sample", run, "--steps", "0"), "steps"),
        (("sample", run, "--guidance", "2", "--steps", "1", "--num", "1"), "guidance is 2"),
        (("sample", run, "sample.stps=3"), "unknown key sample.stps: did you mean sample.steps?"),
        (("sample", run, "model.dim=64"), "model.dim=64 cannot change a trained model"),
        (("sample", run, "--class", "cat"), "class cat was requested, but the model has no classes"),
        (("sample", run, "--spacing", "log"), "sample.spacing=log is unknown: choose uniform"),
        (("sample", run, "--schedule", "square"), "square"),
        (("sample", run, "sample.sampler.eta=0.5", "--sampler", "ddpm"), "eta"),
        (("sample", run, "--max-batch", "0"), "--max-batch is 0"),
        (("sample", run, "--seed", "-1"), "--seed is -1"),
        (("diagnose", run, "--num", "1"), "--num is 1"),
        (("diagnose", run, "model.dim=64"), "model.dim=64 cannot change a trained model"),
        (("diagnose", run, "--data", run / "nowhere"), "there is no file or folder"),
        ((*command, "--steps", "4", *TINY, "model.dim=64"), "was trained with model.dim=32, now it is 64"),
    ):
        line = fails(*argv)
        assert words in line, line


# ---- the whole way


def test_training_writes_a_run(train_clips):
    _, run = train_clips
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    config = load_config(run / "config.yaml")
    assert (config.model.frames, config.model.image_size, config.train.train_batch_size) == (4, 16, 2)
    assert decode(run / "samples" / "step-00000003.mp4").shape[0] == 4
    assert (run / "model.safetensors").is_file()


def test_samples_come_as_any_kind_of_file(train_clips, tmp_path):
    _, run = train_clips
    common = ["sample", str(run), "--num", "2", "--steps", "2", "--out"]
    assert cli.main([*common, str(tmp_path / "x.mp4")]) == 0
    video = decode(tmp_path / "x.mp4")
    assert video.shape[0] == 4
    assert video.shape[1] >= 16  # a grid of two clips with a margin; both sizes are even
    assert video.shape[2] >= 32
    assert cli.main([*common, str(tmp_path / "x.gif"), "--fps", "5"]) == 0
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 4
        assert image.info["duration"] == 200
    assert cli.main([*common, str(tmp_path / "x.npy")]) == 0
    array = np.load(tmp_path / "x.npy")
    assert array.shape == (2, 3, 4, 16, 16)
    assert array.std() > 0
    assert 0 <= array.min() <= array.max() <= 1
    assert cli.main([*common, str(tmp_path / "folder")]) == 0
    files = sorted((tmp_path / "folder").iterdir())
    assert [decode(file).shape for file in files] == [(4, 16, 16, 3)] * 2


def test_without_out_samples_go_into_the_run(train_clips):
    _, run = train_clips
    assert cli.main(["sample", str(run), "--num", "1", "--steps", "1"]) == 0
    assert decode(run / "samples.mp4").shape == (4, 16, 16, 3)


def test_the_same_seed_gives_the_same_bytes(train_clips, tmp_path):
    _, run = train_clips

    def draw(name, *options):
        out = tmp_path / f"{name}.npy"
        assert cli.main(["sample", str(run), "--num", "2", "--steps", "2", "--out", str(out), *options]) == 0
        return out

    one, same, other = draw("one", "--seed", "1"), draw("same", "--seed", "1"), draw("other", "--seed", "2")
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    each = draw("each", "--seed", "1", "--max-batch", "1")
    np.testing.assert_allclose(np.load(each), np.load(one), rtol=0, atol=1e-5)


def test_another_sampler_than_the_run_s_takes_neither_its_parameters_nor_its_spacing(train_clips, tmp_path):
    _, run = train_clips
    older = shutil.copytree(run, tmp_path / "older")
    config = load_config(older / "config.yaml")
    config.sample.sampler, config.sample.spacing = {"name": "ddim", "eta": 0.5}, "uniform"
    (older / "config.yaml").write_text(to_yaml(config))

    def draw(folder, *options):
        out = tmp_path / "x.npy"
        assert cli.main(["sample", str(folder), "--num", "1", "--steps", "4", "--out", str(out), *options]) == 0
        return np.load(out)

    assert np.array_equal(draw(older, "--sampler", "ddpm"), draw(run, "--sampler", "ddpm"))
    heun = draw(run, "--sampler", "heun")
    assert np.array_equal(draw(older, "--sampler", "heun", "--spacing", "null"), heun)
    assert not np.array_equal(draw(older, "--sampler", "heun"), heun)


def test_diagnose_writes_pictures_and_words(train_clips, capsys):
    _, run = train_clips
    assert cli.main(["diagnose", str(run), "--num", "3"]) == 0
    said = capsys.readouterr().out
    assert "untrained noise levels: at t = " in said  # three steps are not enough to learn anything
    report = json.loads((run / "diagnosis" / "diagnosis.json").read_text())
    assert len(report["t"]) == len(report["loss"]) == len(report["loss_raw"]) == 10
    assert len(report["clipped"]) == 2  # sampling steps
    assert len(report["latent_std"]) == 8
    assert all(f"- {finding}" in said for finding in report["findings"])
    with Image.open(run / "diagnosis" / "trajectory.png") as image:
        assert image.height > image.width  # a row per sample (4) and a column per step (2)
    with Image.open(run / "diagnosis" / "loss.png") as image:
        assert image.width >= 500
    with Image.open(run / "metrics.png") as image:
        assert image.width >= 1500


def test_the_same_command_resumes(train_clips, caplog):
    command, run = train_clips
    with caplog.at_level(logging.INFO, logger="rin_video"):
        assert cli.main([*command, "--steps", "5", *TINY]) == 0
    assert "resuming from step 3" in caplog.text
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000003", "step-00000005"}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="rin_video"):
        assert cli.main([*command, "--steps", "5", *TINY]) == 0
    assert "already trained to step 5" in caplog.text
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]


def test_images_in_folders_of_classes(fails, tmp_path):
    generator = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(20, 24, 3), dtype=np.uint8)).save(path)
    run = tmp_path / "run"
    argv = ["train", "--data", str(tmp_path / "pictures"), "--size", "8x16", "--steps", "2", "--batch-size", "2"]
    assert cli.main([*argv, "--out", str(run), *TINY]) == 0  # the kind follows from the folder, without --frames
    config = load_config(run / "config.yaml")
    assert (config.model.frames, config.model.num_classes, config.model.image_size) == (None, 2, [8, 16])
    common = ["sample", str(run), "--num", "4", "--steps", "2", "--guidance", "1", "--out"]
    assert cli.main([*common, str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.width >= 32
        assert image.height >= 16
    assert cli.main([*common, str(tmp_path / "folder")]) == 0
    assert [Image.open(file).size for file in sorted((tmp_path / "folder").iterdir())] == [(16, 8)] * 4
    assert cli.main(["sample", str(run), "--num", "1", "--steps", "1"]) == 0
    assert (run / "samples.png").is_file()

    def of_class(label):
        assert cli.main([*common[:-3], "--out", str(tmp_path / "x.npy"), "--class", label]) == 0
        return np.load(tmp_path / "x.npy")

    np.testing.assert_array_equal(of_class("dog"), of_class("1"))
    np.testing.assert_array_equal(of_class("all")[1::2], of_class("dog")[1::2])
    np.testing.assert_array_equal(of_class("all")[::2], of_class("cat")[::2])
    assert not np.array_equal(of_class("cat"), of_class("dog"))
    assert "it has 0 to 1 (cat, dog)" in fails("sample", run, "--class", "2")


def test_export_turns_clips_and_arrays_into_each_other(clips, tmp_path):
    assert cli.main(["export", str(clips / "0.mp4"), str(tmp_path / "x.gif")]) == 0
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 6
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((3, 5, 16, 24), dtype=np.float32))
    assert cli.main(["export", str(tmp_path / "x.npy"), str(tmp_path / "x.mp4"), "--fps", "4"]) == 0
    assert decode(tmp_path / "x.mp4").shape == (5, 16, 24, 3)


# ---- what put new users off


def test_samples_do_not_overwrite_those_before(train_clips, caplog):
    _, run = train_clips
    caplog.set_level(logging.INFO)
    before = {path: path.read_bytes() for path in run.glob("samples*.mp4")}
    for _ in range(2):
        assert cli.main(["sample", str(run), "--num", "1", "--steps", "1"]) == 0
    names = {path.name for path in run.glob("samples*.mp4")}
    assert names >= {"samples.mp4", "samples-1.mp4"}
    assert len(names) == len(before) + 2
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "1 sample in" in caplog.text
    assert re.search(r"samples-\d+\.mp4$", caplog.messages[-1])


def test_preview_of_short_clips_shows_what_there_is(clips, capfd, fails, tmp_path):
    assert cli.main(["preview", str(clips), "--size", "16", "--frames", "8"]) == 0
    said = capfd.readouterr().out
    assert "no clip has 8 frames at this stride or rate, so 6 are shown (--frames)" in said
    assert "3 samples of 3x6x16x16" in said
    line = fails("train", "--data", clips, "--size", "16", "--frames", "8", "--out", tmp_path)
    assert "none of 3 clips is long enough: clip" in line
    assert line.count("are needed") == 1
    assert line.endswith("use --frames 6")


def test_peek_is_another_name_of_preview(clips, caplog):
    caplog.set_level(logging.INFO)
    assert cli.main(["peek", str(clips), "--size", "16", "--frames", "4"]) == 0
    assert "peek was renamed to preview" in caplog.text


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((5, 1, 28, 28), "5 samples of 1x28x28"),
        ((5, 3, 16, 24), "5 samples of 3x16x24"),
        ((3, 6, 16, 16), "1 sample of 3x6x16x16"),
        ((5, 3, 4, 16, 16), "5 samples of 3x4x16x16"),
        ((3, 16, 16), "1 sample of 3x16x16"),
    ],
)
def test_arrays_say_what_they_are(tmp_path, capsys, shape, said):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    assert cli.main(["preview", str(tmp_path / "x.npy")]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((5, 28, 28), (), "add an axis of channels, x[:, None]"),
        ((5, 28, 28, 1), (), "move the channels first, np.moveaxis(x, -1, 1)"),
        ((5, 1, 28, 28), ("--config", "image64"), "train on it with model.channels=1 --frames 0 --size 28x28"),
    ],
)
def test_arrays_of_another_form_come_with_the_remedy(tmp_path, fails, shape, options, said):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    assert said in fails("preview", tmp_path / "x.npy", *options)


def test_diagnose_on_other_data_names_options_that_it_has(train_clips, fails, tmp_path):
    _, run = train_clips
    write_video(torch.rand(3, 2, 24, 32), tmp_path / "short.mp4")
    line = fails("diagnose", run, "--data", tmp_path)
    assert "has 2 frames, but 4 are needed for 4 at stride 1: use longer clips (--data FOLDER)" in line


def test_a_long_run_on_a_cpu_is_hinted_at_once(caplog, monkeypatch):
    from rin_video.cli.slow_run import SlowRunHint

    clock = iter(range(0, 100_000, 7))
    monkeypatch.setattr("rin_video.cli.slow_run.time.monotonic", lambda: next(clock))
    run = SimpleNamespace(config=load_config(None), accelerator=SimpleNamespace(device=torch.device("cpu")), step=0)

    def train(num_steps, **options):
        run.config.train.train_num_steps = num_steps
        hint = SlowRunHint(**options)
        for run.step in range(1, 9):
            hint.on_step(run, torch.zeros(()))
        return caplog.messages

    assert train(3000) == []  # within hours
    (said,) = train(100_000)
    assert said == (
        "the remaining 99997 steps will take about 8 days on this CPU, 7 s each: use --time 2h in a new folder "
        "(--out), which chooses a model that is good in this time, a GPU, a small model (--config demo), or fewer "
        "steps (--steps 1032 takes 2 hours)"
    )
    run.accelerator.device = torch.device("cuda")
    caplog.clear()
    assert train(80_000) == []  # within a week
    (said,) = train(100_000)
    assert said.startswith("the remaining 99994 steps will take about 8 days on this device, 7 s each: use --time 2h")
    caplog.clear()
    assert train(100_000, steps_given=True) == []  # as the user wants
    run.config.train.time = "2h"
    run.accelerator.device = torch.device("cpu")
    assert train(100_000) == []


def test_a_run_of_one_step_has_a_learning_rate_and_no_warning(clips, tmp_path, caplog):
    command = ["train", "--data", str(clips), "--frames", "4", "--size", "16", "--batch-size", "2", "--steps", "1"]
    assert cli.main([*command, "--out", str(tmp_path), *TINY]) == 0
    assert metrics(tmp_path)[0]["lr"] > 0
    assert "scheduler" not in caplog.text


def test_an_unknown_tokenizer_names_the_entry_point(fails):
    line = fails("info", "--config", "demo", "model.tokenizer=mine")
    assert "unknown tokenizer 'mine': use one of image, sequence, tube" in line
    assert "entry point of the group rin_video.tokenizers" in line


# ---- info


def test_info_lists_the_presets(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == presets()
    assert cli.main(["info", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == presets()
    assert all(set(row) == {"params", "tokens", "latents", "gflops"} for row in rows.values())


def test_info_of_a_run_and_of_a_preset(train_clips, capsys):
    _, run = train_clips
    for source in ([str(run)], ["--config", "cifar10"], ["--config", str(run / "config.yaml")]):
        capsys.readouterr()
        assert cli.main(["info", *source, "--json"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert set(row) == {"params", "tokens", "latents", "gflops"}
        assert (row["tokens"], row["latents"]) == ((256, 128) if "cifar10" in source else (32, 8))
    assert cli.main(["model.depth=1", "info", "--config", "cifar10", "model.num_latents=64", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["latents"] == 64
    assert row["params"] < 30951180 / 2
    assert cli.main(["info", str(run), "--memory"]) == 0
    assert "MB at batch size 2" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line(fails, clips, train_clips, tmp_path):
    (tmp_path / "file").write_text("")
    command = ["train", "--data", clips, "--frames", "4", "--size", "16", "--batch-size", "2", "--steps", "1", *TINY]
    assert "file" in fails(*command, "--out", tmp_path / "file" / "run")
    assert "cannot be read or written: is a directory" in fails("report", train_clips[1], "--out", tmp_path)


def test_an_input_is_not_overwritten(train_clips, tmp_path, fails):
    _, run = train_clips
    clip = tmp_path / "a.png"
    clip.write_bytes((Path(__file__).parents[1] / "docs/demo.png").read_bytes())
    before = clip.read_bytes()
    assert "is an input too" in fails("sample", run, "--num", 1, "--image", clip, "--out", clip)
    assert clip.read_bytes() == before
    assert "is an image: use --image" in fails("sample", run, "--context", clip)
    assert "did you mean train.train_lr=" in fails("train", "--data", "x", "--lr", "1")
