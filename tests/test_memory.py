"""Memory: gradient checkpointing, the largest batch size that fits, the prediction; and torch.compile."""

import logging

import pytest
import torch
from tiny_run import TINY, make_trainer
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, UsageError, cli
from rin_video.config_files import load_config
from rin_video.media import write_video
from rin_video.training.memory import PeakMemory, checkpoint_blocks, largest_batch, training_memory, with_batch


def gradients(checkpointing: bool, bf16: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = RIN(**TINY, dropout=0.2, drop_path=0.2)
    checkpoint_blocks(model, checkpointing)
    with torch.autocast("cpu", enabled=bf16):
        loss = GaussianDiffusion(model)(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    loss.backward()
    return loss, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(bf16):
    """Dropout and drop-path are included: the recomputation draws the same numbers."""
    assert_close(gradients(True, bf16), gradients(False, bf16), rtol=0, atol=0)


def test_checkpointed_blocks_need_less_memory():
    config = load_config("demo", ["model.depth=6"])
    without, with_ = (training_memory(with_batch(config, 32, gradient_checkpointing=on)) for on in (False, True))
    assert with_ < 0.5 * without


def test_a_model_without_blocks_cannot_be_checkpointed():
    with pytest.raises(UsageError, match="requires a RIN, which this model is not"):
        checkpoint_blocks(torch.nn.Linear(1, 1), True)
    checkpoint_blocks(torch.nn.Linear(1, 1), False)


def test_peak_memory_is_that_of_tensors_alive_at_once():
    with PeakMemory() as memory:
        one = torch.zeros(1000)
        for _ in range(3):
            other = one + 1
        del other
        kept = one * 2
    assert memory.now == 8000
    assert memory.peak == 12000  # the previous result lives until the variable is reassigned
    del kept


def test_memory_is_predicted_with_every_condition():
    """The conditions are an observed mask, a label and an embedding; training must also work with meta tensors."""
    overrides = ["model.known_mask=true", "diffusion.known.first=1", "model.num_classes=3", "model.embedding_dim=8"]
    assert training_memory(load_config("demo", overrides)) > training_memory(load_config("demo"))


def test_the_largest_batch_fits_and_the_next_does_not(monkeypatch):
    config = load_config("demo", ["model.depth=1"])
    free = 700_000_000
    monkeypatch.setattr("rin_video.training.memory.free_memory", lambda device: free / 0.9)
    size = largest_batch(config, torch.device("cpu"))
    assert training_memory(with_batch(config, size)) <= free < 1.03 * training_memory(with_batch(config, size + 2))
    assert largest_batch(config, torch.device("cpu"), limit=10) == 10
    assert largest_batch(config, torch.device("cpu"), num_processes=4, limit=10) == 8
    monkeypatch.setattr("rin_video.training.memory.free_memory", lambda device: 1e6)
    with pytest.raises(UsageError, match=r"needs [\d.]+ MB with a batch of 1, but 900 kB are available"):
        largest_batch(config, torch.device("cpu"))


def test_batch_size_auto_and_the_same_again(tmp_path, monkeypatch, caplog):
    """A resumed run keeps its batch size, because the order of the data depends on it."""
    for i in range(3):
        write_video(torch.rand(3, 4, 16, 16), tmp_path / "clips" / f"{i}.mp4")
    command = ["train", "--data", str(tmp_path / "clips"), "--frames", "4", "--size", "16", "--batch-size", "auto",
               "--out", str(tmp_path / "run"), "model.dim=32", "model.dim_latent=32", "model.num_latents=8",
               "model.depth=1", "data.num_workers=0", "sample.steps=1", "sample.num_samples=1"]  # fmt: skip
    with caplog.at_level(logging.INFO, logger="rin_video"):
        assert cli.main([*command, "--steps", "1"]) == 0
        assert "batch size 3 on" in caplog.text
        monkeypatch.setattr("rin_video.training.memory.free_memory", lambda device: 1e6)
        assert cli.main([*command, "--steps", "2"]) == 0
    assert load_config(tmp_path / "run/config.yaml").train.train_batch_size == 3


# ---- torch.compile


def test_a_failing_compiler_is_left_out(tmp_path, monkeypatch, caplog):
    compile_ = torch.nn.Module.compile

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend=broken))
    run = make_trainer(tmp_path / "compiled", compile=True, train_num_steps=3)
    run.train()
    assert "torch.compile failed, training continues without it" in caplog.text
    plain = make_trainer(tmp_path / "plain", train_num_steps=3)
    plain.train()
    assert_close(run.diffusion.model.state_dict(), plain.diffusion.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compiler_that_fails_at_a_later_shape_is_left_out(tmp_path, monkeypatch, caplog, accumulate):
    compile_ = torch.nn.Module.compile

    def clips_only(graph, inputs):
        if any(x.ndim == 4 and x.shape[1] == 3 for x in inputs):  # an image
            raise RuntimeError("no compiler for this shape")
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend=clips_only))
    options = {"mixture": True, "train_num_steps": 4, "gradient_accumulate_every": accumulate}
    run = make_trainer(tmp_path / "compiled", compile=True, **options)
    run.train()
    assert "torch.compile failed, training continues without it" in caplog.text
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    assert_close(run.diffusion.model.state_dict(), plain.diffusion.model.state_dict(), rtol=0, atol=1e-6)


def test_other_errors_of_a_compiled_model_are_raised(tmp_path, monkeypatch):
    run = make_trainer(tmp_path / "run", train_num_steps=3)
    run.compiler.on = run.compiler.worked = True  # as after the first step, which compiles

    def fails(*args, **options):
        raise ZeroDivisionError("of another reason")

    monkeypatch.setattr(run.diffusion, "forward", fails)
    with pytest.raises(ZeroDivisionError):
        run.train()


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 8, "num_classes": 3, "conv_width": 4},
        pytest.param(
            {
                "image_size": 8,
                "frames": 4,
                "patch_size": [2, 4, 4],
                "known_mask": True,
                "self_conditioning": "latent+x0",
            },
            marks=pytest.mark.slow,  # tracing takes seconds, and the other case covers everything but the mask and x0
        ),
    ],
    ids=["image", "video"],
)
def test_a_compiled_model_is_one_graph(options):
    """There is no graph break, with and without a previous pass, in training and in sampling."""
    model = RIN(**({"dim": 32, "dim_latent": 32, "num_latents": 6, "depth": 1, "patch_size": 4} | options))
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # raises at a graph break
    x, gamma = torch.rand(2, *model.shape), torch.full((2,), 0.5)
    conditions = (
        {"label": torch.tensor([0, 1])} if model.num_classes else {"known": torch.rand(2, 1, *x.shape[2:]) < 0.5}
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            prediction, latents = compiled(x, gamma, **conditions)
            assert_close(prediction, model(x, gamma, **conditions)[0])
            again, _ = compiled(prediction, gamma, latents=latents, **conditions)
            assert_close(again, model(prediction, gamma, latents=latents, **conditions)[0])


@pytest.mark.slow
def test_a_compiled_model_trains(tmp_path, caplog):
    """If there is a compiler, the losses equal those of the plain model, and the state dict has the usual names."""
    run = make_trainer(tmp_path / "compiled", compile=True, train_num_steps=3, callbacks=[])
    before = {name: value.clone() for name, value in run.diffusion.model.state_dict().items()}
    run.train()
    assert "torch.compile failed" not in caplog.text
    plain = make_trainer(tmp_path / "plain", train_num_steps=3)
    plain.train()
    expected = plain.diffusion.model.state_dict()["core.latents.table"]
    after = run.diffusion.model.state_dict()
    assert after.keys() == before.keys()
    assert not torch.equal(after["core.latents.table"], before["core.latents.table"])
    assert_close(after["core.latents.table"], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("image64", 4),
        ("video64", 1),
        ("cifar10", 4),
    ],
)
def test_the_prediction_is_near_the_measured_peak(name, batch):
    """On Linux, the peak memory of a process is measured as in benchmarks/memory.py."""
    import json
    import subprocess
    import sys
    from pathlib import Path

    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    script = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    done = subprocess.run([sys.executable, script, name, str(batch)], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["predicted"] == pytest.approx(figures["measured"], rel=0.2)
