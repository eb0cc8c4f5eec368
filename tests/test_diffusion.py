"""The loss and the samplers against closed forms; regression tests for known bugs of other ports ("traps")."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.config_files import load_config
from rin_video.diffusion.noise import NoiseSource
from rin_video.diffusion.objectives import OBJECTIVES, target, to_x0_eps
from rin_video.diffusion.schedules import NoiseLevel
from rin_video.tensors import map_tensors

SHAPES = {1: (64,), 2: (2, 32), 3: (2, 4, 8), 4: (1, 4, 4, 4)}  # (C, *grid) of rank 1 to 4
TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2}


class Gaussian(nn.Module):
    """The exact denoiser of data N(0, std^2), for any shape; its self-conditioning state counts its calls."""

    def __init__(self, std: float, objective: str) -> None:
        super().__init__()
        self.std, self.objective = std, objective

    def forward(self, x: Tensor, gamma: Tensor, *, latents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        gamma = gamma.view(-1, *[1] * (x.ndim - 1)).double()
        alpha, sigma, variance = gamma.sqrt(), (1 - gamma).sqrt(), self.std**2
        x0 = alpha * variance / (gamma * variance + 1 - gamma) * x
        eps = (x - alpha * x0) / sigma
        calls = torch.zeros(len(x)) if latents is None else latents
        return target(self.objective, x0, eps, NoiseLevel(gamma, alpha, sigma)).to(x.dtype), calls + 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_invert(objective):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    level = NoiseLevel.from_gamma(torch.tensor([0.01, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64).view(-1, 1, 1))
    x_t = level.alpha * x0 + level.sigma * eps
    again = to_x0_eps(objective, target(objective, x0, eps, level), x_t, level)
    assert_close(again, (x0, eps))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_the_exact_denoiser_is_its_bayes_error(objective):
    """For N(0, s^2) the error of x0 is s^2 (1 - gamma) / (gamma s^2 + 1 - gamma); eps and v follow from it."""
    std = 0.5
    diffusion = GaussianDiffusion(Gaussian(std, objective), objective=objective, train_prob_self_cond=0.9)
    torch.manual_seed(0)
    x = torch.randn(20_000, 16) * std / 2 + 0.5  # data in [0, 1]
    loss, t, _ = diffusion(x, per_sample=True)
    gamma = diffusion.schedule(t.double()).gamma
    error = std**2 * (1 - gamma) / (gamma * std**2 + 1 - gamma)
    snr = gamma / (1 - gamma)
    weight = {"x0": 1, "eps": snr, "v": snr + 1, "velocity": (snr**0.5 + 1) ** 2}[objective]
    assert_close((loss.double() / (error * weight)).mean(), torch.tensor(1.0, dtype=torch.float64), rtol=0.01, atol=0)


class Recorder(nn.Module):
    """A model that predicts zero, returns ones as self-conditioning state, and records its inputs."""

    def __init__(self, x0: bool = False) -> None:
        super().__init__()
        self.calls: list[dict] = []
        self.x0_self_conditioning = x0

    def forward(self, x, gamma, **inputs):
        self.calls.append({"x": x, "gamma": gamma, **inputs})
        return torch.zeros_like(x), (torch.ones(len(x), 3), torch.ones(len(x), 2, 2))


def test_self_conditioning_is_drawn_for_each_sample():
    """Trap 8: one draw for the batch. The first pass includes all samples; a tenth of them drop its result."""
    model = Recorder(x0=True)
    GaussianDiffusion(model, objective="x0")(torch.rand(5000, 2))
    first, second = model.calls
    assert len(first["x"]) == 5000
    assert "latents" not in first
    kept = second["latents"][0][:, 0]
    assert set(kept.tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(0.9, abs=0.02)
    assert (second["latents"][1].flatten(1).mean(1) == kept).all()  # one draw for the complete state of a sample
    assert second["x0"].shape == (5000, 2)


def test_no_first_pass_without_self_conditioning():
    model = Recorder()
    GaussianDiffusion(model, train_prob_self_cond=0)(torch.rand(4, 2))
    assert len(model.calls) == 1


def test_the_model_gets_gamma_not_t():
    """Trap 10: therefore a model can be sampled with another schedule than it was trained with."""
    model = Recorder()
    diffusion = GaussianDiffusion(model, noise_schedule="cosine")
    diffusion.sample(batch_size=2, shape=(3,), steps=4, schedule="linear")
    gammas = torch.stack([call["gamma"] for call in model.calls])
    assert_close(gammas, torch.tensor([1e-9, 0.25, 0.5, 0.75])[:, None].expand(4, 2))


def test_scale_is_applied_in_training_and_in_sampling():
    """Trap 6. With data of std b the noisy input is divided by its own std, and the result by b."""
    model = Recorder()
    diffusion = GaussianDiffusion(model, scale=0.3, objective="x0", train_prob_self_cond=0)
    loss, *_ = diffusion(
        torch.ones(64, 500), per_sample=True
    )  # 1 everywhere in diffusion range; the model predicts zero
    assert_close(loss, torch.full((64,), 0.09))
    samples = diffusion.sample(batch_size=8, shape=(500,), steps=3)
    assert_close(samples, torch.full((8, 500), 0.5))
    for call in model.calls:
        assert_close(call["x"].std(1), torch.ones(len(call["x"])))


def test_label_dropout_is_drawn_for_each_sample():
    model = Recorder()
    GaussianDiffusion(model, label_dropout=0.2, train_prob_self_cond=0)(torch.rand(5000, 2), torch.full((5000,), 3))
    label = model.calls[0]["label"]
    assert set(label.tolist()) == {-1, 3}
    assert (label == -1).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_uint8_and_float_are_the_same_data():
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    diffusion = GaussianDiffusion(Recorder(), objective="x0")
    losses = []
    for data in (x, x / 255):
        torch.manual_seed(0)
        losses.append(diffusion(data))
    assert_close(losses[0], losses[1])


def test_every_parameter_learns_under_bf16_autocast_with_self_conditioning():
    """Trap 1: weight casts that a pass without gradient caches must not be used by the pass that trains."""
    torch.manual_seed(0)
    model = RIN(**TINY, image_size=8, patch_size=4, num_classes=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    diffusion = GaussianDiffusion(model, train_prob_self_cond=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = diffusion(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_loss_leaves_gradients_alone():
    """Trap 4: accumulation over two halves equals the complete batch."""
    model = nn.Linear(4, 4)

    class Contract(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = model

        def forward(self, x, gamma, latents=None):
            return self.linear(x), None

    diffusion = GaussianDiffusion(Contract(), train_prob_self_cond=0)
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        diffusion(torch.rand(4, 4)).backward()
        grads.append(model.weight.grad.clone())
    assert_close(grads[1], 2 * grads[0])


def test_sample_i_does_not_depend_on_the_batch():
    torch.manual_seed(1)
    diffusion = GaussianDiffusion(RIN(**TINY, image_size=8, patch_size=4))
    options = {"steps": 3, "sampler": "ddpm", "seed": 5}
    whole = diffusion.sample(batch_size=7, **options)
    assert_close(diffusion.sample(batch_size=3, **options), whole[:3], rtol=0, atol=1e-5)
    assert_close(diffusion.sample(batch_size=1, **options), whole[:1], rtol=0, atol=1e-5)
    assert_close(diffusion.sample(batch_size=7, max_batch=3, **options), whole, rtol=0, atol=1e-5)
    noise = NoiseSource(5, range(7), (3, 8, 8), torch.device("cpu"))()
    assert_close(NoiseSource(5, [6], (3, 8, 8), torch.device("cpu"))()[0], noise[6], rtol=0, atol=0)
    assert not torch.equal(diffusion.sample(batch_size=1, steps=3, seed=6), whole[:1])


def test_sampling_leaves_the_mode_and_the_random_state_alone():
    diffusion = GaussianDiffusion(RIN(**TINY, image_size=8, patch_size=4)).train()
    state = torch.get_rng_state()
    diffusion.sample(batch_size=1, steps=1, seed=0)
    assert diffusion.training
    assert torch.equal(torch.get_rng_state(), state)


def test_timesteps_are_the_default_of_the_sampling_steps(tmp_path):
    """This is as in the port. They had no effect above 50."""
    for timesteps, options, calls in ((60, {}, 60), (60, {"steps": 7}, 7), (None, {}, 50), (3, {}, 3)):
        model = Recorder()
        GaussianDiffusion(model, timesteps=timesteps).sample(batch_size=1, shape=(2,), **options)
        assert len(model.calls) == calls
    diffusion = GaussianDiffusion(RIN(**TINY, image_size=8, patch_size=4), timesteps=60)
    diffusion.save_pretrained(tmp_path)
    assert load_config(tmp_path / "config.yaml").sample.steps == 60  # which `rin-video sample` uses


def test_code_for_the_pytorch_port_works():
    """A small version of `RIN(dim=256, image_size=128, ...)` takes images in [0, 1] and returns (4, 3, H, W)."""
    model = RIN(dim=32, image_size=32, patch_size=8, depth=2, num_latents=8, dim_latent=64, latent_self_attn_depth=2)
    diffusion = GaussianDiffusion(model, timesteps=4, train_prob_self_cond=0.9, scale=1.0)
    loss = diffusion(torch.rand(4, 3, 32, 32))
    loss.backward()
    assert loss.ndim == 0
    sampled = diffusion.sample(batch_size=4)
    assert sampled.shape == (4, 3, 32, 32)
    video = RIN(dim=32, image_size=16, frames=4, patch_size=(2, 8, 8), depth=1, num_latents=8, dim_latent=32)
    assert GaussianDiffusion(video, timesteps=2).sample(batch_size=2).shape == (2, 3, 4, 16, 16)


def test_mistakes_are_named():
    model = Recorder()
    with pytest.raises(UsageError, match=r"objective=noise is unknown: choose eps, x0, v, velocity"):
        GaussianDiffusion(model, objective="noise")
    with pytest.raises(UsageError, match=r"train_prob_self_cond is 9"):
        GaussianDiffusion(model, train_prob_self_cond=9)
    with pytest.raises(UsageError, match="scale is 0"):
        GaussianDiffusion(model, scale=0)
    with pytest.raises(UsageError, match="the model has no shape"):
        GaussianDiffusion(model).sample(batch_size=2)
    with pytest.raises(UsageError, match=r"sample\.sampler=dddim is unknown: choose ddim, euler, ddpm"):
        GaussianDiffusion(model).sample(batch_size=2, shape=(3,), sampler="dddim")
    with pytest.raises(UsageError, match="steps is -1"):
        GaussianDiffusion(model).sample(batch_size=2, shape=(3,), steps=-1)


def test_map_tensors_keeps_the_form():
    value = {"a": torch.ones(2), "b": (torch.ones(1), [None, 3])}
    doubled = map_tensors(lambda x: 2 * x, value)
    assert doubled["a"].tolist() == [2, 2]
    assert doubled["b"][0].tolist() == [2]
    assert doubled["b"][1] == [None, 3]


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_carried_estimate_is_in_the_range_of_the_data(scale):
    """Trap 6: x0 self-conditioning uses the predicted x0, not the normalised input, and without the scale."""

    class Exact(Recorder):
        """A model that predicts data of 0.5 everywhere (in the scaled problem) and records its inputs."""

        def forward(self, x, gamma, **inputs):
            super().forward(x, gamma, **inputs)
            return torch.full_like(x, 0.5 * scale), torch.zeros(len(x), 1)

    model = Exact(x0=True)
    diffusion = GaussianDiffusion(model, objective="x0", scale=scale, train_prob_self_cond=1.0)
    diffusion(torch.rand(3, 2, 4))
    diffusion.sample(batch_size=2, shape=(2, 4), steps=3)
    carried = [call["x0"] for call in model.calls if "x0" in call]
    assert len(carried) == 3  # the second pass of training, and two of three sampling steps
    for x0 in carried:
        assert_close(x0, torch.full_like(x0, 0.5))


def test_no_first_pass_without_a_self_conditioning_state():
    model = Recorder()
    model.self_conditioning = False
    GaussianDiffusion(model)(torch.rand(4, 2))
    assert len(model.calls) == 1
    assert not RIN(**TINY, image_size=8, self_conditioning="none").self_conditioning
