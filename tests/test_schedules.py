"""Noise schedules against those of the release, in double precision."""

import json

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from torch.testing import assert_close

from rin_video.diffusion.schedules import SCHEDULES, NoiseLevel, make_schedule
from rin_video.errors import UsageError

FILES = sorted(GOLDEN.glob("schedules*.npz"))
NAMES = {"simple_linear": "linear", "cosine_simple": "cosine_simple", "cosine": "cosine", "sigmoid": "sigmoid"}


def ours(name: str):
    """Return our schedule for a name in the file, such as `cosine_0.2_1_2`."""
    if name in NAMES:
        return make_schedule(NAMES[name])
    kind, *numbers = name.split("_")
    return make_schedule(NAMES[kind], dict(zip(("start", "end", "tau"), map(float, numbers), strict=True)))


CASES = [(file, name) for file in FILES for name in json.loads(str(np.load(file)["spec_json"]))]


@pytest.mark.parametrize(("file", "name"), CASES, ids=lambda v: v if isinstance(v, str) else v.stem)
def test_schedule_is_the_release_s(file, name):
    arrays = np.load(file)
    t = torch.from_numpy(arrays["t"])
    assert_close(ours(name)(t).gamma, torch.from_numpy(arrays[f"f64.{name}"]), rtol=0, atol=1e-12)
    single = ours(name)(t.float()).gamma
    finite = np.isfinite(arrays[f"f32.{name}"])  # the release gives NaN at one end of some schedules, ours do not
    assert single.isfinite().all()
    assert_close(single[finite], torch.from_numpy(arrays[f"f32.{name}"])[finite], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_lie_on_their_path(name):
    level = make_schedule(name)(torch.linspace(0, 0.999, 101, dtype=torch.float64))
    assert (level.gamma.diff() < 0).all()
    assert level.power == (1 if name == "rectified_flow" else 2)
    assert_close(level.alpha**level.power + level.sigma**level.power, torch.ones(101, dtype=torch.float64))
    again = NoiseLevel.from_edm_sigma(level.edm_sigma, level.power)
    assert_close(torch.stack(again[:3]), torch.stack(level[:3]))


def test_unknown_names_and_parameters_are_named():
    with pytest.raises(UsageError, match=r"'cosin': choose .*cosine"):
        make_schedule("cosin")
    with pytest.raises(UsageError, match="no parameter stop: it has start, end, tau"):
        make_schedule("sigmoid", {"stop": 1})
    with pytest.raises(UsageError, match="does not decrease"):
        make_schedule("sigmoid", {"start": 1, "end": 1})
