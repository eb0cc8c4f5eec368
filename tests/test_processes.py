"""Training with two processes on the CPU equals training with one, and checkpoints work for any number of processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shared_epoch
import tiny_run
import torch
from accelerate import Accelerator
from tiny_run import make_trainer
from together import draw, scores
from torch.testing import assert_close

from rin_video import GaussianDiffusion, UsageError
from rin_video.datasets.buckets import BucketSampler
from rin_video.datasets.shards import write_shard
from rin_video.diffusion.masks import draw_known
from rin_video.diffusion.noise import BatchRNG
from rin_video.diffusion.objectives import low_discrepancy_time
from rin_video.training.callbacks import Callback
from rin_video.training.distributed import per_process_batch, rows_of
from rin_video.training.metrics import read_lines, read_validation
from rin_video.training.state import newest_state

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")


def launch(*words: str, processes: int = 2, script: str = tiny_run.__file__) -> None:
    """Run `tiny_run.py`, or another script, with torchrun."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if torch.accelerator.is_available():  # on other systems the CPU must be detected
        environment["ACCELERATE_USE_CPU"] = "true"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*torchrun, script, *words], env=environment, capture_output=True, text=True, timeout=240)
    said = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert done.returncode == 0, "\n".join([*said[:60], "...", *said[-40:]])


SHORT = 8  # steps


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


def without_key_bias(value):
    """Drop the bias of the keys: softmax cancels it, so Adam makes full-size steps from rounding errors."""
    if isinstance(value, list):
        return [without_key_bias(item) for item in value]
    kept = dict(value)
    for name, tensor in value.items():
        if name.endswith(".to_kv.bias"):
            kept[name] = tensor.chunk(2)[1]
        elif name.endswith(".to_qkv.bias"):
            kept[name] = torch.cat(tensor.chunk(3)[::2])
    return kept


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of 20 steps with 2 x 2 x 2 samples: in one process, in two (DDP), and in two with FSDP2."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["train_batch_size=4", "gradient_accumulate_every=2"]
    make_trainer(folder / "one", train_batch_size=4, gradient_accumulate_every=2, validated=True).train()
    some = {"train_batch_size": 4, "gradient_accumulate_every": 2, "train_num_steps": SHORT}
    make_trainer(folder / "one-mixture", **some, mixture=True).train()
    make_trainer(folder / "one-muon", **some, optimizer="muon", convolutions=True).train()
    make_trainer(folder / "one-conditions", **some, conditions=True).train()
    short, sharded = [*common, f"train_num_steps={SHORT}"], "sharding=fsdp2"
    mixed = [str(folder / "mixture"), *short, "mixture=true"]
    muon = [str(folder / "muon"), *short, sharded, "optimizer=muon", "convolutions=true"]
    conditions = [str(folder / "conditions"), *short, "conditions=true"]
    first = [str(folder / "ddp"), *common, "validated=true"]
    second = [str(folder / "fsdp2"), *common, sharded, "counted=true", "validated=true"]
    launch(*first, "--", *second, "--", *mixed, "--", *muon, "--", *conditions, "--", "together", str(folder))
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_loss_curve_is_that_of_one_process(runs, name):
    """Samples, noise and times are equal; only the order of sums differs."""
    one, two = losses(runs / "one"), losses(runs / name)
    assert len(one) == len(two) == 20
    assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_validation_loss_is_that_of_one_process(runs, name):
    """Each process measures its share of the samples; the best weights are gathered and written once."""
    one, two = (read_validation(runs / folder / "metrics.jsonl") for folder in ("one", name))
    assert [line["step"] for line in two] == [4, 8, 12, 16, 20]
    for key in ("validation_loss_by_t", "train_loss_fixed_by_t"):
        assert_close(*(torch.tensor([line[key] for line in lines]) for lines in (two, one)), rtol=2e-6, atol=0)
    records = [json.loads((runs / folder / "best/best.json").read_text()) for folder in ("one", name)]
    assert records[0]["step"] == records[1]["step"] == min(one, key=lambda line: line["validation_loss"])["step"]
    models = [GaussianDiffusion.from_pretrained(runs / folder / "best").model.state_dict() for folder in ("one", name)]
    assert_close(*map(without_key_bias, models), rtol=0, atol=1e-4)


def test_clips_mixed_with_images_too(runs):
    """In each step one tokenizer gets no gradient, the same one in both processes."""
    one, two = losses(runs / "one-mixture"), losses(runs / "mixture")
    assert len(one) == len(two) == SHORT
    assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-6, atol=0)


def test_what_is_drawn_for_each_sample_too(runs):
    """This includes observed frames and boxes, label dropout, low-discrepancy times and the gap, with buckets."""
    one, two = losses(runs / "one-conditions"), losses(runs / "conditions")
    assert len(one) == len(two) == SHORT
    assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-6, atol=0)


def test_a_checkpoint_of_shards_gathers_one_tensor_at_a_time(runs):
    """Measures the additional memory of a save in each process."""
    for rank in range(2):
        found = json.loads((runs / f"fsdp2/save-{rank}.json").read_text())
        assert found["is_sharded"]
        assert found["in_all"] > 1.8 * found["shard"]  # all tensors are gathered
        assert found["peak"] <= 2 * found["largest"]  # gloo frees one tensor late; previously all tensors were alive
        assert found["shard"] + found["peak"] < 2 * found["shard"] + found["largest"]


def test_processes_decide_together(runs):
    """They use the smallest batch size that fits into all, one process indexes, and one error ends all."""
    first, second = json.loads((runs / "together.json").read_text())
    assert first["batch"] == second["batch"] == 250
    assert (first["was_there"], second["was_there"]) == (False, True)
    said = "the disk of the second machine is write-protected"
    assert first["error"] == f"ReportedError: PermissionError('{said}')"
    assert second["error"] == f"PermissionError: {said}"


def test_processes_share_the_samples_out(runs):
    """The samples equal those of one process, with contexts, for longer clips, and if they are fewer than processes."""
    together, alone = torch.load(runs / "samples.pt", weights_only=True), draw()
    assert together.keys() == alone.keys()
    for name, samples in alone.items():
        assert_close(together[name], samples, rtol=0, atol=1e-5)
    assert (together["known 5"][:, :, :2] == together["longer 5"][:, :, :2]).all()
    shares = [rows_of(5, rank, 4) for rank in range(4)]
    assert shares == [range(2), range(2, 4), range(4, 5), range(5, 5)]


def test_processes_share_an_evaluation(runs):
    """All of them have the scores of one process, to the last digit."""
    first, second = json.loads((runs / "together.json").read_text())
    alone = json.loads(json.dumps(scores()))
    assert first["scores"] == second["scores"] == alone
    assert {"0 clip/frechet_distance", "1 prediction/psnr"} <= alone.keys()


def test_ranks_take_consecutive_rows_of_a_batch_of_buckets():
    """This matches the order of their noise and of their file names."""
    bucket_of, options = [index % 3 for index in range(20)], {"seed": 1}
    alone = iter(BucketSampler(bucket_of, 6, **options))
    shares = [iter(BucketSampler(bucket_of, 2, **options, rank=rank, num_ranks=3)) for rank in range(3)]
    for _ in range(10):
        assert [draw for per_process_batch in shares for draw in next(per_process_batch)] == next(alone)


def test_muon_uses_complete_matrices_if_they_are_sharded(runs):
    """Its update depends on the complete matrix, not on the rows of a shard; the same holds for convolutions."""
    one, two = losses(runs / "one-muon"), losses(runs / "muon")
    assert len(one) == len(two) == SHORT
    assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_one_process_takes_up_what_two_wrote(runs, name, tmp_path):
    for folder in (name, "one"):
        shutil.copytree(runs / folder, tmp_path / folder)
    runs = tmp_path
    state, expected = newest_state(runs / name)[1], newest_state(runs / "one")[1]
    for part in ("model", "ema", "tracks"):
        assert_close(without_key_bias(state[part]), without_key_bias(expected[part]), rtol=0, atol=1e-4)
    assert GaussianDiffusion.from_pretrained(runs / name).sample(batch_size=1, steps=1).shape == (1, 3, 8, 8)
    make_trainer(runs / name, train_num_steps=24, train_batch_size=4, gradient_accumulate_every=2).train()
    make_trainer(runs / "one", train_num_steps=24, train_batch_size=4, gradient_accumulate_every=2).train()
    assert_close(torch.tensor(losses(runs / name)), torch.tensor(losses(runs / "one")), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_resume_what_one_wrote(tmp_path, sharding):
    make_trainer(tmp_path / "parts", train_num_steps=10, lr_schedule="constant").train()
    make_trainer(tmp_path / "whole", lr_schedule="constant").train()
    launch(str(tmp_path / "parts"), "train_num_steps=20", "lr_schedule=constant", f"sharding={sharding}")
    assert_close(torch.tensor(losses(tmp_path / "parts")), torch.tensor(losses(tmp_path / "whole")), rtol=1e-5, atol=0)


def test_a_time_ends_for_all_processes_at_the_same_step(tmp_path):
    launch(str(tmp_path), "time=4s", "save_and_sample_every=10000", "train_batch_size=4")
    step = newest_state(tmp_path)[1]["step"]
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["lr"] == 0
    assert (tmp_path / f"samples/step-{step:08d}.png").is_file()
    assert newest_state(tmp_path)[1]["time"]["spent"] >= 4


@pytest.mark.slow
def test_accelerate_launch_with_its_own_fsdp2_options(tmp_path):
    make_trainer(tmp_path / "one").train()
    command = ["accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
               "--dynamo_backend=no", "--use_fsdp", "--fsdp_version=2", "--fsdp_cpu_ram_efficient_loading=false",
               "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
               "--fsdp_transformer_layer_cls_to_wrap=Block"]  # fmt: skip
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-m", *command, tiny_run.__file__, str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), rtol=2e-6, atol=0)


def test_a_process_that_finds_no_others_is_refused(tmp_path, monkeypatch):
    """Otherwise each would train on its own, all into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("rin_video.training.distributed.Accelerator", Alone)
    with pytest.raises(UsageError, match="WORLD_SIZE is 2, but this process found 1:"):
        make_trainer(tmp_path)


class Alone(Accelerator):
    num_processes = 1

    def __init__(self, **options):
        os.environ.pop("WORLD_SIZE")
        super().__init__(**options)
        os.environ["WORLD_SIZE"] = "2"


@pytest.mark.slow
def test_two_processes_share_an_epoch_of_shards_out_and_resume(tmp_path):
    """Every image is read once per epoch by one process; a run that starts in the middle reads the rest."""
    images = [np.full((8, 8 * (1 + i % 2)), 10 * i, np.uint8) for i in range(24)]
    for shard in range(3):
        own = {f"{i:02d}.pgm": images[i] for i in range(shard, 24, 3)}
        (tmp_path / "shards").mkdir(exist_ok=True)
        content = {name: b"P5 %d 8 255\n" % pixels.shape[1] + pixels.tobytes() for name, pixels in own.items()}
        write_shard(tmp_path / f"shards/{shard:03d}.tar", content)
    launch(str(tmp_path / "shards"), str(tmp_path), script=shared_epoch.__file__)
    for sampler, ranks in json.loads((tmp_path / "read.json").read_text()).items():
        first, second = (rank["whole"] for rank in ranks)
        assert [batch["shape"] for batch in first] == [batch["shape"] for batch in second]
        widths = {batch["shape"][-1] for batch in first}
        assert widths == ({8, 16} if sampler == "buckets" else {8})
        for epoch in (slice(0, 6), slice(6, 12)):
            shares = [[name for batch in rank[epoch] for name in batch["names"]] for rank in (first, second)]
            assert sorted(shares[0] + shares[1]) == list(range(0, 240, 10))
        assert first[:6] != first[6:]
        for rank in ranks:
            assert rank["resumed"] == rank["whole"][shared_epoch.RESUMED :]


def test_accumulation_sends_gradients_once_a_step(tmp_path, monkeypatch):
    run = make_trainer(tmp_path, train_num_steps=1, gradient_accumulate_every=3)
    calls = []
    quiet = type(run.accelerator).no_sync
    monkeypatch.setattr(type(run.accelerator), "no_sync", lambda self, model: calls.append(1) or quiet(self, model))
    run.train()
    assert len(calls) == 2


def test_rows_draw_the_same_in_any_process():
    """No process draws for the others: one process with six rows equals three processes with two rows each."""

    def draw(rows):
        rng = BatchRNG((5, 7, 0), rows, 6, torch.device("cpu"))
        masks = draw_known({"boxes": 1, "frames": 1}, [], len(rows), (4, 6, 6), rng.generators())
        return [rng.uniform(), rng.noise((2, 3)), rng.normal(), masks, low_discrepancy_time(rng), rng.uniform()]

    alone, parts = draw(range(6)), [draw(range(2 * rank, 2 * rank + 2)) for rank in range(3)]
    for one, rows in zip(alone, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(rows), one)
    assert len(alone[0].unique()) == 6  # each process has its own rows
    assert not torch.equal(alone[0], alone[5])


def test_noise_of_a_batch_is_standard_normal():
    rng = BatchRNG((0, 1, 2), range(64), 64, torch.device("cpu"))
    noise = rng.noise((1000,))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.corrcoef().fill_diagonal_(0).abs().max() < 0.2  # rows are independent
    uniform = torch.cat([BatchRNG((0, step, 0), range(64), 64, torch.device("cpu")).uniform() for step in range(40)])
    assert ((uniform.histc(10, 0, 1) - 256).abs() < 80).all()


def test_a_batch_size_that_cannot_be_divided_is_reported():
    assert per_process_batch(12, 4) == 3
    with pytest.raises(UsageError, match="train_batch_size is 10, which 4 processes cannot divide evenly: use 8 or 12"):
        per_process_batch(10, 4)


def test_callbacks_see_steps_lines_samples_checkpoints_and_measure(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.seen = {}

        def count(self, name):
            self.seen[name] = self.seen.get(name, 0) + 1

        def on_step(self, trainer, loss):
            assert loss.ndim == 0
            self.count("step")

        def on_log(self, trainer, line):
            self.count("log")

        def on_sample(self, trainer, samples, paths):
            assert samples.shape == (2, 3, 8, 8)
            assert all(path.is_file() for path in paths)
            self.count("sample")

        def on_checkpoint(self, trainer, folder):
            assert folder == trainer.checkpoints[-1]
            self.count("checkpoint")

        def evaluate(self, trainer, diffusion):
            torch.manual_seed(trainer.step)  # does not change the training
            return {"mean": diffusion.sample(batch_size=2, steps=1, seed=0).mean().item()}

        def on_end(self, trainer):
            self.count("end")

    watch = Watch()
    make_trainer(tmp_path / "seen", train_num_steps=6, log_every=2, save_and_sample_every=3, callbacks=[watch]).train()
    assert watch.seen == {"step": 6, "log": 3, "sample": 2, "checkpoint": 2, "end": 1}
    scores = [json.loads(line) for line in (tmp_path / "seen/evaluations.jsonl").read_text().splitlines()]
    assert [score["step"] for score in scores] == [3, 6]
    assert all(0 < score["mean"] < 1 for score in scores)
    make_trainer(tmp_path / "alone", train_num_steps=6, log_every=2, save_and_sample_every=3).train()
    assert losses(tmp_path / "seen") == losses(tmp_path / "alone")


def test_processes_agree_on_a_stop_no_oftener_than_they_log(tmp_path, monkeypatch):
    """They must wait for each other to agree; previously they did so in every step."""
    run = make_trainer(tmp_path, train_num_steps=12, log_every=5, save_and_sample_every=6)
    asked = []
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    monkeypatch.setattr(
        "rin_video.training.trainer.any_rank", lambda flag, accelerator: asked.append(run.step) or False
    )
    run.train()
    assert asked == [0, 5, 6, 10, 12]  # the first decision is whether there are samples to be drawn
