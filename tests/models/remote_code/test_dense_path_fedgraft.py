from __future__ import annotations

import pytest
import torch
from torch import nn

from models.remote_code.dense_path_fedgraft import all_visit, run_all_visited
from models.remote_code.dispatch_fedgraft import dispatch
from models.remote_code.execution_fedgraft import FusedExperts
from models.remote_code.experts_fedgraft import ExpertGraphMLP

TOKENS, WIDTH, NEURONS = 7, 5, 3


def _inputs(experts: int, held: int, *, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(TOKENS, WIDTH), (TOKENS, experts), (held, 2 * NEURONS, WIDTH), (held, WIDTH, NEURONS)]
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize(("experts", "held"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [3, 1])])
def test_output_and_gradients_are_those_of_one_expert_after_the_other(experts, held):
    x, weights, gate_up, down = _inputs(len(held), len(held))
    order = torch.stack([torch.randperm(len(held)) for _ in range(TOKENS)])
    visits = dispatch(torch.tensor(held)[order], experts)
    gain = torch.zeros(experts, experts, dtype=torch.float64)
    expected = FusedExperts.apply(x, weights, gain, gate_up, down, visits, [], nn.SiLU(), held)
    found = run_all_visited(x, weights, visits, gate_up, down, nn.SiLU(), held)
    torch.testing.assert_close(found, expected)
    toward, inputs = torch.randn_like(found), (x, weights, gate_up, down)
    for one, other in zip(
        torch.autograd.grad(found, inputs, toward), torch.autograd.grad(expected, inputs, toward), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_all_visit():
    everywhere, not_everywhere = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1], [1, -1]])
    assert all_visit(dispatch(everywhere, 2), [0, 1], 2)
    assert not all_visit(dispatch(not_everywhere, 2), [0, 1], 2)
    assert all_visit(dispatch(not_everywhere, 2), [1], 2)


@pytest.mark.parametrize("trained", ["edge_gain", "gate_up_proj"])
def test_a_layer_takes_this_way_only_where_nothing_passes_along_edges(monkeypatch, trained):
    taken = []
    monkeypatch.setattr(
        "models.remote_code.weights_fedgraft.run_all_visited",
        lambda *args: taken.append(1) or run_all_visited(*args),
    )
    layer = ExpertGraphMLP(hidden_size=4, expert_size=2, num_experts=3, num_visits=3).requires_grad_(False)
    for weight in (layer.gate_up_proj, layer.down_proj, layer.router.weight):
        nn.init.normal_(weight)
    layer.edges |= torch.ones(3, 3, dtype=torch.bool).triu(1)
    getattr(layer, trained).requires_grad_(True)
    result = layer(torch.randn(6, 4))
    result.sum().backward()
    assert bool(taken) == (trained == "gate_up_proj")
    assert getattr(layer, trained).grad.abs().sum() > 0


def test_under_autocast_the_result_keeps_the_input_dtype():
    x, weights, gate_up, down = (each.float() for each in _inputs(2, 2))
    visits = dispatch(torch.tensor([[0, 1]] * TOKENS), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_all_visited(x, weights, visits, gate_up, down, nn.SiLU(), [0, 1])
    expected = run_all_visited(x, weights, visits, gate_up, down, nn.SiLU(), [0, 1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.2)
