"""Muon for the linear layers with AdamW for the rest."""

import pytest
import torch
from torch import nn

from viscpm_hf.training.muon import MuonWithAdamW


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 7, bias=False))
    model[3].weight = nn.Parameter(torch.randn(7, 6))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        tokens = (torch.arange(5) + step) % 7
        nn.functional.cross_entropy(model(tokens), (tokens + 1) % 7).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_linear_layers_take_orthogonal_steps_and_the_rest_those_of_adamw(model):
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    train(model, MuonWithAdamW(model, lr=1e-2), 1)
    step = model[3].weight - before["3.weight"]
    values = torch.linalg.svdvals(step)
    # Newton-Schulz iterations take the singular values near 1 (the gradient of five tokens after a norm has four);
    # times 0.2 * sqrt(longer side) * lr.
    assert (values[:4] / (1e-2 * 0.2 * 7**0.5) - 1).abs().max() < 0.4
    for name in ("0.weight", "1.bias", "2.weight"):
        step = dict(model.named_parameters())[name] - before[name]
        assert torch.allclose(step[step.abs() > 1e-4].abs(), torch.tensor(1e-2), rtol=0.02), name


def test_a_tied_head_is_an_embedding():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    muon, adamw = MuonWithAdamW(model, lr=1e-2).parts
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert [p.shape for p in adamw.param_groups[0]["params"]] == [(7, 4)]


def test_a_scheduler_reaches_both_parts_also_after_loading(model):
    optimizer = MuonWithAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    other = MuonWithAdamW(model, lr=5e-1)
    other.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 0.0)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    train(model, other, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert scheduler.get_last_lr() == [0.0] * 3


def test_nothing_to_train(model):
    with pytest.raises(ValueError, match="no weights to train: all are frozen"):
        MuonWithAdamW(model.requires_grad_(False), lr=1e-2)
