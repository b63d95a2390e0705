"""Fitting experts to what their layer gave before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.moe.hooks import observing_experts
from models.moe.refit import RIDGE, block_output, refit_experts
from models.moe.views import moe_layers
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of
from tests.support.tiny_moes import FAMILIES, tiny_moe


def layer_and_tokens(model):
    torch.manual_seed(0)
    layer = moe_layers(model)[0]
    return layer, torch.randn(400, layer.router_weight.shape[1])


def spoil(layer, expert):
    """Write other down projections into an expert."""
    gate_up, down = layer.read(expert)
    layer.write(expert, gate_up, down + torch.randn_like(down) * down.std())


def error(layer, x, wanted):
    return float((block_output(layer, x) - wanted).norm() / wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "graph", "passing graph", "modules"])
def test_spoiled_experts_come_back(family):
    if family.endswith("graph"):
        model = graph_of(num_experts=4, visits=2)
        if family == "passing graph":
            block = moe_layers(model)[0].block
            block.edges.copy_(torch.ones(4, 4).triu().bool())
            block.edge_gain.copy_(0.3 * torch.ones(4, 4).triu(1))
    else:
        model = with_module_experts(tiny_moe("qwen3_moe")) if family == "modules" else tiny_moe(family)
    layer, x = layer_and_tokens(model)
    wanted = block_output(layer, x)
    for expert in (0, 2):
        spoil(layer, expert)
    before = error(layer, x, wanted)
    refit_experts(layer, [0, 2], x, wanted)
    assert error(layer, x, wanted) < 0.3 * before


@torch.no_grad()
def test_one_expert_is_a_ridge_regression(monkeypatch):
    monkeypatch.setattr("models.moe.refit.SWEEPS", 1)
    layer, x = layer_and_tokens(tiny_moe("mixtral"))
    wanted = block_output(layer, x) + 0.1 * torch.randn(400, x.shape[1])
    rows = {}
    with observing_experts([layer], lambda _, each: rows.update({each.expert: each})):
        missing = (wanted - block_output(layer, x))[rows[1].tokens].double().numpy()
    gate_up, down = (part.clone() for part in layer.read(1))
    gate, up = (x[rows[1].tokens] @ gate_up.T).chunk(2, -1)
    hidden = (layer.act_fn(gate) * up * rows[1].gates[:, None]).double().numpy()
    gram = hidden.T @ hidden
    expected = np.linalg.solve(gram + RIDGE * np.diag(gram).mean() * np.eye(len(gram)), hidden.T @ missing)
    refit_experts(layer, [1], x, wanted)
    np.testing.assert_allclose((layer.read(1)[1] - down).T, expected, atol=1e-4)
    assert torch.equal(layer.read(1)[0], gate_up)


@torch.no_grad()
def test_what_is_right_already_stays():
    layer, x = layer_and_tokens(tiny_moe("mixtral"))
    before = [layer.read(expert)[1].clone() for expert in range(4)]
    refit_experts(layer, range(4), x, block_output(layer, x))
    for expert, down in enumerate(before):
        torch.testing.assert_close(layer.read(expert)[1], down, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_expert_that_no_token_visits_stays():
    layer, x = layer_and_tokens(tiny_moe("mixtral"))
    wanted = block_output(layer, x) + 1
    scores = x @ layer.router_weight.T
    alone = x[scores.topk(2).indices.ne(3).all(-1)]
    down = layer.read(3)[1].clone()
    refit_experts(layer, [3], alone, wanted[: len(alone)])
    assert torch.equal(layer.read(3)[1], down)
