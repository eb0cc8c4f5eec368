"""Observed masks: their drawing in training, their use in the model; loss and samplers keep observed values."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.cli.trained import check_sampling
from rin_video.config_files import load_config
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.guidance import Guidance
from rin_video.diffusion.masks import KNOWN_MASKS, draw_known, place_context
from rin_video.diffusion.noise import NoiseSource
from rin_video.diffusion.objectives import OBJECTIVES
from rin_video.diffusion.samplers import SAMPLERS
from rin_video.diffusion.schedules import NoiseLevel

TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2}
CLIP = {"frames": 4, "image_size": 8, "patch_size": (2, 4, 4), "known_mask": True, "channels": 1}
MIXTURE = dict.fromkeys(KNOWN_MASKS, 1.0)


def make(**options) -> GaussianDiffusion:
    torch.manual_seed(0)
    model = RIN(**TINY, **CLIP, num_classes=options.pop("num_classes", 0), **options.pop("model", {}))
    for parameter in model.parameters():  # zero-initialised parameters would hide mistakes
        nn.init.normal_(parameter, std=0.1)
    return GaussianDiffusion(model, known=MIXTURE, **options)


# ---- the masks


@pytest.mark.parametrize("kind", KNOWN_MASKS)
@pytest.mark.parametrize("grid", [(9,), (16, 6, 4), (2, 2, 2), (1, 4, 4)])
def test_masks_leave_something_to_invent(kind, grid):
    torch.manual_seed(0)
    masks = draw_known({kind: 1.0}, [], 200, grid)
    assert masks.shape == (200, 1, *grid)
    assert not masks.flatten(1).all(1).any()
    if kind == "none" or (grid[0] == 1 and kind != "boxes"):
        assert not masks.any()
        return
    share = masks.flatten(1).any(1).float().mean()
    assert share > 0.8 if kind == "boxes" else share == 1
    cells = masks.reshape(200, grid[0], -1)
    frames = cells.all(2)
    if kind in ("first", "ends"):
        assert grid[0] == 2 or frames[:, 0].all()
    if kind in ("last", "ends"):
        assert frames[:, -1].all()
    if kind != "boxes":
        assert (cells.any(2) == frames).all()


def test_first_frames_are_as_many_as_asked_for():
    torch.manual_seed(0)
    counts = draw_known({"first": 1}, [3, 5], 500, (16, 2, 2))[:, 0, :, 0, 0].sum(1)
    assert set(counts.tolist()) == {3, 4, 5}
    assert draw_known({"first": 1}, [5, 5], 4, (16, 2, 2))[:, 0, :5].all()


def test_mixture_follows_its_weights_and_images_take_boxes_only():
    torch.manual_seed(0)
    masks = draw_known({"none": 3, "first": 1}, [2, 2], 4000, (4, 1, 1))
    assert masks.flatten(1).any(1).float().mean().item() == pytest.approx(0.25, abs=0.02)
    images = draw_known({"first": 1, "boxes": 1}, [], 200, (6, 6))
    rows = images.flatten(2).any(1)
    assert rows.any()
    assert not draw_known({"first": 1}, [], 3, (6, 6)).any()


# ---- training


def test_model_sees_clean_values_and_the_mask_and_no_loss_is_taken_there():
    seen = {}

    class Spy(nn.Module):
        def forward(self, x, gamma, *, known, latents=None):
            seen.update(x=x, known=known)
            return seen.setdefault("out", torch.zeros_like(x, requires_grad=True)), torch.zeros(len(x), 1)

    torch.manual_seed(0)
    x = torch.rand(5, 1, 4, 6, 6)
    for scale in (1.0, 0.3):
        seen.clear()
        diffusion = GaussianDiffusion(Spy(), train_prob_self_cond=0, scale=scale, known={"boxes": 1})
        diffusion(x).backward()
        known = seen["known"].expand_as(x)
        assert known.any()
        assert_close(seen["x"][known], (2 * x - 1)[known])  # in the range of the data, for any scale
        assert (seen["out"].grad[known] == 0).all()
        assert (seen["out"].grad[~known] != 0).all()


def test_loss_and_prediction_do_not_depend_on_noise_at_observed_pixels():
    """With a scale below 1 the input is normalised by the std of the unobserved pixels, so that no noise leaks in."""
    for scale in (1.0, 0.4):
        diffusion = make(scale=scale)
        known = draw_known({"boxes": 1}, [], 3, (4, 8, 8))
        x, values = torch.randn(2, 3, 1, 4, 8, 8)
        conditions = Conditions(known=known, values=values)
        level = diffusion.level(torch.full((3,), 0.5), x)
        one, _ = diffusion.predict(x, level, conditions, None)
        two, _ = diffusion.predict(torch.where(known, torch.randn_like(x), x), level, conditions, None)
        assert_close(one, two)


def test_mean_and_std_over_unobserved_pixels():
    x = torch.randn(2, 3, 4, 5)
    known = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    known[0, :, 1:3], known[1] = True, True
    conditions = Conditions(known=known)
    rest = torch.cat([x[0, :, :1], x[0, :, 3:]], dim=1)
    assert_close(conditions.masked_mean(x), torch.stack([rest.mean(), torch.tensor(0.0)]))
    assert_close(conditions.masked_std(x), torch.stack([rest.std(), torch.tensor(1.0)]))
    assert_close(Conditions().masked_std(x), x.flatten(1).std(1))


def test_without_a_mask_in_the_config_nothing_changes():
    torch.manual_seed(0)
    plain = RIN(**TINY, **(CLIP | {"known_mask": False}))
    torch.manual_seed(0)
    again = RIN(**TINY, **{k: v for k, v in CLIP.items() if k != "known_mask"})
    assert plain.state_dict().keys() == again.state_dict().keys()
    assert plain.tokenizer.in_channels == 1
    torch.manual_seed(1)
    loss = GaussianDiffusion(plain)(torch.rand(2, *plain.shape))
    torch.manual_seed(1)
    assert_close(GaussianDiffusion(plain, known={})(torch.rand(2, *plain.shape)), loss)


def test_every_parameter_gets_a_gradient_with_an_observed_mask():
    diffusion = make(model={"self_conditioning": "latent+x0"}, num_classes=3)
    diffusion(torch.rand(8, *diffusion.shape), torch.arange(8) % 3).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in diffusion.parameters())


# ---- sampling


class Correlated(nn.Module):
    """The exact denoiser of two pixels with unit variance and correlation rho, of which each may be observed."""

    def __init__(self, rho: float, power: int) -> None:
        super().__init__()
        self.rho, self.power = rho, power

    def forward(self, x: Tensor, gamma: Tensor, *, known: Tensor | None = None, latents=None) -> tuple[Tensor, Tensor]:
        gamma = gamma.double().view(-1, 1, 1)
        _, alpha, sigma, _ = NoiseLevel.from_edm_sigma(((1 - gamma) / gamma).sqrt(), self.power)
        noise = sigma.square() if known is None else torch.where(known, 1e-12, sigma.square())
        gain = alpha if known is None else torch.where(known, 1.0, alpha)
        cov = torch.tensor([[1, self.rho], [self.rho, 1]], dtype=torch.float64)
        noise, gain = noise.expand_as(x)[:, 0], gain.expand_as(x)[:, 0]
        seen = gain[:, :, None] * cov * gain[:, None, :] + torch.diag_embed(noise)
        x0 = (cov * gain[:, None, :]) @ torch.linalg.solve(seen, x[:, 0].double()[..., None])
        return x0.transpose(1, 2).to(x.dtype), torch.zeros(len(x), 1)


@pytest.mark.parametrize(
    ("sampler", "path", "power"),
    [*[(name, "cosine", 2) for name in SAMPLERS], ("ddim", "rectified_flow", 1), ("dpmpp_2m_sde", "rectified_flow", 1)],
)
def test_samplers_draw_from_the_conditional(sampler, path, power):
    """If one of two correlated pixels is observed, the other has mean rho times it and variance 1 - rho^2."""
    model = Correlated(0.8, power)
    diffusion = GaussianDiffusion(model, noise_schedule=path, objective="x0", clip_x0="none", shape=(1, 2))
    context, known = torch.full((1, 2), 0.6), torch.tensor([True, False])  # 0.2 in diffusion range
    out = diffusion.sample(batch_size=3000, steps=60, sampler=sampler, seed=0, context=context, known=known)
    assert (out[:, 0, 0] == 0.6).all()
    # clamping to [0, 1] removes the tails; these two do not depend on them
    inside = 2 * out[:, 0, 1] - 1
    assert inside.median().item() == pytest.approx(0.8 * 0.2, abs=0.04)
    assert (inside > 0.16 + 0.6).float().mean().item() == pytest.approx(0.1587, abs=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("clip_x0", ["static", "dynamic", "none"])
def test_observed_pixels_are_returned_bit_for_bit(sampler, clip_x0):
    diffusion = make(scale=0.5, num_classes=2, model={"self_conditioning": "latent+x0"})
    context = torch.rand(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    known = draw_known({"boxes": 1}, [], 3, (4, 8, 8))
    out = diffusion.sample(
        context=context, known=known, steps=3, sampler=sampler, clip_x0=clip_x0, label=1, guidance=1.5, seed=0,
        guidance_drop="label+known", guidance_rescale=0.7, max_batch=2,
    )  # fmt: skip
    known = known.expand_as(out)
    assert (out[known] == context[known]).all()
    assert (out[~known] != context[~known]).float().mean() > 0.9


def test_a_short_context_is_the_start_and_bytes_stay_exact():
    diffusion = make()
    context = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = diffusion.sample(batch_size=2, context=context, steps=2, seed=0)
    assert out.shape == (2, 1, 4, 8, 8)
    assert ((out[:, :, :3] * 255).round().to(torch.uint8) == context).all()
    assert (out[:, :, :3] == context / 255).all()
    assert (out[0, :, 3] != out[1, :, 3]).any()


def test_sample_with_a_context_does_not_depend_on_the_batch():
    diffusion = make()
    context = torch.rand(7, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = diffusion.sample(context=context, steps=3, seed=5)
    for chunk in (1, 3):
        assert_close(diffusion.sample(context=context, steps=3, seed=5, max_batch=chunk), whole, rtol=0, atol=2e-6)


def test_guidance_may_drop_the_known_part():
    diffusion = make()
    x, values = torch.randn(2, 2, 1, 4, 8, 8)
    known = draw_known({"first": 1}, [2, 2], 2, (4, 8, 8))
    conditions, level = Conditions(known=known, values=values), NoiseLevel.from_gamma(0.5)
    guidance = [Guidance(1.5, drop="known", batched=batched) for batched in (False, True)]
    guided = [diffusion.denoiser(conditions, how)(x, level, None) for how in guidance]
    assert_close(guided[0][0], guided[1][0])
    with_known, _ = diffusion.predict(x, level, conditions, None)
    without, _ = diffusion.predict(x, level, Conditions(), None)
    mixed = 2.5 * with_known - 1.5 * without
    assert_close(guided[0][0], diffusion.predict_x0(mixed, x, level, conditions))


def test_mistakes_are_named():
    diffusion = make()
    clip, half = torch.rand(1, 4, 8, 8), torch.zeros(4, 8, 8, dtype=torch.bool)
    for options, message in (
        ({"context": torch.rand(1, 5, 8, 8)}, "context has 5 frames, but the window has 4: pass at most 3"),
        ({"context": clip}, "context fills the complete grid 4x8x8"),
        ({"context": torch.rand(3, 2, 8, 8)}, "context has 3 channels, but the model has 1"),
        ({"context": torch.rand(1, 2, 9, 8)}, "context is 9x8, but the model generates 8x8"),
        ({"context": clip, "known": half[:2]}, r"known has shape \(2, 8, 8\): pass \(4, 8, 8\)"),
        ({"context": clip, "known": half.float()}, "known is torch.float32: pass booleans"),
        ({"context": clip, "known": ~half}, "every pixel is known"),
        ({"context": clip[:, :2], "known": half}, "context has 2 frames, but `known` covers 4"),
        ({"known": half}, "a mask without values: pass context"),
        ({"context": torch.rand(8, 8)}, r"context has shape \(8, 8\)"),
        ({"context": clip[:, :2], "guidance": 1.0}, "no label or embedding: pass one, or set guidance_drop=known"),
        ({"context": clip[:, :2], "guidance": 1.0, "guidance_drop": "frames"}, "guidance_drop=frames is unknown"),
    ):
        with pytest.raises(UsageError, match=message):
            diffusion.sample(batch_size=1, steps=1, **options)
    unaware = RIN(**TINY, **(CLIP | {"known_mask": False}))
    with pytest.raises(UsageError, match="trained without an observed mask"):
        GaussianDiffusion(unaware).sample(batch_size=1, context=clip[:, :2])
    with pytest.raises(UsageError, match=r"set model\.known_mask=true"):
        GaussianDiffusion(unaware, known={"first": 1})
    with pytest.raises(UsageError, match="known_mask=True"):
        unaware(torch.rand(1, 1, 4, 8, 8), torch.ones(1), known=half[None, None])
    image = RIN(**TINY, image_size=8, known_mask=True)
    with pytest.raises(UsageError, match="only first, for clips"):
        GaussianDiffusion(image, known={"first": 1})


def test_place_context_and_noise_source_agree_on_shapes():
    context, known = place_context(torch.rand(3, 2, 4, 4), None, (3, 6, 4, 4), 2)
    assert context.shape == NoiseSource(0, range(2), (3, 6, 4, 4), torch.device("cpu"))().shape
    assert known.shape == (2, 1, 6, 4, 4)
    assert known[:, 0, :2].all()
    assert not known[:, 0, 2:].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_estimates_hold_what_is_known(objective):
    diffusion = make(objective=objective)
    values = torch.rand(2, 1, 4, 8, 8) * 2 - 1
    known = draw_known({"boxes": 1}, [], 2, (4, 8, 8))
    x0, eps, _ = diffusion.denoiser(Conditions(known=known, values=values))(
        torch.randn_like(values), NoiseLevel.from_gamma(0.3), None
    )
    assert (x0[known] == values[known]).all()
    assert eps.isfinite().all()


def test_guidance_by_what_is_known_needs_no_classes():
    check_sampling(load_config("kinetics600_predict", ["sample.guidance=1", "sample.guidance_drop=known"]))
    with pytest.raises(UsageError, match=r"no classes and no embeddings: .* sample.guidance_drop=known"):
        check_sampling(load_config("kinetics600_predict", ["sample.guidance=1"]))
    by_known = ["sample.guidance=1", "sample.guidance_drop=known"]
    for preset, always_known in (("video64", True), ("video_long", False)):
        with pytest.raises(UsageError, match="these samples have no known pixels"):
            check_sampling(load_config(preset, by_known), always_known=always_known)
