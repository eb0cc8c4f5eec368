"""The computations of the benchmarks."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rin_video import RIN, load_config
from rin_video.model.info import model_info

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # run.py imports peers.py from its folder, and dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run():
    load("peers")
    return load("run")


@pytest.fixture(scope="module")
def few_steps():
    return load("few_steps")


def test_frechet_distance_of_known_gaussians(few_steps):
    """If the covariances commute, the distance is that of the means plus that of the standard deviations."""
    generator = np.random.default_rng(0)
    turn, _ = np.linalg.qr(generator.normal(size=(5, 5)))
    std1, std2 = generator.uniform(0.1, 2, (2, 5))
    mean1, mean2 = generator.normal(size=(2, 5))
    one, other = [(m, turn @ np.diag(s**2) @ turn.T) for m, s in ((mean1, std1), (mean2, std2))]
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert few_steps.frechet(one, other) == pytest.approx(expected, rel=1e-9)
    assert few_steps.frechet(one, one) == pytest.approx(0, abs=1e-6)


def test_every_way_to_spoil_a_clip_but_the_first_changes_it(few_steps):
    x = torch.rand(3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    for how, name in enumerate(few_steps.SPOILS):
        spoilt = few_steps.spoil(x, how, torch.Generator().manual_seed(1))
        assert spoilt.shape == x.shape
        assert 0 <= spoilt.min() <= spoilt.max() <= 1
        assert torch.equal(spoilt, x) == (name == "not")


def test_flops_of_a_step_are_those_of_info(run):
    """The loss consists of the self-conditioning pass, a second pass, and its gradient at twice the cost of that pass.

    The gradient of the input is not computed.
    """
    size = {"dim": 32, "dim_latent": 64, "num_latents": 8, "depth": 2, "image_size": 16, "patch_size": 4}
    contender = run.peers.rin(**size)
    model = contender.network
    forward = 1e9 * model_info(model.config).gflops
    self_cond = 2 * 2 * 64 * 4 * 64  # the feed-forward layer of the previous latents
    first_pass = forward - (8 - 1) * self_cond
    no_input_gradient = 2 * 16 * (3 * 4 * 4) * 32  # of the patch projection
    x = torch.rand(1, 3, 16, 16)
    found = run.flops(lambda: contender.loss(x).backward())
    assert found == pytest.approx(first_pass + 3 * forward - no_input_gradient, rel=0.01)


def test_exponent_of_a_power_law(run):
    frames = [16, 32, 64, 128]
    assert run.exponent(frames, [3 * n**1.25 for n in frames]) == pytest.approx(1.25)


def test_every_contender_of_ours_takes_a_step_on_its_data(run):
    """The other packages are not installed for the tests; our models use the same interface."""
    machine = run.Machine("cpu")
    for options in ({"image_size": 16, "patch_size": 4}, {"image_size": 16, "frames": 4, "patch_size": (2, 4, 4)}):
        for extras in ({}, run.peers.EXTRAS):
            contender = run.peers.rin(dim=32, num_latents=8, depth=1, latent_self_attn_depth=1, **options, **extras)
            assert isinstance(contender.network, RIN)
            x = torch.rand(2, *contender.network.shape)
            before = [p.clone() for p in contender.network.parameters()]
            assert machine.seconds(run.train_step(contender, x, machine)) > 0
            assert any(not torch.equal(a, b) for a, b in zip(before, contender.network.parameters(), strict=True))
            assert contender.sample(2, 2).shape == x.shape


def test_baselines_of_prediction_are_exact_for_simple_motion():
    prediction = load("prediction")
    start, step = torch.rand(2, 2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 20
    ramp = start + step * torch.arange(prediction.FRAMES).view(1, 1, -1, 1, 1)
    still = start.expand_as(ramp)
    invented = slice(prediction.GIVEN, None)
    for clips, exact, other in (
        (ramp, "linear extrapolation", "copy of the last frame"),
        (still, "copy of the last frame", None),
    ):
        guesses = prediction.baselines(clips, prediction.GIVEN)
        torch.testing.assert_close(guesses[exact], clips[:, :, invented])
        if other:
            far = step * torch.arange(1, prediction.FRAMES - prediction.GIVEN + 1).view(1, 1, -1, 1, 1)
            found = prediction.errors(guesses[other], clips[:, :, invented])
            torch.testing.assert_close(found["mse"], far.square().mean((1, 2, 3, 4)))
            torch.testing.assert_close(found["mae"], far.abs().mean((1, 2, 3, 4)))


def test_options_of_prediction_make_a_model_that_is_given_frames():
    prediction = load("prediction")
    config = load_config("demo", prediction.OPTIONS)
    assert RIN(config.model).shape == (3, prediction.FRAMES, 32, 32)
    assert config.model.known_mask
    assert config.diffusion.known_frames == [prediction.GIVEN] * 2
