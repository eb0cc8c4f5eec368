"""Mixing of interface tokens: windows, rotary positions and convolutions, against what is computed token by token."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from rin_video import RIN, UsageError
from rin_video.config import ModelConfig
from rin_video.layers import attend, conv3d
from rin_video.model.core import RINCore
from rin_video.model.mixing import DenseConv, DepthwiseConv, LocalAttention, Windows, rotary_angles, rotate

GRIDS = [(7,), (4, 4), (5, 7), (4, 6, 5), (3, 4, 4), (1, 5, 6)]
WINDOWS = {1: [(4,), (0,)], 2: [(4, 4), (3, 0)], 3: [(0, 4, 4), (2, 3, 4), (0, 0, 0)]}


def perturb(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def window_numbers(grid, window, shifted):
    """Number the window of each token: those whose coordinates, moved by half a window, have equal quotients."""
    numbers = []
    for place in itertools.product(*map(range, grid)):
        number = []
        for p, n, w in zip(place, grid, window, strict=True):
            w = min(w or n, n)
            number.append((p + (w // 2 if shifted and w < n else 0)) // w)
        numbers.append(tuple(number))
    return numbers


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("which", range(3))
def test_local_attention_is_full_attention_with_a_mask(grid, shifted, which):
    windows = WINDOWS[len(grid)]
    window = windows[which % len(windows)]
    torch.manual_seed(0)
    layer = perturb(LocalAttention(12, 2, window, shifted=shifted, mlp_ratio=2, qk_norm=True))
    x = torch.randn(3, math.prod(grid), 12)
    numbers = window_numbers(grid, window, shifted)
    together = torch.tensor([[a == b for b in numbers] for a in numbers])
    places = torch.tensor(list(itertools.product(*map(range, grid))))
    size = Windows(grid, window, shifted).size
    table = rotary_angles(size, 6, x.device).view(*size, -1)
    # The place within a window only matters up to a constant per window: rotary scores depend on differences.
    before = [w // 2 if shifted and w < n else 0 for n, w in zip(grid, size, strict=True)]
    inside = (places + torch.tensor(before)) % torch.tensor(size)
    angle = table[tuple(inside.T)]
    q, k, v = layer.to_qkv(layer.norm(x)).view(3, len(numbers), 3, 2, 6).permute(2, 0, 3, 1, 4)
    q, k = rotate(layer.q_norm(q), angle), rotate(layer.k_norm(k), angle)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=together)
    expected = layer.feed_forward(x + layer.to_out(mixed.transpose(1, 2).flatten(2)))
    assert_close(layer(x, grid), expected, rtol=1e-4, atol=1e-5)


def test_rotary_scores_depend_on_differences_along_each_axis():
    angle = rotary_angles((4, 5), 16, torch.device("cpu")).view(4, 5, 8)
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def score(a, b):
        return rotate(q, angle[a].double()) @ rotate(k, angle[b].double())

    assert_close(score((0, 1), (2, 3)), score((1, 2), (3, 4)))
    for other in (((0, 1), (3, 3)), ((0, 1), (2, 4)), ((2, 3), (0, 1))):
        assert abs(score((0, 1), (2, 3)) - score(*other)) > 1e-3


def test_rotation_keeps_lengths_and_what_has_no_partner():
    x, angle = torch.randn(2, 6, 7), rotary_angles((2, 1, 3), 7, torch.device("cpu"))
    y = rotate(x, angle)
    assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert_close(y[..., 6], x[..., 6], rtol=0, atol=0)
    assert_close(y[:, 0], x[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_are_joined_as_they_were_split(grid):
    x = torch.randn(2, math.prod(grid), 12)
    for window, shifted in itertools.product(WINDOWS[len(grid)], (False, True)):
        cut = Windows(grid, window, shifted)
        assert_close(cut.join(cut.split(x, parts=1, heads=3)[0]), x, rtol=0, atol=0)


@pytest.mark.parametrize("built", [(4, 6, 5), (1, 6, 5), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("grid", [(4, 6, 5), (1, 5, 6), (4, 1, 1), (1, 1, 1), (5, 6), (1, 6)], ids=str)
def test_dense_conv_is_torchs_convolution(grid, built):
    torch.manual_seed(0)
    layer = perturb(DenseConv(8, built))
    assert layer.weight.shape[2:] == {4: (3, 3, 3), 1: (1, 3, 3)}[built[0]] if max(built) > 1 else (1, 1, 3)
    x = torch.randn(2, math.prod(grid), 8)
    full = (1,) * (3 - len(grid)) + grid
    maps = layer.norm(x).transpose(1, 2).reshape(2, 8, *full)
    padding = [size // 2 for size in layer.weight.shape[2:]]
    mixed = F.conv3d(maps, layer.weight, layer.bias, padding=padding).flatten(2).transpose(1, 2)
    assert_close(layer(x, grid), x + layer.to_out(F.gelu(mixed)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda dim, grid: DenseConv(dim, grid), lambda dim, grid: DepthwiseConv(dim, 3)])
@pytest.mark.parametrize("grid", [(1, 16, 16), (2, 16, 16), (3, 16, 16)], ids=str)
def test_gradients_of_convolutions_in_bfloat16(grid, make):
    """As wide as it takes for the wrong gradients of oneDNN's 3D convolutions to show."""
    torch.manual_seed(0)
    layer = perturb(make(384, (3, 16, 16)))
    x, weight = torch.randn(2, math.prod(grid), 384), torch.randn(2, math.prod(grid), 384)
    grads = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(x, grid)
        (out.float() * weight).sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]))
    assert (grads[1] - grads[0]).norm() < 0.02 * grads[0].norm()


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 3)], ids=str)
def test_the_3d_convolution_in_bfloat16_is_that_in_float32(kernel):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 4, 6, 7), torch.randn(8, 5, *kernel), torch.randn(8)
    expected = F.conv3d(x, weight, bias, padding=[size // 2 for size in kernel])
    assert_close(conv3d(x, weight, bias), expected, rtol=0, atol=0)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parts = (x, weight, bias) if autocast else (x.bfloat16(), weight.bfloat16(), bias.bfloat16())
            found = conv3d(*parts)
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_agrees_with_float64_in_both_directions(masked):
    torch.manual_seed(0)
    mask = None
    if masked:
        mask = torch.rand(3, 1, 1, 10) < 0.7
        mask[..., 0] = True
    inputs = [torch.randn(6, 2, n, 8) for n in (7, 10, 10)]
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = attend(q, k, v, mask)
        out.float().square().sum().backward()
        found[dtype] = [out, q.grad, k.grad, v.grad]
    for half, exact in zip(found[torch.bfloat16], found[torch.float64], strict=True):
        assert (half.double() - exact).norm() < 0.02 * exact.norm()


def test_shifts_alternate_through_the_model_and_groups_never_shift():
    def shifts(mixing):
        config = ModelConfig(dim=16, num_heads=2, depth=3, num_latents=4, interface_mixing=mixing, interface_layers=3)
        core = RINCore(config, (2, 4, 4))
        return [layer.shifted for block in core.blocks for layer in block.mixers]

    assert shifts("local_attention") == [False, True, False, True, False, True, False, True, False]
    assert not any(shifts("group"))


def test_windows_of_wrong_length_are_refused():
    options = {"image_size": 8, "patch_size": 4, "dim": 16, "num_latents": 4, "interface_mixing": "group"}
    with pytest.raises(UsageError, match=r"interface_window is .*must have 2 numbers"):
        RIN(**options, interface_window=[2, 2, 2])
    with pytest.raises(UsageError, match="whole numbers, 0 for all"):
        RIN(**options, interface_window=[2, -1])
