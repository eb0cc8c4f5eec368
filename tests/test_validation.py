"""The validation loss while training: its values, exact resume, the alarm, and the best weights."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import STD, Gaussian
from PIL import Image
from random_files import clips, pictures
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import Dataset

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError, cli
from rin_video.config import Config, DataConfig, TrainConfig
from rin_video.datasets.adapters import adapt
from rin_video.datasets.batch import Batch
from rin_video.datasets.epochs import name_of
from rin_video.datasets.held_out import split_by_share, spread
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.mixed import MixedDataset
from rin_video.datasets.open import open_dataset
from rin_video.diffusion.fixed_levels import fix_batch, fixed_times, losses_at_levels
from rin_video.reports.diagnose import diagnose
from rin_video.reports.page import write_report
from rin_video.training.callbacks import Callback
from rin_video.training.metrics import describe_line, read_lines, read_validation
from rin_video.training.plots import plot_metrics
from rin_video.training.tracking import Tracking
from rin_video.training.validation import FixedSamples, Validator, find_overfitting

TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2,
        "image_size": 8, "patch_size": 4}  # fmt: skip


class Noise(Dataset):
    def __init__(self, seed=3, count=13):
        self.x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def trainer(folder, steps, data=None, validation=None, model=None, callbacks=(), sampled=False, **options):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**TINY | (model or {})), timesteps=3)
    defaults = {"train_num_steps": steps, "train_batch_size": 4, "train_lr": 1e-2, "save_and_sample_every": 4,
                "log_every": 1, "ema_sigma_rel": [], "ema_decay": 0.5}  # fmt: skip
    config = Config(diffusion.model.config, diffusion.config, train=TrainConfig(**defaults | options))
    config.data.num_workers = 0
    config.sample.num_samples, config.sample.steps = 2, 2
    data = Noise() if data is None else data
    where = {"results_folder": folder, "config": config, "progress": False, "callbacks": callbacks}
    run = Trainer(diffusion, data, validation=validation, **where)
    if not sampled:
        run.sample = lambda: None
    return run


def losses(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_lines(folder / "metrics.jsonl")]


def measured(folder):
    return read_validation(folder / "metrics.jsonl")


# ---- the measurement


def test_the_loss_of_an_exact_denoiser_is_that_of_the_closed_form():
    """The least squared error of v for N(0, STD^2) is STD^2 / (gamma STD^2 + 1 - gamma), at each of the levels."""
    diffusion = GaussianDiffusion(Gaussian(), objective="v")
    x = (STD * torch.randn(64, 1, 256, generator=torch.Generator().manual_seed(0)) + 1) / 2
    found = losses_at_levels(diffusion, fix_batch(Batch(x), range(64), diffusion), 8)
    assert (found.shape, found.dtype) == ((64, 8), torch.float64)
    for t, loss in zip(fixed_times(8), found.mean(0), strict=True):
        gamma = diffusion.schedule(torch.tensor([t])).gamma.item()
        assert loss.item() == pytest.approx(STD**2 / (gamma * STD**2 + 1 - gamma), rel=0.05)
    assert fixed_times(8) == [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]


def test_it_is_the_measurement_of_diagnose():
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**TINY)).eval()
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    data = Noise(count=5)
    own = losses_at_levels(diffusion, fix_batch(Batch(data.x), range(5), diffusion), 10).mean(0)
    assert_close(own, torch.tensor(diagnose(diffusion, data).loss, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_a_sample_does_not_depend_on_its_batch():
    """Noise and observed masks belong to the number of the sample."""
    torch.manual_seed(0)
    model = RIN(**TINY | {"frames": 4, "patch_size": (2, 4, 4), "known_mask": True, "num_classes": 2})
    diffusion = GaussianDiffusion(model, known={"none": 1, "first": 1, "boxes": 1}, label_dropout=0.5).eval()
    x = torch.rand(6, 3, 4, 8, 8)
    label = torch.tensor([0, 1, -1, 1, 0, 0])
    whole = losses_at_levels(diffusion, fix_batch(Batch(x, label), range(6), diffusion), 3)
    parts = [
        losses_at_levels(diffusion, fix_batch(Batch(x[i : i + 1], label[i : i + 1]), [i], diffusion), 3)
        for i in range(6)
    ]
    assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(losses_at_levels(diffusion, fix_batch(Batch(x, label), range(1, 7), diffusion), 3), whole)


def test_samples_are_spread_over_the_files(tmp_path):
    """Each file gets as many of the samples, as far as possible; later epochs have other windows of few clips."""
    clips(tmp_path, *(f"{i}.mp4" for i in range(3)), frames=12)
    data = open_dataset(tmp_path, (3, 4, 8, 8), DataConfig(windows=2))
    for num, expected in ((2, [0, 1]), (3, [0, 1, 2]), (5, [0, 0, 1, 1, 2]), (12, [0] * 4 + [1] * 4 + [2] * 4)):
        places = spread(data, num)
        assert sorted(data.group_of(index) for index, _ in places) == expected
        assert len(set(places)) == num
    assert spread(open_dataset(tmp_path, (3, 4, 8, 8), DataConfig()), 5) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    pictures(tmp_path / "images", *(f"{i}.png" for i in range(4)))
    images = open_dataset(tmp_path / "images", (3, 8, 8), DataConfig())
    assert spread(images, 64) == [(i, 0) for i in range(4)]
    assert [index for index, _ in spread(images, 2)] == [0, 2]
    both = open_dataset(tmp_path, (3, 4, 8, 8), DataConfig(images=str(tmp_path / "images"), image_ratio=0.25))
    assert [both.place_of(index)[0] for index, _ in spread(both, 8)] == [0] * 6 + [1] * 2


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_samples_have_no_augmentation(tmp_path, kind):
    strong = {"crop": "random", "crop_scale": [0.5, 0.5], "augment_horizontal_flip": True, "augment_color": 1.0}
    if kind == "image":
        root, shape = pictures(tmp_path, *(f"{i}.png" for i in range(4))), (3, 8, 8)
    else:
        root, shape = clips(tmp_path, *(f"{i}.mp4" for i in range(4)), frames=4), (3, 4, 8, 8)
        strong |= {"augment_reverse": True, "augment_speed": [0.5, 0.5]}
    plain, changed = (open_dataset(root, shape, DataConfig(**options)) for options in ({}, strong))
    samples = FixedSamples(changed, 4, rank=0, num_ranks=1)
    for index, epoch in samples.places:
        assert torch.equal(samples.dataset.draw(index, epoch)["x"], plain.draw(index, epoch)["x"])
        assert not torch.equal(changed.draw(index, epoch)["x"], plain.draw(index, epoch)["x"])


def test_a_sample_that_cannot_be_read_is_replaced(caplog):
    class Broken(Noise):
        def __getitem__(self, index):
            if index in (1, 2):
                raise ValueError("damaged")
            return {"x": self.x[index]}

    samples = FixedSamples(adapt(Broken(count=4)), 4, rank=0, num_ranks=1)
    found = [samples._read(*place)["x"] for place in samples.places]
    assert torch.equal(torch.stack(found), Noise(count=4).x[[0, 3, 3, 3]])
    assert "sample 1 cannot be measured: damaged" in caplog.text
    assert "sample 3 is measured instead" in caplog.text


# ---- in training


def test_training_is_the_same_with_and_without(tmp_path):
    """The losses, the gradients and the weights are equal to the last bit."""
    trainer(tmp_path / "without", 6, model={"dropout": 0.1}).train()
    trainer(tmp_path / "with", 6, model={"dropout": 0.1}, validation=Noise(9), validate_every=1, keep_best=True).train()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert [line["step"] for line in measured(tmp_path / "with")] == [1, 2, 3, 4, 5, 6]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_lines_and_their_values(tmp_path):
    """The last line is that of the saved EMA weights; the training samples get the same noise."""
    heard = []

    class Listener(Callback):
        def on_validation(self, trainer, line):
            heard.append(line)

    run = trainer(tmp_path, 6, validation=Noise(9, count=7), callbacks=[Listener()])
    run.train()
    found = measured(tmp_path)
    assert heard == found
    assert [line["step"] for line in found] == [4, 6]
    diffusion = GaussianDiffusion.from_pretrained(tmp_path)
    for data, name in ((Noise(9, count=7).x, "validation_loss"), (Noise().x, "train_loss_fixed")):
        expected = losses_at_levels(diffusion, fix_batch(Batch(data), range(len(data)), diffusion), 8).mean(0)
        assert_close(torch.tensor(found[-1][f"{name}_by_t"], dtype=torch.float64), expected, rtol=1e-5, atol=1e-7)
        assert found[-1][name] == pytest.approx(expected.mean().item(), rel=1e-5)
    line = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert f", validation {found[-1]['validation_loss']:.4f}, " in describe_line(line, run.validator.last)


def test_a_resumed_run_has_each_line_once_and_the_same_best_weights(tmp_path):
    options = {"validation": Noise(9), "validate_every": 3, "keep_best": True, "train_lr": 0.05}
    trainer(tmp_path / "through", 12, **options).train()
    run = trainer(tmp_path / "stopped", 12, **options)
    run.options.train_num_steps = 7  # as if killed: the line of step 6 is after the checkpoint of step 4
    run.is_due = lambda every: run.step > 0 and run.step % every == 0
    run.train()
    assert [line["step"] for line in measured(tmp_path / "stopped")] == [3, 6]
    trainer(tmp_path / "stopped", 12, **options).train()
    one, two = measured(tmp_path / "through"), measured(tmp_path / "stopped")
    assert one == two
    assert [line["step"] for line in one] == [3, 6, 9, 12]
    records = [json.loads((tmp_path / name / "best/best.json").read_text()) for name in ("through", "stopped")]
    assert records[0] == records[1] == min(one, key=lambda line: line["validation_loss"])
    one, two = (load_file(tmp_path / name / "best/model.safetensors") for name in ("through", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_best_weights_are_a_model(tmp_path):
    """They are those of the step with the lowest loss, and the folder has no other files."""
    run = trainer(tmp_path, 8, validation=Noise(9), validate_every=1, keep_best=True)
    kept = {}
    run.callbacks.append(
        type("Keep", (Callback,), {"on_validation": lambda self, t, line: kept.update({line["step"]: weights_of(t)})})()
    )
    run.validator.measure = lambda diffusion, step: line_of(step, 1 + (step - 5) ** 2, 1)
    run.train()
    best = GaussianDiffusion.from_pretrained(tmp_path / "best")
    assert all(torch.equal(value, kept[5][name]) for name, value in best.model.state_dict().items())
    assert json.loads((tmp_path / "best/best.json").read_text())["step"] == 5
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "best.json",
        "config.yaml",
        "model.safetensors",
    ]
    assert (
        cli.main(["sample", str(tmp_path / "best"), "--num", "1", "--steps", "1", "--out", str(tmp_path / "a.png")])
        == 0
    )
    assert (tmp_path / "a.png").is_file()


def weights_of(run):
    return {name: value.clone() for name, value in run.ema.ema_model.state_dict().items()}


def line_of(step, held, trained):
    return {"step": step, "validation_loss": float(held), "validation_loss_by_t": [float(held)] * 8,
            "train_loss_fixed": float(trained), "train_loss_fixed_by_t": [float(trained)] * 8}  # fmt: skip


def test_a_resumed_run_knows_the_best_so_far(tmp_path):
    """A later loss that is higher than the best before the interruption does not replace the weights."""
    first = trainer(tmp_path, 4, validation=Noise(9), validate_every=2, keep_best=True)
    first.validator.measure = lambda diffusion, step: line_of(step, {2: 0.5, 4: 0.7}[step], 1)
    first.train()
    second = trainer(tmp_path, 8, validation=Noise(9), validate_every=2, keep_best=True)
    second.validator.measure = lambda diffusion, step: line_of(step, {6: 0.6, 8: 0.4}[step], 1)
    written = []
    second.callbacks.append(
        type(
            "Look", (Callback,), {"on_validation": lambda *_: written.append((tmp_path / "best/best.json").read_text())}
        )()
    )
    second.train()
    assert [json.loads(text)["step"] for text in written] == [2, 8]


def test_best_weights_without_held_out_data(tmp_path):
    with pytest.raises(UsageError, match=r"train.keep_best=true chooses weights by held-out data, and there is none"):
        trainer(tmp_path, 1, keep_best=True)


def test_no_file_of_the_held_out_side_is_drawn(tmp_path, monkeypatch):
    data = pictures(tmp_path / "data", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)))
    drawn = set()
    step = TrainLoader.__next__

    def recorded(loader):
        batch = step(loader)
        drawn.update(name_of(loader.dataset, index) for index in loader.indices)
        return batch

    run = trainer(tmp_path / "run", 12, data=str(data), validation=0.25)
    monkeypatch.setattr(TrainLoader, "__next__", recorded)
    run.train()
    held = {name_of(run.validator.held.dataset, i) for i in range(len(run.validator.held.dataset))}
    assert {*drawn, *held} == {str(path) for path in data.rglob("*.png")}
    assert held
    assert not drawn & held


def test_a_share_of_a_dataset_of_the_user(tmp_path):
    run = trainer(tmp_path, 1, data=Noise(count=40), validation=0.2)
    assert len(run.dataset) + len(run.validator.held.dataset) == 40
    rows = {x.numpy().tobytes() for x in (run.dataset[i]["x"] for i in range(len(run.dataset)))}
    held = {run.validator.held.dataset[i]["x"].numpy().tobytes() for i in range(len(run.validator.held.dataset))}
    assert not rows & held
    assert rows | held == {x.numpy().tobytes() for x in Noise(count=40).x}


def test_a_share_of_clips_and_images_of_the_user():
    mixed = MixedDataset(Noise(1, count=30).x[:, :, None], Noise(2, count=20), 0.4)
    train, held = split_by_share(mixed, 0.2, "the dataset")
    assert [len(a) + len(b) for a, b in zip(train.parts, held.parts, strict=True)] == [30, 20]
    assert (len(train) + len(held), held.image_ratio) == (50, 0.4)
    drawn = [x["x"].numpy().tobytes() for side in (train, held) for x in (side[i] for i in range(len(side)))]
    assert len(set(drawn)) == 50


def test_other_classes_in_a_dataset_of_the_user(tmp_path):
    class Named(Noise):
        def __init__(self, classes):
            super().__init__()
            self.classes = classes

    with pytest.raises(UsageError, match="the validation data has the classes dog, cat, the training data cat, dog"):
        trainer(tmp_path, 1, data=Named(["cat", "dog"]), validation=Named(["dog", "cat"]), model={"num_classes": 2})


# ---- resuming with other held-out data


def test_a_run_resumes_with_the_same_share_only(tmp_path, caplog):
    data = pictures(tmp_path / "data", *(f"{i}.png" for i in range(12)))
    trainer(tmp_path / "with", 2, data=str(data), validation=0.25).train()
    trainer(tmp_path / "with", 3, data=str(data), validation=0.25).train()
    trainer(tmp_path / "without", 2, data=str(data)).train()
    trainer(tmp_path / "without", 3, data=str(data)).train()
    for name, share, then, now in (
        ("with", None, "0.25", "null"),
        ("with", 0.5, "0.25", "0.5"),
        ("without", 0.1, "null", "0.1"),
    ):
        with pytest.raises(
            UsageError, match=rf"{name} was trained with data.validation={then}, now it is {now}, which"
        ):
            trainer(tmp_path / name, 4, data=str(data), validation=share).train()
    own = pictures(tmp_path / "own", "a.png", "b.png", seed=1)
    assert "validation data" not in caplog.text
    trainer(tmp_path / "without", 4, data=str(data), validation=str(own)).train()
    assert f"was none, now it is {own.resolve()}: its losses from now on are of other samples" in caplog.text
    assert [line["step"] for line in measured(tmp_path / "without")] == [4]


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path):
    data = pictures(tmp_path / "data", *(f"{i}.png" for i in range(6)))
    run = trainer(tmp_path / "run", 2, data=str(data))
    del run.identity["share"], run.identity["validation"]
    run.train()
    trainer(tmp_path / "run", 3, data=str(data)).train()
    assert losses(tmp_path / "run")[-1][0] == 3


# ---- the alarm

FALLING = [1 - 0.02 * i for i in range(20)]
U = [1 + 0.01 * (i - 8) ** 2 for i in range(20)]
RNG = np.random.default_rng(0)
SERIES = {  # validation losses, training losses, the measurement that raises the alarm
    "both fall": (FALLING, FALLING, None),
    "u": (U, FALLING, 8 + 4),  # 1.01 is within 2 %; 1.04, 1.09 and 1.16 are three in a row
    "plateau": ([1 + 0.01 * (-1) ** i for i in range(20)], FALLING, None),
    "noise of 1 %": (list(1 + 0.005 * RNG.standard_normal(200)), [1 - 0.001 * i for i in range(200)], None),
    "both rise": (U, U, None),
    "one spike": ([1.0] * 5 + [2.0] + [1.0] * 5, FALLING, None),
    "two spikes": ([1.0] * 5 + [2.0, 2.0] + [1.0] * 5, FALLING, None),
    "too few": ([1, 1.1, 1.2], [1, 0.9, 0.8], None),
}


@pytest.mark.parametrize("name", SERIES)
def test_the_alarm(name):
    held, trained, expected = SERIES[name]
    rows = [line_of(100 * i, *pair) for i, pair in enumerate(zip(held, trained, strict=False))]
    alarms = [i for i in range(len(rows)) if find_overfitting(rows[: i + 1])]
    assert alarms[:1] == ([] if expected is None else [expected])


def validator(keep_best=False):
    config = Config(train=TrainConfig(keep_best=keep_best))
    return Validator(adapt(Noise()), adapt(Noise()), config, batch_size=2, rank=0, num_ranks=1)


def test_the_alarm_is_raised_once_per_onset(caplog):
    """The words have the numbers, the step of the best weights, and the remedies."""
    losses = [1.0, 0.8, 0.9, 0.9, 0.9, 0.95, 1.0, 0.79, 0.9, 0.9, 0.9]
    rows = [line_of(10 * i, loss, 1 - 0.05 * i) for i, loss in enumerate(losses)]
    through = validator()
    for row in rows:
        through.add(row)
    said = [record.getMessage() for record in caplog.records if "overfitting" in record.getMessage()]
    assert len(said) == 2
    assert said[0] == (
        "overfitting: the validation loss was lowest at step 10 (0.8). At step 40 it is 12% higher (0.9), while the "
        "loss of training samples at the same noise levels fell from 0.95 to 0.8. Use more data, augmentation "
        "(data.augment_horizontal_flip, crop_scale), model.drop_path or model.dropout, a smaller model, or stop here; "
        "train.keep_best=true keeps the weights of step 10"
    )
    caplog.clear()
    resumed = validator(keep_best=True)
    resumed.resume(rows[:5], {}, 40)  # the alarm of step 40 was raised before
    for row in rows[5:]:
        resumed.add(row)
    (again,) = [record.getMessage() for record in caplog.records if "overfitting" in record.getMessage()]
    assert again.endswith("best/ has the weights of step 70")


# ---- readers


def test_the_report_and_the_plots_have_the_curve(tmp_path):
    trainer(tmp_path, 4, validation=Noise(9), validate_every=1, sampled=True).train()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for bad in ({"step": 5, "validation_loss": 1.0}, {"step": 5, **line_of(5, math.nan, 1)}, [1], {"step": "x"}):
            file.write(json.dumps(bad) + "\n")
    rows = measured(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    text = write_report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert f"Validation loss {rows[-1]['validation_loss']:.4g} at step 4" in text
    sizes = []
    for found in ((), rows):
        plot_metrics(read_lines(tmp_path / "metrics.jsonl"), tmp_path / "plot.png", found)
        with Image.open(tmp_path / "plot.png") as image:
            sizes.append(image.width)
    assert sizes[1] == sizes[0] * 4 // 3
    with Image.open(tmp_path / "metrics.png") as image:
        assert image.width == sizes[1]


def test_trackers_get_the_line():
    logged = []
    accelerator = SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    Tracking().on_validation(SimpleNamespace(accelerator=accelerator), line_of(7, 0.5, 0.25))
    ((step, values),) = logged
    assert (step, values["validation_loss"], values["train_loss_fixed"]) == (7, 0.5, 0.25)
    assert values["validation_loss_by_t/7"] == 0.5


def test_diagnose_reports_overfitting(tmp_path, capsys):
    data = pictures(tmp_path / "data", *(f"{i}.png" for i in range(6)))
    trainer(tmp_path / "run", 1, data=str(data)).train()
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for row in (line_of(i, 1 + 0.1 * i, 1 - 0.1 * i) for i in range(5)):
            file.write(json.dumps(row) + "\n")
    assert cli.main(["diagnose", str(tmp_path / "run"), "--num", "2", "sample.steps=1"]) == 0
    assert (
        "- overfitting: the validation loss was lowest at step 0 (1). At step 4 it is 40% higher"
        in capsys.readouterr().out
    )


# ---- the command line

RUN = ["--size", "8", "--steps", "2", "--batch-size", "2", "model.patch_size=4", "model.dim=32", "model.dim_latent=32",
       "model.num_heads=2", "model.latent_num_heads=2", "model.num_latents=6", "model.depth=1", "train.log_every=1",
       "model.latent_self_attn_depth=1", "sample.num_samples=1", "sample.steps=1", "data.num_workers=0"]  # fmt: skip


def test_the_option_validation(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    pictures(tmp_path / "data", *(f"{i}.png" for i in range(10)))
    assert cli.main(["train", "--data", "data", "--validation", "0.2", *RUN]) == 0
    assert re.search(r"  validation: \d of 10 files held out \(data.validation=0.2\)\n", caplog.text + "\n")
    assert len(measured(tmp_path / "runs" / "data")) == 1
    assert "validation: 0.2\n" in (tmp_path / "runs/data/config.yaml").read_text(encoding="utf-8")
    assert cli.main(["train", "--data", "data", *RUN, "--steps", "3"]) == 2
    assert "was trained with data.validation=0.2, now it is null" in capsys.readouterr().err


def test_folders_of_splits_on_the_command_line(tmp_path, monkeypatch, capsys, caplog):
    """The same command resumes, whatever it finds in the folder of the run."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    for seed, (split, count) in enumerate({"train": 6, "val": 2, "test": 3}.items()):
        names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(count)]
        pictures(tmp_path / "data" / split, *names, seed=seed)
    command = ["train", "--data", "data", *RUN]
    assert cli.main(command) == 0
    assert "  12 images" in caplog.text
    assert "  validation: 4 files of data/val" in caplog.text.replace("\\", "/")
    shutil.rmtree(tmp_path / "runs" / "data" / "checkpoints")
    (tmp_path / "runs" / "data" / "run.json").unlink()
    assert cli.main([*command, "--steps", "3"]) == 0
    assert [line["step"] for line in measured(tmp_path / "runs" / "data")] == [3]
    assert cli.main(["preview", "data", "--size", "8"]) == 0
    assert "12 images" in capsys.readouterr().out
