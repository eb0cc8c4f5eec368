"""Tokenizers: exact inverses, the order of operations, position codes against closed forms, plug-ins by name.

Tests that are parametrised over `TOKENIZERS` include every registered tokenizer.
"""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.config import ModelConfig
from rin_video.registry import Registry
from rin_video.tokenizers import TOKENIZERS, PatchTokenizer, make_tokenizer
from rin_video.tokenizers.positions import POSITIONS, CoordinatePosition, grid_sincos, make_position

NAMES = list(TOKENIZERS)
PATCHED = [name for name in NAMES if issubclass(TOKENIZERS.get(name), PatchTokenizer)]
PATCHES = {1: (4,), 2: (2, 3), 3: (2, 3, 1)}  # by the number of axes


class Nowhere(nn.Module):
    """A position code of zeros."""

    def forward(self, grid):
        return torch.zeros(())


def build(name, *, grid=None, dim=16, in_channels=3, **options) -> PatchTokenizer:
    """Build the tokenizer `name` for a grid with unequal sizes."""
    kind = TOKENIZERS.get(name)
    patch = PATCHES[len(kind.axes)]
    grid = grid or tuple((i + 2) * p for i, p in enumerate(patch))
    return kind(grid, patch, dim, in_channels=in_channels, **options)


def bare(tokenizer: PatchTokenizer) -> PatchTokenizer:
    """Remove projections, norms and position, so that the tokenizer only rearranges."""
    for part in ("patch_norm", "to_tokens", "norm", "out_norm", "to_patches"):
        setattr(tokenizer, part, nn.Identity())
    tokenizer.position = Nowhere()
    return tokenizer


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


# ---- patches


def draw_sizes(draw, tokenizer):
    return tuple(draw(st.integers(1, 4)) * p for p in tokenizer.patch_size)


@pytest.mark.parametrize("name", PATCHED)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_detokenize_inverts_tokenize_exactly(name, data):
    tokenizer = bare(build(name))
    grid = draw_sizes(data.draw, tokenizer)
    x = torch.randn(data.draw(st.integers(1, 2)), 3, *grid)
    tokens = tokenizer.tokenize(x)
    assert tokens.shape[1] == np.prod(tokenizer.token_grid(grid))
    assert_close(tokenizer.detokenize(tokens, grid, x), x, rtol=0, atol=0)


@pytest.mark.parametrize("name", PATCHED)
def test_patches_are_row_major_with_the_channel_fastest(name):
    tokenizer = bare(build(name))
    grid, patch = tokenizer.grid, tokenizer.patch_size
    x = torch.arange(2.0 * 3 * np.prod(grid)).reshape(2, 3, *grid)
    tokens = []
    for corner in itertools.product(*(range(0, size, p) for size, p in zip(grid, patch, strict=True))):
        cells = itertools.product(*(range(c, c + p) for c, p in zip(corner, patch, strict=True)))
        tokens.append(torch.stack([x[(slice(None), channel, *cell)] for cell in cells for channel in range(3)], dim=1))
    assert_close(tokenizer.tokenize(x), torch.stack(tokens, dim=1), rtol=0, atol=0)


@pytest.mark.parametrize("name", PATCHED)
@pytest.mark.parametrize("dual", [False, True])
def test_projection_then_norm_then_position(name, dual):
    tokenizer = randomise(build(name, dual_patchnorm=dual))
    x = torch.randn(2, 3, *tokenizer.grid)
    raw = bare(build(name)).tokenize(x)
    if dual:
        raw = F.layer_norm(raw, raw.shape[-1:], tokenizer.patch_norm.weight, tokenizer.patch_norm.bias, 1e-6)
    tokens = F.linear(raw, tokenizer.to_tokens.weight, tokenizer.to_tokens.bias)
    tokens = F.layer_norm(tokens, tokens.shape[-1:], tokenizer.norm.weight, tokenizer.norm.bias, 1e-6)
    assert_close(tokenizer.tokenize(x), tokens + tokenizer.position.table)


@pytest.mark.parametrize("name", PATCHED)
def test_dual_patchnorm_makes_the_scale_of_a_patch_meaningless(name):
    x = torch.randn(2, 3, *build(name).grid)
    dual, single = (randomise(build(name, dual_patchnorm=dual)) for dual in (True, False))
    assert_close(dual.tokenize(5 * x + 2), dual.tokenize(x), rtol=0, atol=1e-4)
    assert (single.tokenize(5 * x + 2) - single.tokenize(x)).abs().max() > 0.1


CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("name", PATCHED)
def test_convolutions_around_the_patches(name):
    tokenizer, inner = randomise(build(name, conv_width=4)), build(name, in_channels=4)
    inner.load_state_dict({key: value for key, value in tokenizer.state_dict().items() if "conv" not in key})
    x, grid = torch.randn(2, 3, *tokenizer.grid), tokenizer.grid

    def twice(x, layers):
        for layer, activation in ((layers[0], F.gelu), (layers[2], nn.Identity())):
            x = activation(CONVOLVE[len(grid)](x, layer.weight, layer.bias, padding=1))
        return x

    tokens = tokenizer.tokenize(x)
    assert_close(tokens, inner.tokenize(twice(x, tokenizer.conv_in)))
    patches = inner.detokenize(tokens, grid, x)
    assert_close(tokenizer.detokenize(tokens, grid, x), twice(torch.cat([patches, x], dim=1), tokenizer.conv_out))


@pytest.mark.parametrize("name", PATCHED)
def test_convolutions_see_over_the_seams_of_patches(name):
    for width, neighbours in ((0, False), (4, True)):
        tokenizer = randomise(build(name, conv_width=width))
        x = torch.randn(1, 3, *tokenizer.grid)
        changed = x.clone()
        last = tuple(p - 1 for p in tokenizer.patch_size)  # the corner of the first patch
        changed[(slice(None), slice(None), *last)] += 1
        differs = (tokenizer.tokenize(changed) != tokenizer.tokenize(x)).any(dim=-1).sum() > 1
        assert differs == neighbours


def test_convolutions_take_up_to_three_axes():
    with pytest.raises(UsageError, match=r"conv_width .* 4"):
        PatchTokenizer((2,) * 4, (1,) * 4, 16, conv_width=4)


@pytest.mark.parametrize("name", PATCHED)
def test_sizes_that_do_not_divide_name_axis_size_and_the_nearest_that_fit(name):
    tokenizer = build(name)
    patch = tokenizer.patch_size
    for axis in range(len(patch)):
        if patch[axis] == 1:
            continue
        grid = [3 * p for p in patch]
        grid[axis] += 1
        fits = f"{3 * patch[axis]} and {4 * patch[axis]}"
        message = f"^{tokenizer.axes[axis]} {grid[axis]} is not a multiple of its patch size {patch[axis]}.*{fits}$"
        for attempt in (
            lambda grid=grid: build(name, grid=tuple(grid)),
            lambda grid=grid: tokenizer.tokenize(torch.zeros(1, 3, *grid)),
            lambda grid=grid: tokenizer.detokenize(torch.zeros(1, 4, 16), grid, torch.zeros(1, 3, *grid)),
        ):
            with pytest.raises(UsageError, match=message):
                attempt()
    with pytest.raises(UsageError, match=f"{len(patch)} axes"):
        tokenizer.token_grid((*tokenizer.grid, 8))
    with pytest.raises(UsageError, match="4 channels, the tokenizer takes 3"):
        tokenizer.tokenize(torch.zeros(1, 4, *tokenizer.grid))


def test_the_error_of_a_grid_smaller_than_its_patch_names_the_nearest_size():
    with pytest.raises(UsageError, match=r"length 3 is not a multiple of its patch size 4: .* that fit are 4$"):
        build("sequence", grid=(3,))


# ---- through a configuration, for every registered tokenizer


def config_for(name, **options) -> ModelConfig:
    axes = len(getattr(TOKENIZERS.get(name), "axes", "?"))
    return ModelConfig(
        dim=16, image_size=[4, 8], frames=6, sequence_length=8, patch_size=[2] * axes, tokenizer=name, **options
    )


@pytest.mark.parametrize("conv_width", [0, 4])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tokenizer_keeps_shapes_and_gives_every_parameter_a_gradient(name, position, conv_width):
    config = config_for(name, position=position, dual_patchnorm=True, conv_width=conv_width)
    tokenizer = make_tokenizer(config, in_channels=2 * config.channels)
    channels, *grid = tokenizer.shape
    assert channels == config.channels
    x = torch.randn(2, 2 * channels, *grid)
    tokens = tokenizer.tokenize(x)
    assert tokens.shape == (2, np.prod(tokenizer.token_grid(grid)), config.dim)
    out = tokenizer.detokenize(tokens, grid, x)
    assert out.shape == (2, channels, *grid)
    (out * torch.randn_like(out)).sum().backward()
    for parameter_name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, parameter_name  # noqa: PT018


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_size": 8}, "image"),
        ({"image_size": 8, "frames": 4, "patch_size": [2, 4, 4]}, "tube"),
        ({"sequence_length": 8}, "sequence"),
    ],
)
def test_auto_goes_by_what_the_data_is(options, name):
    assert type(make_tokenizer(ModelConfig(dim=16, **options), 3)) is TOKENIZERS.get(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": "sequence"}, "model.sequence_length"),
        ({"tokenizer": "tube", "image_size": 8}, "model.frames"),
        ({}, "model.image_size"),
        ({"frames": 4, "image_size": 8, "patch_size": 4}, r"tubes need three numbers .*\[2,4,4\]"),
        ({"image_size": 8, "patch_size": [2, 2, 2]}, r"model.patch_size .*height, width"),
        ({"image_size": 8, "patch_size": 0}, "at least 1"),
        ({"image_size": 8, "conv_width": -1}, "model.conv_width is -1.*at least 0"),
        ({"image_size": 8, "conv_width": 1.5}, "model.conv_width is 1.5"),
    ],
)
def test_options_that_a_config_lacks_are_reported(options, words):
    with pytest.raises(UsageError, match=words):
        make_tokenizer(ModelConfig(dim=16, **options), 3)


# ---- positions


def closed_form(grid: tuple[int, ...], dim: int, coordinate_range: float | None) -> np.ndarray:
    """Return sin and cos of p / 10000^(2k/d), computed directly in float64; axes of one token get no width."""
    long = [axis for axis, size in enumerate(grid) if size > 1] or [0]
    share = dim // len(long) // 2 * 2
    widths = dict.fromkeys(long, share) | {long[0]: dim - share * (len(long) - 1)}
    rows = []
    for cell in itertools.product(*map(range, grid)):
        row = []
        for axis in long:
            p, width = float(cell[axis]), widths[axis]
            if coordinate_range is not None:
                p *= coordinate_range / max(grid[axis] - 1, 1)
            angles = [p / 10000.0 ** (2 * k / width) for k in range(width // 2)]
            row += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("coordinate_range", [1000.0, None])
@pytest.mark.parametrize("grid", [(7,), (1,), (5, 7), (1, 6), (3, 4, 5), (1, 4, 5), (16, 1, 1)], ids=str)
@pytest.mark.parametrize("dim", [24, 32])
def test_sincos_is_the_closed_form_of_unit_amplitude(grid, dim, coordinate_range):
    code = grid_sincos(grid, dim, coordinate_range)
    assert code.dtype == torch.float32
    # The error of the angle: near 1000 a float32 position is accurate to 6.1e-5, and the frequency to 6e-8 relatively.
    atol = 1.3e-4 if coordinate_range else 2e-6
    assert_close(code.double(), torch.from_numpy(closed_form(grid, dim, coordinate_range)), rtol=0, atol=atol)
    axes = sum(size > 1 for size in grid) or 1
    share = dim // axes // 2 * 2
    for part in code.split([dim - share * (axes - 1)] + [share] * (axes - 1), dim=-1):
        sin, cos = part.double().chunk(2, dim=-1)
        assert_close(sin**2 + cos**2, torch.ones_like(sin), rtol=0, atol=1e-6)


def test_sincos_codes_of_neighbours_differ_and_odd_widths_are_refused():
    code = grid_sincos((4, 5, 6), 36)
    assert torch.cdist(code, code).fill_diagonal_(9).min() > 0.1
    with pytest.raises(UsageError, match="even width, not 15"):
        grid_sincos((4,), 15)


def test_sincos_keeps_its_layout_on_an_axis_of_one_token():
    """A clip model that samples the length of one tube uses the codes of its first tube, channel by channel."""
    position = make_position("sincos", (4, 5, 6), 36)
    first = position((4, 5, 6)).view(4, 30, 36)[0]
    assert_close(position((1, 5, 6)), first, rtol=0, atol=0)
    assert_close(position((1, 1, 1)), first[:1], rtol=0, atol=0)
    still = make_position("sincos", (1, 5, 6), 36)
    assert_close(still((1, 5, 6)), grid_sincos((5, 6), 36), rtol=0, atol=0)  # as built: two axes share the width
    assert still((1, 9, 2)).shape == (18, 36)
    with pytest.raises(UsageError, match=r"made for 1x5x6 tokens and cannot distinguish 2x5x6 tokens: train with more"):
        still((2, 5, 6))


@pytest.mark.parametrize("name", ["learned", "sincos_learned"])
def test_learned_positions_refuse_another_grid(name):
    position = make_position(name, (2, 3), 16)
    assert position((2, 3)).shape == (6, 16)
    with pytest.raises(UsageError, match=r"made for 2x3 tokens and do not fit 3x2.*position=sincos"):
        position((3, 2))


def test_sincos_learned_starts_as_sincos():
    assert_close(make_position("sincos_learned", (2, 3), 16)((2, 3)), make_position("sincos", (2, 3), 16)((2, 3)))


def test_sincos_at_another_size_is_the_code_of_that_size():
    assert_close(make_position("sincos", (2, 3), 16)((5, 4)), grid_sincos((5, 4), 16), rtol=0, atol=0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_coordinate_positions_fit_any_size_and_use_every_parameter(grid):
    position = CoordinatePosition(len(grid), 16)
    code = position(tuple(grid))
    assert code.shape == (np.prod(grid), 16)
    (code * torch.randn_like(code)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in position.parameters())


def test_coordinate_positions_of_a_third_of_the_grid_are_those_of_its_middles():
    """The centre of token i of 4 is that of token 3 i + 1 of 12."""
    position = CoordinatePosition(2, 16)
    fine = position((12, 6)).unflatten(0, (12, 6))
    assert_close(position((4, 2)).unflatten(0, (4, 2)), fine[1::3, 1::3])


def test_an_unknown_position_lists_the_known():
    with pytest.raises(UsageError, match=", ".join(POSITIONS)):
        make_position("polar", (4,), 16)


# ---- by name


def test_a_name_that_is_taken_raises():
    registry: Registry[object] = Registry("thing", group="rin_video.nothing")
    assert registry.register("a")(1) == 1
    with pytest.raises(ValueError, match="a thing named 'a' is already registered"):
        registry.register("a")(2)
    assert registry.get("a") == 1
    for name in NAMES:
        with pytest.raises(ValueError, match=repr(name)):
            TOKENIZERS.register(name)(PatchTokenizer)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UsageError, match=r"unknown tokenizer 'tubes': use one of .*image.*sequence.*tube"):
        TOKENIZERS.get("tubes")
    assert "tubes" not in TOKENIZERS
    assert set(NAMES) >= {"image", "sequence", "tube"}


PLUGIN = '''
"""A tokenizer of another distribution, which knows nothing of PatchTokenizer: chords, and one token of its own."""
import torch
from torch import nn


class Chords(nn.Module):
    def __init__(self, length, chord, channels, in_channels, dim):
        super().__init__()
        self.shape, self.chord = (channels, length), chord
        self.to_tokens = nn.Conv1d(in_channels, dim, chord, stride=chord)
        self.to_sound = nn.ConvTranspose1d(dim, channels, chord, stride=chord)
        self.extra = nn.Parameter(torch.randn(1, 1, dim))

    @classmethod
    def from_config(cls, config, in_channels):
        return cls(config.sequence_length, config.patch_size, config.channels, in_channels, config.dim)

    def token_grid(self, grid):
        return (grid[0] // self.chord + 1,)

    def tokenize(self, x):
        tokens = self.to_tokens(x).transpose(1, 2)
        return torch.cat([self.extra.expand(len(x), -1, -1), tokens], dim=1)

    def detokenize(self, tokens, grid, x):
        return self.to_sound(tokens[:, 1:].transpose(1, 2))
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The distribution acme-chords, as installed by pip, on the path."""
    (tmp_path / "acme_chords.py").write_text(PLUGIN)
    info = tmp_path / "acme_chords-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-chords\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rin_video.tokenizers]\nchords = acme_chords:Chords\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(TOKENIZERS, "_objects", dict(TOKENIZERS._objects))
    yield "chords"
    sys.modules.pop("acme_chords", None)


def test_a_tokenizer_of_another_distribution_trains_and_samples(plugin):
    assert plugin in TOKENIZERS
    assert "acme_chords" not in sys.modules  # listing the names does not import the plug-in
    with pytest.raises(UsageError, match="use one of chords, image, sequence, tube"):
        RIN(dim=16, tokenizer="chord", sequence_length=16)
    assert "acme_chords" not in sys.modules

    model = RIN(
        dim=16, tokenizer=plugin, sequence_length=16, channels=2, num_latents=4, depth=1, num_heads=2,
        latent_num_heads=2, self_conditioning="latent+x0",
    )  # fmt: skip
    assert model.shape == (2, 16)
    diffusion = GaussianDiffusion(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.tokenizer.named_parameters()}
    diffusion(torch.rand(4, 2, 16)).backward()
    optimizer.step()
    assert all((p != before[name]).any() for name, p in model.tokenizer.named_parameters())
    samples = diffusion.sample(batch_size=2, steps=2, seed=0)
    assert samples.shape == (2, 2, 16)
    with pytest.raises(UsageError, match="conv_width is 8, but the tokenizer chords has no convolutions"):
        RIN(dim=16, tokenizer=plugin, sequence_length=16, channels=2, num_latents=4, conv_width=8)
    assert 0 <= samples.min() <= samples.max() <= 1


def test_a_name_of_another_distribution_counts_as_taken(plugin):
    TOKENIZERS.get(plugin)
    with pytest.raises(ValueError, match="'chords'"):
        TOKENIZERS.register(plugin)(PatchTokenizer)
