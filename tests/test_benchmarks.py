"""What the benchmarks compute."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from rin_video import RIN, load_config


def load(name: str):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def few_steps():
    return load("few_steps")


def test_frechet_distance_of_known_gaussians(few_steps):
    """Commuting covariances: the distance is that of the means plus that of the standard deviations."""
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


def test_baselines_of_prediction_are_exact_where_they_should_be():
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
