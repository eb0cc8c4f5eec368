"""The precision of the network in training and in sampling."""

import pytest
import torch
from tiny_run import make_trainer
from torch import nn

from rin_video import GaussianDiffusion, UsageError
from rin_video.config import SampleConfig
from rin_video.config_files import load_config
from rin_video.diffusion.precision import fastest_precision, running_in
from rin_video.diffusion.sampling import sampling_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Watched(nn.Module):
    """A model that records the dtype of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.types = nn.Linear(4, 4), set()

    def forward(self, x, gamma, latents=None):
        result = self.layer(x)
        self.types.add(result.dtype)
        return result, None


def test_sampling_takes_the_precision_of_training_or_another():
    assert sampling_precision(None, "bf16", GPU) == "bf16"
    assert sampling_precision(None, "tf32", CPU) == sampling_precision(None, "fp16", CPU) == "no"
    assert sampling_precision("bf16", "no", CPU) == "bf16"
    with pytest.raises(UsageError, match=r"sample\.precision=half is unknown: choose no, tf32, bf16, fp16"):
        SampleConfig(precision="half")
    diffusion = GaussianDiffusion(Watched(), objective="x0", clip_x0="none")
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        diffusion.model.types.clear()
        samples = diffusion.sample(SampleConfig(num_samples=2, steps=2, precision=precision), shape=(4,), seed=0)
        assert diffusion.model.types == {dtype}
        assert samples.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # the caller has enabled it: it stays enabled
        diffusion.model.types.clear()
        diffusion.sample(batch_size=2, shape=(4,), steps=1)
    assert diffusion.model.types == {torch.bfloat16}


@pytest.mark.parametrize(("half", "expected"), [(1.4, "no"), (1.6, "bf16")])
def test_the_faster_precision_is_measured(half, expected, monkeypatch):
    monkeypatch.setattr("rin_video.diffusion.precision._rate", lambda dtype, _: half if dtype == torch.bfloat16 else 1)
    fastest_precision.cache_clear()
    try:
        assert fastest_precision(CPU) == expected
        assert sampling_precision(None, "bf16", CPU) == expected
        assert sampling_precision(None, "no", CPU) == "no"
    finally:
        fastest_precision.cache_clear()


def test_a_device_without_bfloat16_uses_float32(monkeypatch):
    def refuse(dtype, device):
        raise RuntimeError("not implemented for BFloat16")

    monkeypatch.setattr("rin_video.diffusion.precision._rate", refuse)
    fastest_precision.cache_clear()
    try:
        assert fastest_precision(CPU) == "no"
    finally:
        fastest_precision.cache_clear()


def test_auto_is_replaced_by_what_was_measured(tmp_path):
    run = make_trainer(tmp_path, mixed_precision="auto", train_num_steps=1)
    assert run.config.train.mixed_precision == run.diffusion.precision == fastest_precision(CPU)
    run.train()
    assert load_config(tmp_path / "config.yaml").train.mixed_precision == fastest_precision(CPU)


def test_sampling_uses_the_precision_of_the_run(tmp_path):
    run = make_trainer(tmp_path, mixed_precision="bf16", train_num_steps=1)
    backward = []
    run.diffusion.model.core.latents.table.register_hook(lambda grad: backward.append(torch.is_autocast_enabled("cpu")))
    run.train()
    assert backward == [False]  # the backward pass uses the dtypes of the forward pass, without autocast
    loaded = GaussianDiffusion.from_pretrained(tmp_path)
    assert loaded.precision == run.averaged().precision == loaded.with_model(loaded.model).precision == "bf16"
    loaded.save_pretrained(tmp_path / "again")
    assert GaussianDiffusion.from_pretrained(tmp_path / "again").precision == "bf16"


def test_tf32_is_on_within_the_block_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    with running_in("tf32", GPU):
        assert torch.get_float32_matmul_precision() == "high"
    with running_in("no", GPU):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_tf32_trains_in_float32_on_a_cpu(tmp_path):
    run = make_trainer(tmp_path, mixed_precision="tf32", train_num_steps=1)
    run.train()
    assert run.accelerator.mixed_precision == "no"
