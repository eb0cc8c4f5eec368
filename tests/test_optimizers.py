"""The optimizers: Muon for all matrices of a size at once is Muon for each."""

import copy

import pytest
import torch
from timm.optim import Muon as OneByOne
from torch import nn

from rin_video.training.muon import Muon


class Several(nn.Module):
    """Matrices of equal and of transposed sizes, a convolution, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(12, 12)])
        self.conv = nn.Conv3d(8, 8, 3)
        self.unused = nn.Linear(8, 16)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.grad = None if "unused" in name else torch.randn(p.shape, generator=rng)
    optimizer.step()


@pytest.mark.parametrize("options", [{"nesterov": True}, {"weight_decay": 0.1}, {"ns_steps": 3}])
def test_muon_in_batches_is_muon(options):
    one, many = Several(), Several()
    optimizers = [OneByOne(one.parameters(), lr=0.01, **options), Muon(many.parameters(), lr=0.01, **options)]
    for seed in range(4):
        for model, optimizer in zip((one, many), optimizers, strict=True):
            step(model, optimizer, seed)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(a, b) or "unused" not in name
    assert not torch.equal(many.layers[0].weight, Several().layers[0].weight)


def test_muon_in_batches_continues_from_a_state_of_muon():
    one = Several()
    first = OneByOne(one.parameters(), lr=0.01, nesterov=True)
    for seed in range(2):
        step(one, first, seed)
    many = copy.deepcopy(one)
    second = Muon(many.parameters(), lr=0.01, nesterov=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(2, 4):
        step(one, first, seed)
        step(many, second, seed)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_muon_keeps_gradients_and_returns_the_loss():
    model = Several()
    optimizer = Muon(model.parameters(), lr=0.01)
    for seed in range(2):
        step(model, optimizer, seed)
    assert all(p.grad is not None for name, p in model.named_parameters() if "unused" not in name)
    assert optimizer.step(lambda: 7) == 7
