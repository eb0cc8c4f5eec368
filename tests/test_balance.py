"""The balanced loss: every noise level counts the same, with and without known pixels, also over a resume."""

from unittest import mock

import pytest
import torch
from torch.utils.data import TensorDataset

from rin_video import RIN, GaussianDiffusion, Trainer
from rin_video.config import DiffusionConfig, ModelConfig
from rin_video.diffusion import balance
from rin_video.diffusion.balance import LEVELS, LossBalance
from rin_video.diffusion.conditions import Conditions


def test_errors_of_every_kind_become_one():
    """A power law in t, and a factor of 100 between samples with and without known pixels, both disappear."""
    torch.manual_seed(0)
    balance = LossBalance()
    for _ in range(400):
        t = torch.rand(16)
        known = (torch.rand(16) < 0.5).view(-1, 1, 1, 1)
        error = t.exp() * torch.where(known.flatten(), 0.01, 1.0) * (0.5 + torch.rand(16))
        balanced = balance(error, t, known)
    assert balance.means.shape == (2, LEVELS)
    t = torch.linspace(0.02, 0.98, 50)
    for mask, factor in ((False, 1.0), (True, 0.01)):
        balanced = balance.eval()(t.exp() * factor, t, torch.full((50, 1, 1, 1), mask))
        torch.testing.assert_close(balanced, torch.ones(50), rtol=0.3, atol=0)
        assert balanced.mean() == pytest.approx(1, abs=0.07)


def test_the_first_samples_of_a_level_have_its_mean():
    balance = LossBalance()
    balance(torch.tensor([2.0, 4.0, 8.0]), torch.tensor([0.51, 0.52, 0.99]), None)
    assert balance.means[0, LEVELS // 2] == 3
    assert balance.means[0, -1] == 8
    assert balance.means.count_nonzero() == 2
    assert torch.isfinite(balance.eval()(torch.ones(2), torch.tensor([0.0, 1.0]), None)).all()


def test_evaluation_and_bad_samples_do_not_change_the_means():
    balance = LossBalance()
    balance(torch.ones(4), torch.full((4,), 0.3), None)
    before = balance.means.clone()
    balance(torch.tensor([torch.nan, torch.inf]), torch.tensor([0.3, 0.3]), None)
    assert torch.equal(balance.means, before)
    balance.eval()(torch.full((4,), 9.0), torch.full((4,), 0.3), None)
    assert torch.equal(balance.means, before)


def test_processes_share_their_samples():
    """Two processes with half of a batch each have the means of one process with all of it."""
    torch.manual_seed(0)
    error, t, sent = torch.rand(8), torch.rand(8), []
    whole, halves = LossBalance(), [LossBalance(), LossBalance()]
    whole(error, t, None)
    with (
        mock.patch.object(balance.dist, "is_initialized", return_value=True),
        mock.patch.object(balance.dist, "all_reduce", side_effect=lambda sums: sent.append(sums.clone())),
    ):
        for half, part in zip(halves, (slice(4), slice(4, 8)), strict=True):
            half(error[part], t[part], None)
    with (
        mock.patch.object(balance.dist, "is_initialized", return_value=True),
        mock.patch.object(balance.dist, "all_reduce", side_effect=lambda sums: sums.copy_(sent[0] + sent[1])),
    ):
        first = LossBalance()
        first(error[:4], t[:4], None)
    assert torch.equal(first.means, whole.means)
    assert not torch.equal(halves[0].means, whole.means)


def small_model(**options) -> RIN:
    size = {"image_size": 8, "patch_size": 4, "dim": 16, "dim_latent": 16, "num_latents": 4, "depth": 1, "num_heads": 2}
    return RIN(ModelConfig(**size, **options))


def test_training_minimises_the_balanced_loss_and_reports_the_plain_one():
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(small_model(), DiffusionConfig(loss_weight="balanced", train_prob_self_cond=0))
    x = torch.rand(4, 3, 8, 8)
    terms = diffusion(x, per_sample=True)
    torch.testing.assert_close(diffusion.balance.eval()(terms.loss, terms.t, None), terms.objective)
    assert not torch.allclose(terms.loss, terms.objective, rtol=0.01)
    plain = GaussianDiffusion(diffusion.model, DiffusionConfig(train_prob_self_cond=0))(x, per_sample=True)
    assert plain.objective is plain.loss


def test_a_resumed_run_continues_the_means(tmp_path):
    data = TensorDataset(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8))

    def trainer(folder, steps):
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(small_model(), DiffusionConfig(loss_weight="balanced", train_prob_self_cond=0))
        options = {
            "train_num_steps": steps,
            "train_batch_size": 4,
            "save_and_sample_every": 100,
            "num_samples": 1,
            "lr_schedule": "constant",
        }
        return Trainer(diffusion, data, results_folder=tmp_path / folder, **options)

    whole, first = trainer("whole", 6), trainer("parts", 3)
    whole.train()
    first.train()
    second = trainer("parts", 6)
    second.train()
    assert torch.equal(whole.unwrapped.balance.means, second.unwrapped.balance.means)
    assert not torch.equal(whole.unwrapped.balance.means, first.unwrapped.balance.means)
    for one, other in zip(whole.unwrapped.model.parameters(), second.unwrapped.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("scale", "schedule"), [(1.0, "cosine"), (0.3, "cosine"), (0.3, "rectified_flow")])
def test_the_wiener_input_has_the_least_error_of_all_multiples(scale, schedule):
    """For data with a mean of 0 and a std of 1, no other factor of the noisy data is nearer to it."""
    seen = []

    class Recorder(torch.nn.Module):
        shape = (3, 8, 8)

        def forward(self, x, gamma, **_):
            seen.append(x)
            return x, None

    options = DiffusionConfig(noise_schedule=schedule, scale=scale, input_scaling="wiener", train_prob_self_cond=0)
    diffusion, x0 = GaussianDiffusion(Recorder(), options), torch.randn(400, 3, 8, 8)
    for t in (0.05, 0.5, 0.95):
        level = diffusion.level(torch.full((400,), t), x0)
        x_t = level.alpha * scale * x0 + level.sigma * torch.randn_like(x0)
        diffusion.predict(x_t, level, Conditions(), None)
        best, factor = ((x_t * other).sum() / x_t.square().sum() for other in (x0, seen[-1]))
        torch.testing.assert_close(seen[-1], factor * x_t, rtol=1e-4, atol=1e-5)
        assert factor.item() == pytest.approx(best.item(), rel=0.02, abs=0.01)


def test_the_wiener_input_keeps_known_pixels():
    seen = []
    model = small_model(known_mask=True)
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    diffusion = GaussianDiffusion(model, DiffusionConfig(input_scaling="wiener", scale=0.5, train_prob_self_cond=0))
    x, known = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    known[..., :4] = True
    diffusion.loss_at(x, torch.full((2,), 0.999), known=known)
    torch.testing.assert_close(seen[0][..., :4], 2 * x[..., :4] - 1)
    assert seen[0][..., 4:].abs().max() < 0.2
    sample = diffusion.sample(batch_size=2, known=known, context=x, steps=2, sampler="ddim")
    torch.testing.assert_close(sample[..., :4], x[..., :4], rtol=0, atol=1e-5)
