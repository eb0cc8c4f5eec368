"""RIN with every option: shapes, gradients, equivalences, initialisation and errors."""

import itertools
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from rin_video import RIN, UsageError
from rin_video.config import MixingName, ModelConfig
from rin_video.layers import AdaptiveLayerNorm, Attention, DropPath, LayerNorm, TransformerLayer
from rin_video.model.conditioning import Condition, Conditioner
from rin_video.model.info import model_info

TINY = {
    "dim": 16, "dim_latent": 24, "num_latents": 5, "depth": 2, "latent_self_attn_depth": 1, "num_heads": 2,
    "latent_num_heads": 3, "num_classes": 4,
}  # fmt: skip
KINDS = {
    "image": {"image_size": [8, 12], "patch_size": 4},
    "video": {"image_size": [8, 12], "frames": 6, "patch_size": [2, 4, 4]},
    "sequence": {"sequence_length": 20, "patch_size": 4},
}
PLACES = ("latent", "interface", "adaln")
OPTIONS = [
    {},
    *[{"time_conditioning": a, "class_conditioning": b} for a, b in itertools.product(PLACES, PLACES)],
    *[
        {"self_conditioning": value}
        for value in ("none", "interface", "x0", "latent+interface", "latent+x0", "latent+interface+x0")
    ],
    *[
        {"interface_mixing": value, "interface_layers": layers}
        for value, layers in (
            *((name, 1) for name in get_args(MixingName)),
            ("linear_attention+conv", 1),
            ("dense_conv+local_attention", 2),
        )
    ],
    *[{"position": value} for value in ("sincos", "sincos_learned", "coordinate")],
    *[{"latent_position": value} for value in ("sincos", "sincos_learned")],
    {"coordinate_range": None, "position": "sincos"},
    {"qk_norm": True},
    {"norm_context": True},
    {"dual_patchnorm": True},
    {"conv_width": 8},
    {"depth": 3, "latent_self_attn_depth": [2, 0, 1]},
    {"dropout": 0.2},
    {"drop_path": 0.2},
    {"dim_latent": None},
    {"num_classes": 0},
    {"num_heads": 3},  # does not divide the width
    {"qk_norm": True, "norm_context": True, "time_conditioning": "adaln", "interface_mixing": "linear_attention+conv"},
]


def words(options):
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


def build(kind="image", *, perturbed=True, **options) -> RIN:
    """Build a tiny model; if perturbed, no parameter is zero, so that all parts have an effect."""
    torch.manual_seed(0)
    model = RIN(**{**TINY, **KINDS[kind], **options})
    if perturbed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model: RIN, batch=2, grid=None) -> tuple[torch.Tensor, torch.Tensor]:
    channels, *built = model.shape
    return torch.randn(batch, channels, *(grid or built)), torch.linspace(0.1, 1, batch)


def labels(model: RIN, batch=2):
    return torch.arange(batch) % model.num_classes if model.num_classes else None


# ---- every option


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=words)
def test_every_option_keeps_the_shape_and_reaches_every_parameter(kind, options):
    model = build(kind, **options)
    x, gamma = inputs(model)
    first, latents = model(x, gamma, label=labels(model))
    out, latents = model(x, gamma, latents=latents, label=labels(model), x0=torch.randn_like(x))
    assert out.shape == first.shape == x.shape
    assert torch.isfinite(out).all()
    (out * torch.randn_like(out)).sum().backward()
    heads_ignore_shifts = []  # softmax ignores a constant that is added to all keys
    for name, parameter in model.named_parameters():
        if name.endswith("k_norm.bias") or (name.endswith("to_kv.bias") and not model.config.qk_norm):
            heads_ignore_shifts.append((name, parameter))
        largest = 0 if parameter.grad is None else parameter.grad.abs().max()
        if not name.endswith("k_norm.bias"):
            assert largest > 1e-5, name
    assert heads_ignore_shifts
    for name, parameter in heads_ignore_shifts:
        key_part = parameter.grad if "k_norm" in name else parameter.grad.chunk(2)[0]
        assert key_part.abs().max() < 1e-4 * max(p.grad.abs().max() for p in model.parameters()), name


def test_a_last_block_without_compute_layers_does_not_write():
    """Its read therefore does not affect the prediction, but it affects the latents of the self-conditioning state."""
    model = build(latent_self_attn_depth=[1, 0])
    x, gamma = inputs(model)
    out, latents = model(x, gamma)
    assert model.core.blocks[1].write is None
    out.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.core.blocks[1].parameters())
    (latents * torch.randn_like(latents)).sum().backward()
    assert all(p.grad is not None for p in model.core.blocks[1].parameters())


@pytest.mark.parametrize("self_conditioning", ["latent", "interface", "x0", "latent+interface+x0"])
def test_nothing_handed_on_is_the_same_as_zeros(self_conditioning):
    model = build(self_conditioning=self_conditioning).eval()
    x, gamma = inputs(model)
    out, latents = model(x, gamma)
    pair = isinstance(latents, tuple)
    assert pair == ("interface" in self_conditioning)
    zeros = tuple(map(torch.zeros_like, latents)) if pair else torch.zeros_like(latents)
    assert_close(model(x, gamma, latents=zeros, x0=torch.zeros_like(x))[0], out)
    if self_conditioning != "x0":
        assert (model(x, gamma, latents=latents)[0] - out).abs().max() > 1e-3
    if "x0" in self_conditioning:
        assert (model(x, gamma, x0=torch.randn_like(x))[0] - out).abs().max() > 1e-3


def test_without_self_conditioning_latents_are_returned_and_ignored():
    model = build(self_conditioning="none").eval()
    x, gamma = inputs(model)
    out, latents = model(x, gamma)
    assert_close(model(x, gamma, latents=latents)[0], out, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=words)
def test_samples_of_a_batch_do_not_see_each_other(options):
    model = build(**options).eval()
    x, gamma = inputs(model, batch=5)
    whole, _ = model(x, gamma, label=labels(model, 5))
    for part in (slice(0, 1), slice(2, 5)):
        label = labels(model, 5)[part] if model.num_classes else None
        assert_close(model(x[part], gamma[part], label=label)[0], whole[part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["sincos", "coordinate"])
@pytest.mark.parametrize(
    ("kind", "grid"), [("image", (16, 4)), ("video", (2, 16, 8)), ("video", (10, 4, 4)), ("sequence", (44,))]
)
@pytest.mark.parametrize("options", [{}, {"interface_mixing": "linear_attention+conv", "conv_width": 4}], ids=words)
def test_other_sizes_than_the_built_one(kind, grid, position, options):
    model = build(kind, position=position, self_conditioning="latent+interface+x0", known_mask=True, **options)
    x, gamma = inputs(model, grid=grid)
    out, latents = model(x, gamma)
    assert model(x, gamma, latents=latents)[0].shape == out.shape == x.shape


def test_learned_positions_report_that_they_fit_one_size_only():
    model = build()
    with pytest.raises(UsageError, match="2x3 tokens and do not fit 4x3"):
        model(*inputs(model, grid=(16, 12)))


# ---- conditions


@pytest.mark.parametrize("place", PLACES)
def test_no_label_is_minus_one_is_a_zero_row(place):
    model = build(class_conditioning=place).eval()
    x, gamma = inputs(model, batch=3)
    none, _ = model(x, gamma)
    assert_close(model(x, gamma, label=torch.full((3,), -1))[0], none, rtol=0, atol=0)
    assert_close(model(x, gamma, label=torch.zeros(3, 4))[0], none, rtol=0, atol=0)
    some = torch.tensor([2, -1, 0])
    rows = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    mixed, _ = model(x, gamma, label=some)
    assert_close(model(x, gamma, label=rows)[0], mixed, rtol=0, atol=0)
    different = (mixed - none).flatten(1).abs().amax(1)
    assert (different > 1e-4).tolist() == [True, False, True]


def test_soft_labels_are_mixtures():
    """The embedding of a weighted label is the weighted sum of embeddings."""
    embedding = build().conditioner.label
    halves = embedding(torch.tensor([[0.25, 0.75, 0, 0]]), 1)
    one, other = embedding(torch.tensor([0]), 1), embedding(torch.tensor([1]), 1)
    assert_close(halves, 0.25 * one + 0.75 * other)
    model = build()
    x, gamma = inputs(model)
    assert model(x, gamma, label=torch.softmax(torch.randn(2, 4), -1))[0].shape == x.shape


def test_labels_to_a_model_without_classes():
    model = build(num_classes=0)
    x, gamma = inputs(model)
    with pytest.raises(UsageError, match="num_classes"):
        model(x, gamma, label=torch.tensor([0, -1]))
    assert_close(model(x, gamma, label=torch.tensor([-1, -1]))[0], model(x, gamma)[0], rtol=0, atol=0)


@pytest.mark.parametrize("place", PLACES)
def test_the_noise_level_is_seen(place):
    model = build(time_conditioning=place).eval()
    x, gamma = inputs(model)
    assert (model(x, gamma)[0] - model(x, gamma * 0.9)[0]).flatten(1).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize(("time", "label"), list(itertools.product(PLACES, PLACES)))
def test_conditions_reach_their_modules(time, label):
    places = {"time_conditioning": time, "class_conditioning": label}
    config = ModelConfig(dim=16, dim_latent=24, num_classes=4, **places)
    conditioner = Conditioner(config)
    gamma, y = torch.rand(3), torch.tensor([0, 1, 2])
    cond = conditioner(gamma, y)
    codes = {"time": conditioner.time(gamma), "label": conditioner.label(y, 3)}
    sent = {place: [codes[k] for k, p in (("time", time), ("label", label)) if p == place] for place in PLACES}
    for place, tokens, width in (("latent", cond.latents, 24), ("interface", cond.interface, 16)):
        assert_close(tokens, torch.stack(sent[place], 1) if sent[place] else torch.zeros(3, 0, width), rtol=0, atol=0)
    assert config.num_conditions("latent") == len(sent["latent"])
    if sent["adaln"]:
        assert_close(cond.modulation, sum(sent["adaln"]))
    else:
        assert cond.modulation is None


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimm": 3}, r"unknown key dimm: did you mean dim\?$"),
        ({"train_lr": 3}, r"unknown key train_lr: did you mean train.train_lr\?"),
        ({"num_heads": 17}, "^num_heads is 17, but the attention has a width of 16"),
        ({"latent_num_heads": 25}, "latent_num_heads is 25, but the attention has a width of 24"),
        ({"num_latents": 2}, "num_latents is 2, of which conditions take 2"),
        ({"num_latents": 0}, "num_latents is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"dim_latent": 20}, "multiple of 8, not 20"),
        (
            {"latent_self_attn_depth": [1, 1, 1]},
            r"latent_self_attn_depth is \[1, 1, 1\]: it must be one whole number, or 2 ",
        ),
        ({"latent_self_attn_depth": -1}, "latent_self_attn_depth"),
        ({"image_size": [8, 14]}, "width 14 is not a multiple of its patch size 4: .* that fit are 12 and 16"),
        ({"tokenizer": "images"}, "unknown tokenizer 'images': use one of .*image"),
        ({"position": "sin"}, "model.position=sin is unknown: choose learned, sincos, sincos_learned, coordinate"),
        ({"latent_position": "coordinate"}, "model.latent_position=coordinate is unknown"),
        ({"self_conditioning": "latent+x1"}, "model.self_conditioning=x1 is unknown"),
        ({"interface_mixing": "conv2"}, "model.interface_mixing=conv2 is unknown"),
        ({"time_conditioning": "token"}, "model.time_conditioning=token is unknown"),
        ({"class_conditioning": "film"}, "model.class_conditioning=film is unknown"),
    ],
    ids=lambda value: words(value) if isinstance(value, dict) else None,
)
def test_mistakes_are_named_when_the_model_is_built(options, message):
    with pytest.raises(UsageError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_the_time_token_counts_as_a_latent_only_if_it_is_one():
    assert build(num_latents=1, time_conditioning="adaln", class_conditioning="interface").core.num_latents == 1
    with pytest.raises(UsageError, match="conditions take 1"):
        build(num_latents=1, class_conditioning="interface")


# ---- precision


def test_norms_compute_in_float32_under_autocast():
    norm = LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 100 + torch.randn(8, 64)  # the mean is so large that bfloat16 would lose the differences
    exact = F.layer_norm(x, (64,), norm.weight, norm.bias, 1e-6)
    rounded = F.layer_norm(x.bfloat16().float(), (64,), norm.weight, norm.bias, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(norm(x), exact, rtol=0, atol=0)
        assert_close(norm(x.bfloat16()), rounded.bfloat16(), rtol=0, atol=0)
    norm.bfloat16()
    assert_close(
        norm(x.bfloat16()).float(),
        F.layer_norm(x.bfloat16().float(), (64,), norm.weight.float(), norm.bias.float(), 1e-6).bfloat16().float(),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(
    "options",
    [o for o in OPTIONS if o.get("position") != "coordinate"],
    ids=words,
)
def test_residual_streams_stay_float32_under_autocast(options):
    model = build("video", **options)
    streams = []
    for unit in model.modules():
        if isinstance(unit, TransformerLayer):
            unit.register_forward_hook(lambda module, args, out: streams.append((args[0].dtype, out.dtype)))
    x, gamma = inputs(model)
    exact, _ = model.eval()(x, gamma)
    with torch.autocast("cpu", torch.bfloat16):
        streams.clear()
        out, latents = model(x, gamma)
        out, _ = model(x, gamma, latents=latents)
    assert {dtype for pair in streams for dtype in pair} == {torch.float32}
    assert out.shape == exact.shape
    assert torch.isfinite(out).all()


# ---- where it starts


def glorot_std(shape: tuple[int, ...]) -> float:
    """Return the std of Keras' rule for a kernel of any rank: uniform on [-sqrt(6 / fans), sqrt(6 / fans)]."""
    receptive = torch.Size(shape[:-2]).numel()
    return (2 / (receptive * shape[-2] + receptive * shape[-1])) ** 0.5


@pytest.mark.parametrize(("heads", "dim", "dim_context"), [(8, 128, 256), (2, 256, 128), (1, 128, 128)])
def test_attention_starts_at_the_scale_of_the_release(heads, dim, dim_context):
    torch.manual_seed(0)
    inner, head = 128, 128 // heads
    attention = Attention(dim, dim_context, inner, heads)
    k, v = attention.to_kv.weight.chunk(2)
    for weight, kernel in (
        (attention.to_q.weight, (dim, heads, head)),
        (k, (dim_context, heads, head)),
        (v, (dim_context, heads, head)),
        (attention.to_out.weight, (heads, head, dim)),
    ):
        assert_close(weight.std().item(), glorot_std(kernel), rtol=0.03, atol=0)
        assert_close(weight.abs().max().item(), 3**0.5 * glorot_std(kernel), rtol=0.01, atol=0)
    assert all((linear.bias == 0).all() for linear in (attention.to_q, attention.to_kv, attention.to_out))


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention = Attention(8, 6, 8, 2, qk_norm=False)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    q, (k, v) = attention.to_q(x), attention.to_kv(context).chunk(2, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    assert_close(attention(x, context), attention.to_out(torch.cat(heads, dim=-1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("self_conditioning", ["latent", "interface", "latent+interface"])
def test_training_starts_without_what_is_handed_on(self_conditioning):
    model = build(perturbed=False, self_conditioning=self_conditioning).eval()
    x, gamma = inputs(model)
    out, latents = model(x, gamma)
    assert_close(model(x, gamma, latents=latents)[0], out, rtol=0, atol=0)


@pytest.mark.parametrize("mixing", [*get_args(MixingName), "linear_attention+conv"])
def test_mixing_starts_as_the_identity(mixing):
    plain, mixed = (build(perturbed=False, interface_mixing=m) for m in ("none", mixing))
    mixed.load_state_dict(plain.state_dict(), strict=False)
    x, gamma = inputs(plain)
    assert_close(mixed(x, gamma)[0], plain(x, gamma)[0], rtol=0, atol=0)


def test_adaptive_norm_starts_as_a_plain_norm():
    x = torch.randn(2, 3, 16)
    assert_close(AdaptiveLayerNorm(16, 24)(x, torch.randn(2, 24)), LayerNorm(16)(x), rtol=0, atol=0)


# ---- dropout


def test_dropout_and_drop_path_stand_in_the_compute_layers_only():
    model = build(depth=3, latent_self_attn_depth=[2, 0, 1], dropout=0.25, drop_path=0.5, self_conditioning="latent")
    active = {
        name: module.p if isinstance(module, nn.Dropout) else module.drop_prob
        for name, module in model.named_modules()
        if (isinstance(module, nn.Dropout) and module.p) or (isinstance(module, DropPath) and module.drop_prob)
    }
    layers = [f"core.blocks.{b}.compute.{i}" for b, i in ((0, 0), (0, 1), (2, 0))]
    assert active == {
        f"{layer}.{name}": p
        for layer in layers
        for name, p in (("feed_forward.mlp.dropout", 0.25), ("drop_path", 0.5), ("feed_forward.drop_path", 0.5))
    }


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_dropout_acts_in_training_only(option):
    model = build(**{option: 0.5})
    x, gamma = inputs(model, batch=8)
    assert (model(x, gamma)[0] - model(x, gamma)[0]).abs().max() > 1e-4
    model.eval()
    assert_close(model(x, gamma)[0], model(x, gamma)[0], rtol=0, atol=0)
    assert_close(model(x, gamma)[0], build(**{option: 0.0})(x, gamma)[0], rtol=0, atol=0)
    reader = build(latent_self_attn_depth=0, **{option: 0.5})
    assert_close(reader(x, gamma)[1], reader(x, gamma)[1], rtol=0, atol=0)


# ---- names, sharing, cost


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"tokenizer.position.table", "core.latents.table", "conditioner.label.projection.weight"}),
        ({"num_classes": 0, "position": "sincos"}, {"core.latents.table"}),
        (
            {"position": "sincos_learned", "latent_position": "sincos", "class_conditioning": "adaln"},
            {"tokenizer.position.residual.table", "conditioner.label.projection.weight"},
        ),
        ({"position": "coordinate", "latent_position": "sincos", "num_classes": 0}, set()),
    ],
    ids=lambda value: words(value) if isinstance(value, dict) else None,
)
def test_no_weight_decay_names_the_embeddings(options, names):
    model = build(**options)
    assert model.no_weight_decay() == names
    assert names <= set(dict(model.named_parameters()))


def test_the_core_knows_no_pixels():
    """The weights of an image model's core work unchanged in a video model and in a sequence model."""
    image = build("image").eval()
    tokens, latents = torch.randn(2, 7, 16), torch.randn(2, 5, 24)
    cond = Condition(torch.randn(2, 2, 24), torch.randn(2, 0, 16), None)
    expected = image.core(tokens, latents, cond)
    for kind in ("video", "sequence"):
        other = RIN(**TINY, **KINDS[kind]).eval()
        other.core.load_state_dict(image.core.state_dict(), strict=True)
        for ours, theirs in zip(other.core(tokens, latents, cond), expected, strict=True):
            assert_close(ours, theirs, rtol=0, atol=0)
        x, gamma = inputs(other)
        assert other(x, gamma)[0].shape == x.shape


def test_the_core_without_convolution_does_not_see_the_order_of_tokens():
    model = build(interface_mixing="linear_attention").eval()
    tokens, order = torch.randn(2, 7, 16), torch.randperm(7)
    cond = Condition(torch.randn(2, 2, 24), torch.randn(2, 0, 16), None)
    out, latents = model.core(tokens, None, cond)
    shuffled, same = model.core(tokens[:, order], None, cond)
    assert_close(shuffled, out[:, order], rtol=1e-4, atol=1e-5)
    assert_close(same, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixing", ["none", "linear_attention+conv", "dense_conv", "local_attention", "group"])
def test_cost_is_linear_in_frames(mixing):
    options = {**TINY, **KINDS["video"], "interface_mixing": mixing, "interface_window": [2, 2, 2]}
    costs = {f: model_info(ModelConfig(**{**options, "frames": f})).gflops * 1e9 for f in (16, 32, 48, 64)}
    increments = [round(costs[f + 16] - costs[f]) for f in (16, 32, 48)]
    assert increments[0] == increments[1] == increments[2] > 0
