"""Samplers against a denoiser with a known score: order of convergence, churn, spacings, guidance, thresholds."""

import math
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from tiny_run import TINY
from torch import Tensor, nn
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.config import DiffusionConfig, SampleConfig
from rin_video.diffusion import sampling
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.guidance import Guidance
from rin_video.diffusion.noise import RNG
from rin_video.diffusion.objectives import (
    LOSS_WEIGHTS,
    OBJECTIVES,
    clip_dynamic,
    logit_normal_time,
    low_discrepancy_time,
    make_loss_weight,
    target,
    to_x0_eps,
)
from rin_video.diffusion.samplers import SAMPLERS, SPACINGS, get_sampler, initial_state, make_levels
from rin_video.diffusion.schedules import NoiseLevel, make_schedule


class MixedDataset(nn.Module):
    """The exact denoiser of two Gaussians with means -1/2 and 1/2 (in every coordinate) and std 0.3."""

    std, place = 0.3, 0.5

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = alpha**2 * self.std**2 + sigma**2
        logit = (2 * alpha * self.place * x / variance).flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1))
        mean = self.place * torch.tanh(logit / 2)
        return mean + alpha * self.std**2 / variance * (x - alpha * mean)


def denoise(x: Tensor, level: NoiseLevel, self_cond) -> tuple[Tensor, Tensor, None]:
    x0 = MixedDataset().x0(x, level.alpha, level.sigma)
    return x0, (x - level.alpha * x0) / level.sigma, None


def run(sampler: str, schedule: str, steps: int, x: Tensor, spacing: str = "uniform", **options) -> Tensor:
    levels = make_levels(make_schedule(schedule), steps, spacing=spacing)
    *_, last = get_sampler(sampler, options)(denoise, x, levels, lambda: torch.randn_like(x))
    return last.x


STEPS = [10, 20, 40, 80, 160]
ORDERS = {
    ("ddim", "uniform"): 1,
    ("ddim", "karras"): 1,
    ("heun", "uniform"): 2,
    ("heun", "karras"): 2,
    ("dpmpp_2m", "karras"): 2,
    ("dpmpp_3m", "karras"): 3,
}


@cache
def converged(schedule: str, spacing: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Noise, and the result of 2,000 Heun steps from it."""
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, run("heun", schedule, 2000, x, spacing)


@pytest.mark.parametrize("shape", [(1,), (2, 3, 2, 2)], ids=["rank 1", "rank 4"])
@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
@pytest.mark.parametrize(("sampler", "spacing"), ORDERS)
def test_order_of_convergence(sampler, spacing, schedule, shape):
    """The error against 2,000 Heun steps decreases with the order of the method."""
    x, reference = converged(schedule, spacing, shape)
    errors = [float((run(sampler, schedule, steps, x, spacing) - reference).abs().mean()) for steps in STEPS]
    logs = torch.tensor(STEPS).double().log(), torch.tensor(errors).double().log()
    slope = float(torch.linalg.lstsq(torch.stack([logs[0], torch.ones(5)], 1), logs[1]).solution[0])
    print(f"{sampler} {spacing} {schedule} {shape}: slope {slope:.2f}")  # noqa: T201
    assert slope == pytest.approx(-ORDERS[sampler, spacing], abs=0.3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_on_every_spacing_finds_the_mixture(sampler, spacing):
    """Half of the samples are near each mean, with the right std; 150 steps, 4,000 samples."""
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(1)
    samples = run(sampler, "cosine", 150, x, spacing)
    share = (samples.mean(1) > 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=0.03)
    expected = math.sqrt(MixedDataset.std**2 + MixedDataset.place**2)
    assert samples.square().mean().sqrt().item() == pytest.approx(expected, rel=0.04)


# Numbers of steps for which the last x0 of the exact denoiser is within 1 % of the data: the remaining error is that
# of the steps, which decreases with their number.
ENOUGH = {
    "ddim": (800, 400, 400, 400),
    "euler": (800, 400, 400, 400),
    "ddpm": (800, 400, 800, 800),
    "ddpm_small": (1800, 800, 800, 800),
    "dpmpp_2m": (100, 100, 50, 50),
    "dpmpp_2m_sde": (800, 100, 100, 50),
    "dpmpp_3m": (200, 100, 50, 25),
    "heun": (110, 25, 50, 50),
}


def exact_gaussian(sampler: str, path: str, spacing: str, scale: float, steps: int) -> tuple[float, float]:
    """Return mean and std of the samples for data N(0.1, 0.5^2), without sampling.

    The exact denoiser and every sampler are affine: a state is represented by its constant and its weights of the
    independent draws of noise. Nothing is random.
    """
    mean, std, draws = 0.1 * scale, 0.5 * scale, iter(torch.eye(steps + 2, dtype=torch.float64)[1:])
    constant = torch.zeros(steps + 2, dtype=torch.float64)
    constant[0] = mean

    def denoise(x, level, self_cond):
        gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
        x0 = constant + gain * (x - level.alpha * constant)
        return x0, (x - level.alpha * x0) / level.sigma, None

    def noise():
        return next(draws)

    levels = make_levels(make_schedule(path), steps, spacing=spacing, scale=scale)
    *_, last = get_sampler(sampler)(denoise, initial_state(levels, noise), levels, noise)
    return last.x0[0].item() / scale, last.x0[1:].norm().item() / scale


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_finds_a_gaussian_on_every_spacing_path_and_scale(sampler, spacing):
    """The first level of the straight path is not pure noise; starting with pure noise gave a std 6 % too large."""
    steps = ENOUGH[sampler][SPACINGS.index(spacing)]
    for path in ("cosine", "rectified_flow"):
        for scale in (1.0, 0.4, 0.2):
            mean, std = exact_gaussian(sampler, path, spacing, scale, steps)
            assert abs(mean - 0.1) < 0.01 * 0.5, (path, scale)
            assert std == pytest.approx(0.5, rel=0.01), (path, scale)


def test_sampling_begins_with_the_first_level():
    """On the straight path with scale 0.2, Karras spacing starts at sigma / alpha = 16, which is 0.941 of noise."""

    class First(nn.Module):
        def forward(self, x, gamma, latents=None):
            self.std = getattr(self, "std", x.std().item())
            return torch.zeros_like(x), None

    diffusion = GaussianDiffusion(First(), noise_schedule="rectified_flow")
    for spacing in SPACINGS:
        diffusion.model.__dict__.pop("std", None)
        levels = make_levels(diffusion.schedule, 2, spacing=spacing)
        diffusion.sample(batch_size=4, shape=(20_000,), steps=2, sampler="heun", spacing=spacing, seed=0)
        assert diffusion.model.std == pytest.approx(levels[0][0].sigma, rel=5e-3)
    assert make_levels(diffusion.schedule, 2, spacing="karras", scale=0.2)[0][0].sigma == pytest.approx(16 / 17)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_take_any_rank(sampler):
    """The numbers are the same in any shape, and every call gets the self-conditioning state of the previous one."""

    def self_cond_state(x, level, self_cond):
        return 0.5 * x, (x - level.alpha * 0.5 * x) / level.sigma, 0 if self_cond is None else self_cond + 1

    results = []
    for shape in ((64,), (2, 32), (2, 4, 8), (4, 4, 2, 2)):
        generator = torch.Generator().manual_seed(0)
        draws = iter(torch.randn(8, 64, generator=generator, dtype=torch.float64))
        levels = make_levels(make_schedule("cosine"), 6)
        *_, last = get_sampler(sampler)(
            self_cond_state, next(draws).view(shape), levels, lambda d=draws, s=shape: next(d).view(s)
        )
        results.append(last.x.flatten())
        assert last.self_cond == (2 * 6 - 2 if sampler == "heun" else 6 - 1)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("options", [("heun", {"churn": 20.0}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5})])
@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
def test_noise_put_back_keeps_the_distribution(options, schedule):
    sampler, kwargs = options
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(1)
    samples = run(sampler, schedule, 150, x, **kwargs)
    still = run(sampler, schedule, 150, x)
    assert (samples - still).abs().mean() > 0.05  # it is a different sample
    expected = math.sqrt(MixedDataset.std**2 + MixedDataset.place**2)
    assert samples.square().mean().sqrt().item() == pytest.approx(expected, rel=0.04)


def test_ddim_with_full_noise_is_ddpm_with_the_small_variance():
    x = torch.randn(50, 3, dtype=torch.float64)
    results = []
    for sampler, options in (("ddim", {"eta": 1.0}), ("ddpm_small", {})):
        torch.manual_seed(0)
        results.append(run(sampler, "cosine", 20, x, **options))
    assert_close(results[0], results[1])


def test_heun_on_the_straight_path_is_heun_in_time():
    """For rectified flow the general form is the textbook form, dx/dt = eps - x0."""
    x = expected = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = make_levels(make_schedule("rectified_flow"), 12)
    for level, next_level in levels:
        x0, eps, _ = denoise(expected, level, None)
        slope, h = eps - x0, next_level.sigma - level.sigma
        euler = expected + h * slope
        if next_level.sigma:
            x0, eps, _ = denoise(euler, next_level, None)
            slope = (slope + eps - x0) / 2
        expected = expected + h * slope
    assert_close(run("heun", "rectified_flow", 12, x), expected, rtol=1e-4, atol=1e-4)  # t = 1 is shifted by 3e-5


@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_fall_from_noise_to_data(spacing):
    levels = make_levels(make_schedule("cosine"), 9, spacing=spacing)
    assert len(levels) == 9
    gammas = [level.gamma for level, _ in levels] + [levels[-1][1].gamma]
    assert gammas == sorted(gammas)
    assert gammas[0] < 1e-3
    assert gammas[-1] == 1
    assert all(next_level == level for (_, next_level), (level, _) in pairwise(levels))
    assert all(isinstance(value, float) for pair in levels for level in pair for value in level[:3])


def test_karras_spacing_is_edm_s():
    """Karras et al. 2022, eq. 5, with rho = 7 from 80 to 0.002."""
    ratios = [level.edm_sigma for level, _ in make_levels(make_schedule("cosine"), 5, spacing="karras")]
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    assert ratios[:4] == pytest.approx(expected[:4])
    assert ratios[4] >= 0.002


def test_time_difference_reaches_further():
    schedule = make_schedule("sigmoid")
    plain, further = make_levels(schedule, 8), make_levels(schedule, 8, time_difference=1)
    assert [level for level, _ in plain] == [level for level, _ in further]
    assert [next_level for _, next_level in further[:-1]] == [next_level for _, next_level in plain[1:]]


# ---- guidance, clipping


class Labelled(nn.Module):
    """A model that predicts its label; its state counts the calls and their samples."""

    def forward(self, x, gamma, latents=None, label=None):
        seen = torch.zeros(len(x)) if latents is None else latents
        self.batch = len(x)
        return torch.ones_like(x) * label.view(-1, 1) + 0.1 * x, seen + label.view(-1) + 2


def test_guidance_batched_and_in_two_passes_are_the_same():
    diffusion = GaussianDiffusion(Labelled(), objective="eps", clip_x0="none")
    x, label = torch.randn(3, 4), torch.tensor([1, 2, 3])
    level = NoiseLevel.from_gamma(0.5)
    results = []
    for batched in (True, False):
        denoise = diffusion.denoiser(Conditions(label), Guidance(2.0, batched=batched))
        _, _, self_cond = denoise(x, level, None)
        results.append(denoise(x, level, self_cond))
        assert diffusion.model.batch == (6 if batched else 3)
    assert_close(results[0], results[1])
    assert_close(results[0][2]["latents"], 2 * (label + 2.0))  # of the labelled branch alone
    prediction = 3 * (label.view(-1, 1) + 0.1 * x) - 2 * (-1 + 0.1 * x)
    assert_close(results[0][1], prediction, rtol=1e-4, atol=1e-4)


def test_guidance_interval_and_rescale():
    diffusion = GaussianDiffusion(Labelled(), objective="eps", clip_x0="none")
    x, label, level = torch.randn(3, 400), torch.tensor([1, 2, 3]), NoiseLevel.from_gamma(0.5)
    plain = diffusion.denoiser(Conditions(label))(x, level, None)
    outside = diffusion.denoiser(Conditions(label), Guidance(2.0, interval=(0.6, 1)))(x, level, None)
    assert_close(outside, plain)
    rescaled = diffusion.denoiser(Conditions(label), Guidance(2.0, rescale=1.0))(x, level, None)
    assert_close(rescaled[1].std(1), plain[1].std(1), rtol=1e-4, atol=1e-4)


def test_dynamic_threshold():
    x0 = torch.linspace(-3, 3, 1001).repeat(2, 1)
    x0[1] /= 6
    clipped = clip_dynamic(x0, 1.0, quantile=0.9)
    assert clipped[0].abs().max().item() == pytest.approx(1)
    assert (clipped[0].abs() >= 0.999).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert_close(clipped[1], x0[1])  # already within the range


# ---- training


@pytest.mark.parametrize(
    ("objective", "snr", "expected"),
    [
        # computed by hand for gamma = 5: min(snr, 5) divided by 1, snr, snr + 1, (sqrt(snr) + 1)^2
        ("x0", 0.1, 0.1), ("x0", 5.0, 5.0), ("x0", 100.0, 5.0),
        ("eps", 0.1, 1.0), ("eps", 5.0, 1.0), ("eps", 100.0, 0.05),
        ("v", 0.1, 1 / 11), ("v", 5.0, 5 / 6), ("v", 100.0, 5 / 101),
        ("velocity", 0.1, 0.0577215), ("velocity", 5.0, 0.4774575), ("velocity", 100.0, 5 / 121),
    ],
)  # fmt: skip
def test_min_snr_by_hand(objective, snr, expected):
    """Trap 9: the weight is a minimum, and for v it is divided by snr + 1."""
    weight = make_loss_weight("min_snr", objective)(NoiseLevel.from_gamma(torch.tensor(snr / (1 + snr)).double()))
    assert weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
def test_weighted_loss_is_the_same_whatever_the_objective(name, schedule):
    """The same error of x0 has the same loss for every objective."""
    generator = torch.Generator().manual_seed(0)
    x0, wrong, eps = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        level = make_schedule(schedule)(torch.tensor(t, dtype=torch.float64))
        x_t = level.alpha * x0 + level.sigma * eps
        costs = []
        for objective in OBJECTIVES:
            said = target(objective, wrong, (x_t - level.alpha * wrong) / level.sigma, level)
            error = (said - target(objective, x0, eps, level)) ** 2
            costs.append((make_loss_weight(name, objective)(level) * error).mean())
        if schedule == "rectified_flow":
            costs.pop(
                OBJECTIVES.index("v")
            )  # v assumes constant variance; on the straight path it is a different combination
        assert_close(torch.stack(costs), costs[0].expand(len(costs)))


def test_p2_and_sigmoid_by_hand():
    level = NoiseLevel.from_gamma(torch.tensor(0.8, dtype=torch.float64))  # snr 4
    assert make_loss_weight("p2", "eps")(level).item() == pytest.approx(1 / 5)
    assert make_loss_weight("sigmoid", "eps", {"bias": 1.0})(level).item() == pytest.approx(
        1 / (1 + math.exp(math.log(4) - 1))
    )


def test_power_weight_lies_between_x0_and_v():
    level = NoiseLevel.from_gamma(torch.tensor(0.8, dtype=torch.float64))  # snr 4
    for objective, at_x0, between, at_v in (("x0", 1, 5**0.5, 5), ("v", 1 / 5, 5**-0.5, 1)):
        weights = [make_loss_weight("power", objective, {"power": power})(level).item() for power in (0, 0.5, 1)]
        assert weights == pytest.approx([at_x0, between, at_v])
    clean = NoiseLevel.from_gamma(torch.tensor(0.99, dtype=torch.float64))  # snr 99, limited
    assert make_loss_weight("power", "x0", {"limit": 9})(clean).item() == pytest.approx(3)


def test_logit_normal_times():
    torch.manual_seed(0)
    t = logit_normal_time(RNG(100_000, torch.device("cpu")), mean=-0.5, std=0.7)
    n = torch.logit(t)
    assert n.mean().item() == pytest.approx(-0.5, abs=0.01)
    assert n.std().item() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("power", {"limit": 0}, "limit is 0: it must be a number above 0"),
        ("power", {"power": -1}, "power is -1: it must be a number, at least 0"),
        ("min_snr", {"gamma": math.nan}, "gamma is nan: it must be a number above 0"),
        ("sigmoid", {"bias": "a"}, "bias is 'a': it must be a number"),
    ],
)
def test_parameters_of_loss_weights_are_checked(name, options, words):
    with pytest.raises(UsageError, match=f"diffusion.loss_weight.{words}"):
        make_loss_weight(name, "x0", options)


def test_low_discrepancy_times_are_uniform_and_equally_far_apart():
    torch.manual_seed(0)
    batches = torch.stack([low_discrepancy_time(RNG(8, torch.device("cpu"))) for _ in range(4000)])
    assert_close(batches.sort(dim=1).values.diff(dim=1), torch.full((4000, 7), 1 / 8), rtol=0, atol=1e-6)
    for column in batches.T:  # each sample's own time is uniform
        counts = column.histc(10, 0, 1)
        assert ((counts - 400).abs() < 5 * 400**0.5).all()


class ScaledGaussian(nn.Module):
    """The exact v of data N(0, (b std)^2), for an input that is divided by its own standard deviation."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x, gamma, latents=None):
        gamma = gamma.view(-1, 1).double()
        x_t = x * (gamma * self.std**2 + 1 - gamma) ** 0.5
        level = NoiseLevel.from_gamma(gamma)
        x0 = level.alpha * self.std**2 / (gamma * self.std**2 + 1 - gamma) * x_t
        eps = (x_t - level.alpha * x0) / level.sigma
        return target("v", x0, eps, level).to(x.dtype), None


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_scaled_data_are_sampled_without_bias(scale):
    """Trap 6: training and sampling both use b and the normalised input, and the result is divided by b."""
    std = 0.25
    model = ScaledGaussian(std * scale)
    if scale == 1:  # the input is not normalised in this case: normalise it for the model

        class Plain(nn.Module):
            def forward(self, x, gamma, latents=None):
                return model(x / (gamma.view(-1, 1) * std**2 + 1 - gamma.view(-1, 1)) ** 0.5, gamma)

        diffusion = GaussianDiffusion(Plain(), scale=scale, noise_schedule="cosine", clip_x0="none")
    else:
        diffusion = GaussianDiffusion(model, scale=scale, noise_schedule="cosine", clip_x0="none")
    samples = diffusion.sample(batch_size=50, shape=(4000,), steps=50, seed=0, sampler="heun", spacing="karras")
    inside = 2 * samples.double() - 1
    assert inside.std().item() == pytest.approx(std, rel=0.02)
    assert inside.mean().item() == pytest.approx(0, abs=0.01)
    torch.manual_seed(0)
    x = torch.randn(200, 4000) * std / 2 + 0.5
    loss, t, _ = diffusion(x, per_sample=True)
    gamma, variance = diffusion.schedule(t.double()).gamma, (std * scale) ** 2
    assert_close(loss.double(), variance / (gamma * variance + 1 - gamma), rtol=0.2, atol=1e-3)
    assert (loss.double() / (variance / (gamma * variance + 1 - gamma))).mean().item() == pytest.approx(1, abs=0.01)


def test_first_pass_comes_from_a_noisier_level():
    """Trap 12: with a gap, the state comes from t + U(0, gap) with the same noise, as in the sampler."""
    calls = []

    class Seen(nn.Module):
        def forward(self, x, gamma, latents=None):
            calls.append((x, gamma))
            return torch.zeros_like(x), torch.zeros(len(x), 1)

    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Seen(), noise_schedule="linear", self_cond_gap=0.1)
    diffusion.loss_at(torch.full((2000, 3), 0.75), torch.full((2000,), 0.5))
    gamma_first, gamma_main = (gamma for _, gamma in calls)
    assert_close(gamma_main, torch.full((2000,), 0.5))
    gaps = gamma_main - gamma_first  # t is 1 - gamma
    assert gaps.min() >= 0
    assert gaps.max() <= 0.1 + 1e-6
    assert gaps.mean().item() == pytest.approx(0.05, abs=0.003)
    eps = [(x - gamma.sqrt()[:, None] * 0.5) / (1 - gamma).sqrt()[:, None] for x, gamma in calls]
    assert_close(eps[0], eps[1], rtol=1e-4, atol=1e-4)
    calls.clear()
    GaussianDiffusion(Seen())(torch.rand(4, 3))
    assert_close(calls[0], calls[1])


def test_trajectory_and_callback_see_the_estimates():
    diffusion = GaussianDiffusion(ScaledGaussian(0.5), noise_schedule="cosine")
    seen = []
    samples, trajectory = diffusion.sample(
        batch_size=5,
        shape=(16,),
        steps=4,
        seed=0,
        max_batch=2,
        return_trajectory=True,
        callback=lambda i, x0: seen.append((i, x0)),
    )
    assert trajectory.shape == (5, 4, 16)
    assert_close(trajectory[:, -1], samples)
    assert [i for i, _ in seen] == [0, 1, 2, 3] * 3
    assert_close(seen[3][1], samples[:2])
    assert trajectory.min() >= 0
    assert trajectory.max() <= 1


def test_mistakes_are_named():
    diffusion = GaussianDiffusion(ScaledGaussian(0.5))
    for options, message in (
        ({"sampler": {"name": "ddim", "etta": 1}}, r"sampler ddim has no option etta: it has eta"),
        ({"spacing": "log"}, "sample.spacing=log is unknown: choose uniform"),
        ({"spacing": "karras", "time_difference": 1}, r"time_difference is 1"),
        ({"guidance": 1.0}, r"the samples have no label or embedding: pass one$"),
        ({"clip_x0": "hard"}, "sample.clip_x0=hard is unknown"),
    ):
        with pytest.raises(UsageError, match=message):
            diffusion.sample(batch_size=1, shape=(3,), steps=2, **options)
    with pytest.raises(UsageError, match=r"loss_weight=snr is unknown: choose none, min_snr"):
        GaussianDiffusion(ScaledGaussian(0.5), loss_weight="snr")
    with pytest.raises(UsageError, match=r"loss_weight min_snr has no parameter k: it has gamma"):
        GaussianDiffusion(ScaledGaussian(0.5), loss_weight={"name": "min_snr", "k": 1})
    with pytest.raises(UsageError, match="time_sampling=normal is unknown"):
        GaussianDiffusion(ScaledGaussian(0.5), time_sampling="normal")
    with pytest.raises(UsageError, match=r"time_sampling.std is -1: it must be above 0"):
        GaussianDiffusion(ScaledGaussian(0.5), time_sampling={"name": "logit_normal", "std": -1})


def test_the_spacing_suits_the_sampler_unless_it_is_chosen():
    """It is Karras for DPM-Solver++ and Heun, and uniform for others and if a schedule or time difference is set."""
    draw = partial(GaussianDiffusion(ScaledGaussian(0.5)).sample, batch_size=2, shape=(3,), steps=5, seed=0)
    for options, spacing in (
        ({}, "karras"),
        ({"sampler": "heun"}, "karras"),
        ({"sampler": "ddim"}, "uniform"),
        ({"time_difference": 1.0}, "uniform"),
        ({"schedule": "linear"}, "uniform"),
        ({"schedule": {"tau": 0.5}}, "uniform"),
    ):
        other = "uniform" if spacing == "karras" else "quadratic"
        assert torch.equal(draw(**options), draw(**options, spacing=spacing)), options
        assert not torch.equal(draw(**options), draw(**options, spacing=other)), options


def test_another_sampler_than_the_configurations_leaves_its_parameters_out():
    diffusion = GaussianDiffusion(ScaledGaussian(0.5))
    config = SampleConfig(sampler={"name": "ddim", "eta": 0.5}, num_samples=2, steps=4)
    options = {"shape": (3,), "seed": 0}
    found = diffusion.sample(config, sampler="ddpm", **options)
    assert torch.equal(found, diffusion.sample(batch_size=2, steps=4, sampler="ddpm", **options))
    kept = diffusion.sample(config, **options)
    assert torch.equal(kept, diffusion.sample(batch_size=2, steps=4, sampler={"name": "ddim", "eta": 0.5}, **options))


def test_every_option_of_the_configuration_is_read(monkeypatch):
    """Sampling reads all fields of `SampleConfig` except the frame rate of the file, and no other fields."""
    read = set()

    class Recorder:
        def __init__(self, config):
            self.config = config

        def __getattr__(self, name):
            read.add(name)
            return getattr(self.config, name)

    diffusion = GaussianDiffusion(ScaledGaussian(0.5))
    monkeypatch.setattr(sampling.dataclasses, "replace", lambda config, **overrides: Recorder(config))
    diffusion.sample(SampleConfig(num_samples=3), shape=(2,))
    assert read == set(vars(SampleConfig())) - {"fps"}


@pytest.mark.parametrize("name", ["none", *LOSS_WEIGHTS])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("path", ["cosine", "rectified_flow"])
def test_loss_weights_are_finite_from_the_cleanest_to_the_noisiest_level(name, objective, path):
    t = torch.tensor([0.0, 1e-6, 1e-5, 1e-3, 0.5, 1.0])
    weight = make_loss_weight(name, objective)(make_schedule(path)(t))
    assert torch.as_tensor(weight).isfinite().all()
    assert (torch.as_tensor(weight) >= 0).all()


def test_a_weight_is_that_of_the_same_error_whatever_the_objective_and_the_path():
    """The weighted error of eps, v and velocity equals the weighted error of the corresponding x0."""
    for path in ("cosine", "rectified_flow"):
        level = make_schedule(path)(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        x_t, right, wrong = torch.tensor([[0.3, -0.2, 0.9], [0.1, 0.2, -0.4], [0.2, -0.1, 0.3]], dtype=torch.float64)
        for name in LOSS_WEIGHTS:
            wanted = None
            for objective in OBJECTIVES:
                x0, x0_wrong = (to_x0_eps(objective, p, x_t, level)[0] for p in (right, wrong))
                error = make_loss_weight(name, objective)(level) * (right - wrong) ** 2 / (x0 - x0_wrong) ** 2
                wanted = error if wanted is None else wanted
                torch.testing.assert_close(error, wanted)


def test_the_number_of_samples_follows_the_arguments():
    model = RIN(
        **TINY
        | {
            "image_size": 8,
            "frames": 4,
            "patch_size": (2, 4, 4),
            "known_mask": True,
            "num_classes": 3,
            "embedding_dim": 5,
        }
    )
    diffusion = GaussianDiffusion(model, known={"none": 1, "first": 1})
    config = SampleConfig(num_samples=3, steps=1)
    start, embedding = torch.rand(3, 1, 8, 8), torch.rand(2, 1, 5)
    for options, count in (
        ({}, 3),
        ({"num_samples": 2}, 2),
        ({"batch_size": 1}, 1),
        ({"embedding": embedding}, 2),
        ({"label": [0, 1]}, 2),
        ({"label": -1}, 3),
        ({"context": start}, 3),
        ({"context": start.expand(2, -1, -1, -1, -1)}, 2),
    ):
        assert len(diffusion.sample(config, **options)) == count, options
        clips = torch.cat(list(diffusion.rollout(6, config, **options)), dim=2)
        assert clips.shape == (count, 3, 6, 8, 8), options
    for options, words in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_batch": -1}, "max_batch is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_drop": "lable"}, "sample.guidance_drop=lable is unknown: choose label, known"),
    ):
        with pytest.raises(UsageError, match=words):
            diffusion.sample(config, **options)
    with pytest.raises(UsageError, match="a rollout does not take known"):
        next(diffusion.rollout(6, known=start))
    with pytest.raises(UsageError, match="pass a SampleConfig first"):
        diffusion.sample(config=config)


def test_parameters_without_a_name_are_those_of_the_configuration():
    diffusion = GaussianDiffusion(ScaledGaussian(0.5))
    config = SampleConfig(sampler={"name": "ddim"}, num_samples=2, steps=4)
    assert config.sampler == "ddim"
    options = {"shape": (3,), "seed": 0}
    one = diffusion.sample(config, sampler={"eta": 0.5}, **options)
    assert torch.equal(one, diffusion.sample(config, sampler={"name": "ddim", "eta": 0.5}, **options))
    cosine = DiffusionConfig(noise_schedule="cosine")
    given = GaussianDiffusion(ScaledGaussian(0.5), cosine, schedule_kwargs={"tau": 0.5}).config.noise_schedule
    assert given == {"name": "cosine", "tau": 0.5}
