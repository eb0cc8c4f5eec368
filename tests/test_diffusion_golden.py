"""Diffusion formulas and complete sampling runs against the authors' release (tests/golden)."""

import json

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, build, channels_first, load_weights
from torch.testing import assert_close

from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.guidance import Guidance
from rin_video.diffusion.objectives import eps_from_x0, to_x0_eps
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.diffusion.samplers import get_sampler, make_levels
from rin_video.diffusion.schedules import NoiseLevel, make_schedule

FILES = sorted(GOLDEN.glob("diffusion_steps*.npz"))
NETWORK = GOLDEN / "image_rin.npz"  # the weights of the runs in those files
OBJECTIVES = {"eps": "eps", "x": "x0", "v": "v"}
RUNS = {  # by name in the file: sampler, time difference, sampling schedule
    "ddim.td0": ("ddim", 0, None),
    "ddim.td1": ("ddim", 1, None),
    "ddpm.td0": ("ddpm", 0, None),
    "ddpm.td1": ("ddpm", 1, None),
    "ddpm_small.td0": ("ddpm_small", 0, None),
    "ddpm.td0.cosine_infer": ("ddpm", 0, "cosine_simple"),
    "ddim.td0.guided": ("ddim", 0, None),
}

algebra = pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
runs = pytest.mark.parametrize("file", FILES if NETWORK.exists() else [], ids=lambda f: f.stem)


def tensor(arrays, name: str) -> torch.Tensor:
    return torch.from_numpy(arrays[name])


@algebra
@pytest.mark.parametrize("theirs", OBJECTIVES)
@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("truncate", [0, 1])
def test_predictions_become_data_and_noise(file, theirs, clip, truncate):
    arrays = np.load(file)
    x_t, level = tensor(arrays, "x_t"), NoiseLevel.from_gamma(tensor(arrays, "gamma_now"))
    x0, eps = to_x0_eps(OBJECTIVES[theirs], tensor(arrays, "model_out"), x_t, level)
    if clip:
        x0 = x0.clamp(-1, 1)
    if truncate or theirs == "x":  # the release always re-derives the noise of an x prediction
        eps = eps_from_x0(x0, x_t, level)
    name = f"x0eps.{theirs}.clip{clip}.trunc{truncate}"
    assert_close(x0, tensor(arrays, f"{name}.data_pred"), rtol=2e-6, atol=2e-6)
    assert_close(eps, tensor(arrays, f"{name}.noise_pred"), rtol=2e-6, atol=1e-5)


@algebra
@pytest.mark.parametrize("step", ["step", "step_last"])
@pytest.mark.parametrize(("name", "sampler"), [("ddim", "ddim"), ("ddpm_large", "ddpm"), ("ddpm_small", "ddpm_small")])
def test_single_transitions(file, step, name, sampler):
    arrays = np.load(file)
    level, next_level = tensor(arrays, "gamma_now"), tensor(arrays, "gamma_prev")
    if step == "step_last":
        next_level = torch.ones_like(next_level)
    estimates = tensor(arrays, "step.data_pred"), tensor(arrays, "step.noise_pred"), None
    levels = [(NoiseLevel.from_gamma(level), NoiseLevel.from_gamma(next_level))]
    run = get_sampler(sampler)(
        lambda x, level, self_cond: estimates, tensor(arrays, "x_t"), levels, lambda: tensor(arrays, "noise")
    )
    assert_close(next(iter(run)).x, tensor(arrays, f"{step}.{name}"), rtol=2e-6, atol=1e-5)


@algebra
def test_forward_process(file):
    arrays = np.load(file)
    level = make_schedule("sigmoid")(tensor(arrays, "add_noise.t"))
    gamma = tensor(arrays, "add_noise.gamma")
    assert_close(level.gamma, gamma.flatten(), rtol=0, atol=1e-6)
    level = NoiseLevel.from_gamma(gamma)
    x_t = level.alpha * tensor(arrays, "model_out") + level.sigma * tensor(arrays, "noise")
    assert_close(x_t, tensor(arrays, "add_noise.x_noised"), rtol=1e-6, atol=1e-6)


def golden_diffusion(info: dict) -> GaussianDiffusion:
    network = np.load(NETWORK)
    model = build(json.loads(str(network["config_json"])))
    load_weights(model, network)
    name, numbers = info["schedule"].split("@")
    kwargs = dict(zip(("start", "end", "tau"), map(float, numbers.split(",")), strict=True))
    return GaussianDiffusion(model, noise_schedule={"name": name, **kwargs}, objective="eps")


@runs
@pytest.mark.parametrize(("run", "batched"), [*[(run, True) for run in RUNS], ("ddim.td0.guided", False)])
@torch.no_grad()
def test_complete_runs(file, run, batched):
    arrays = np.load(file)
    info = json.loads(str(arrays["info_json"]))
    diffusion = golden_diffusion(info)
    sampler, td, schedule = RUNS[run]
    schedule = diffusion.schedule if schedule is None else make_schedule(schedule)
    noise = map(channels_first, arrays["gen.step_noise"])
    guidance = info["guidance_scale"] if "guided" in run else 0.0
    denoise = diffusion.denoiser(Conditions(tensor(arrays, "gen.labels")), Guidance(guidance, batched=batched))
    levels = make_levels(schedule, info["steps"], time_difference=td, dtype=torch.float32)  # as in the release
    steps = get_sampler(sampler)(denoise, channels_first(arrays["gen.init_noise"]), levels, lambda: next(noise))
    worst = 0.0
    for i, ((level, next_level), step) in enumerate(zip(levels, steps, strict=True)):
        assert level.gamma == pytest.approx(float(arrays[f"gen.{run}.gamma_each"][i]), abs=1e-6)
        assert next_level.gamma == pytest.approx(float(arrays[f"gen.{run}.gamma_prev_each"][i]), abs=1e-6)
        for name, ours in (("x0_each", step.x0), ("sample_each", step.x)):
            theirs = channels_first(arrays[f"gen.{run}.{name}"][i])
            worst = max(worst, float((ours - theirs).abs().max()))
        assert_close(step.self_cond["latents"], tensor(arrays, f"gen.{run}.latent_each")[i], rtol=0, atol=5e-4)
    final = float((step.x0 - channels_first(arrays[f"gen.{run}.final"])).abs().max())
    print(f"{run}: trajectory {worst:.1e}, result {final:.1e}")  # noqa: T201
    assert worst < 5e-4
    assert final < 5e-4


@runs
@torch.no_grad()
def test_hidden_states_of_the_first_pass(file):
    arrays = np.load(file)
    diffusion = golden_diffusion(json.loads(str(arrays["info_json"])))
    level = NoiseLevel.from_gamma(tensor(arrays, "selfcond.gamma"))
    _, latents = diffusion.predict(
        channels_first(arrays["selfcond.x_noised"]), level, Conditions(tensor(arrays, "gen.labels")), None
    )
    theirs = tensor(arrays, "selfcond.latent")  # the rate keeps the state of the first of two samples
    assert_close(latents[:1], theirs[:1], rtol=0, atol=5e-4)
    assert (theirs[1:] == 0).all()
