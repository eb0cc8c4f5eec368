"""Diagnosis: figures of exact denoisers against closed forms, and the text of each finding."""

import dataclasses

import pytest
import torch
from exact import STD, Gaussian
from torch.utils.data import TensorDataset

from rin_video.diffusion.process import GaussianDiffusion
from rin_video.reports.diagnose import Diagnosis, diagnose, latent_std


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    x = STD * torch.randn(64, 1, 256, generator=torch.Generator().manual_seed(0))
    return TensorDataset((x + 1) / 2)


def test_losses_are_those_of_the_closed_form(data):
    """v has variance gamma + (1 - gamma) STD^2; conditioned on x_t, it is STD^2 divided by the variance of x_t."""
    found = diagnose(GaussianDiffusion(Gaussian(), objective="v"), data)
    for i, log_snr in enumerate(found.log_snr):
        gamma = torch.tensor(log_snr).sigmoid().item()
        assert found.loss[i] == pytest.approx(STD**2 / (gamma * STD**2 + 1 - gamma), rel=0.05)
        assert found.loss_zero[i] == pytest.approx(gamma + (1 - gamma) * STD**2, rel=0.05)
        alpha, sigma = gamma**0.5, (1 - gamma) ** 0.5
        # x_t - v = (alpha + sigma) x0 + (sigma - alpha) eps
        copy = (alpha - sigma) ** 2 + STD**2 * (alpha + sigma) ** 2
        assert found.loss_copy[i] == pytest.approx(copy, rel=0.05)
    assert found.loss_first_pass == found.loss
    assert found.self_conditioning_share == [0] * len(found.t)
    assert found.loss_raw is None
    assert found == diagnose(GaussianDiffusion(Gaussian(), objective="v"), data)  # the same noise every time


def test_dead_latents_are_counted(data):
    found = diagnose(GaussianDiffusion(Gaussian(), objective="v"), data)
    assert [spread < 0.01 for spread in found.latent_std] == [False, False, True, True]
    (words,) = found.findings()
    assert words.startswith("dead latents: 2 of 4")


def test_an_untrained_network_is_reported(data):
    words = " ".join(diagnose(GaussianDiffusion(Gaussian(-1.0), objective="v"), data).findings())
    assert "untrained noise levels: at t = " in words
    assert "EMA" not in words


def test_ema_weights_that_lag_behind_are_reported(data):
    found = diagnose(GaussianDiffusion(Gaussian(0.0), objective="v"), data, raw_model=Gaussian())
    assert any(words.startswith("the EMA weights lag behind: their loss is ") for words in found.findings())


def test_text_of_the_findings():
    fine = Diagnosis(
        t=[0.25, 0.75],
        log_snr=[2, -2],
        loss=[0.1, 0.2],
        loss_first_pass=[0.2, 0.2],
        loss_raw=[0.1, 0.2],
        loss_zero=[1, 1],
        loss_copy=[0.5, 2],
        clipped=[0.1, 0.1, 0.3],
        clipped_data=0.1,
        latent_std=[0.5],
    )
    assert fine.findings() == []
    assert fine.self_conditioning_share == pytest.approx([0.1 / 0.4, 0])
    changes = {
        "untrained noise levels: at t = 0.75": {"loss": [0.1, 1.2], "loss_first_pass": [0.2, 1.2], "loss_raw": None},
        "untrained noise levels: at t = 0.25": {"loss": [float("nan"), 0.2]},
        "self-conditioning hurts at t = 0.25": {"loss_first_pass": [0.05, 0.2]},
        "clipping is active in 2 of 3 steps": {"clipped": [0.1, 0.2, 0.3]},
        "dead latents: 1 of 1": {"latent_std": [0.0]},
        "the EMA weights lag behind: their loss is 1.50 times": {"loss_raw": [0.05, 0.15]},
    }
    for start, change in changes.items():
        (words,) = dataclasses.replace(fine, **change).findings()
        assert words.startswith(start)


def test_what_beats_zero_by_far_is_trained_though_a_copy_is_better():
    """Predicting eps at high t, or x0 at low t, a copy of the input is nearly exact."""
    found = Diagnosis(t=[0.5, 0.95], log_snr=[0, -6], loss=[0.1, 0.08], loss_first_pass=[0.1, 0.08], loss_raw=None,
                      loss_zero=[1, 1], loss_copy=[2, 0.01])  # fmt: skip
    assert found.findings() == []
    (words,) = dataclasses.replace(found, loss=[0.1, 0.6], loss_first_pass=[0.1, 0.6]).findings()
    assert words.startswith("untrained noise levels: at t = 0.95")


def test_latent_std_of_known_latents():
    latents = torch.stack([torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [-2.0, 0.0]])])
    assert latent_std(latents) == pytest.approx([0, 1])
