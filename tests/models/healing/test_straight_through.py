from __future__ import annotations

import copy

import pytest
import torch

from models.healing.straight_through import soft_gates, straight_through
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids

IDS = random_ids(tiny_llama(), blocks=2, length=16)


def make(num_shared: int = 2, **more):
    """A graph of 8 experts, 5 a token."""
    graph = graph_of(num_experts=8, visits=5, router="contribution", num_shared=num_shared, **more)
    for layer in graph.expert_layers():
        layer.edge_gain.requires_grad_(False)
    return graph


def test_outputs_are_unchanged_and_the_context_leaves_nothing():
    graph = make()
    before = copy.deepcopy(graph)
    with straight_through(graph):
        logits = graph(input_ids=IDS).logits
        assert (logits - before(input_ids=IDS).logits).abs().max() < 1e-5
    assert not any("run_experts" in layer.__dict__ or layer.observers for layer in graph.expert_layers())
    assert logit_difference(graph, before, IDS) == 0.0


@pytest.mark.parametrize("num_shared", [0, 2])
def test_every_routed_expert_gets_the_gradient_of_its_weighted_output(num_shared):
    """Against the gradient of an explicit dense sum with sigmoid weights, of which outputs are constants."""
    graph = make(num_shared)
    layer = graph.expert_layers()[1]
    x_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    direction_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    with straight_through(graph):
        (layer(x_TD) * direction_TD).sum().backward()
    found = layer.router.weight.grad.clone()

    logits_TE = (x_TD @ layer.router.weight.T).detach().requires_grad_()
    outputs_TED = torch.stack([layer.run_expert(expert, x_TD) for expert in range(8)], 1).detach()
    visited = layer.walk(logits_TE.detach()).experts_TK
    visited_TE = torch.zeros(7, 8, dtype=torch.bool).scatter_(1, visited, True)
    gates_TE = soft_gates(logits_TE, visited_TE, num_shared)
    ((gates_TE[..., None] * outputs_TED).sum(1) * direction_TD).sum().backward()
    expected = logits_TE.grad.T @ x_TD
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert (found[num_shared:].abs().amax(1) > 0).all() and not found[:num_shared].any()


def test_gates_are_half_at_the_boundary_and_do_not_depend_on_the_scale_of_logits():
    logits_TE = torch.tensor([[9.0, 4.0, 2.0, 1.0]])
    visited_TE = torch.tensor([[True, True, False, False]])
    gates = soft_gates(logits_TE, visited_TE, 1)
    scale = torch.tensor([4.0, 2.0, 1.0]).std(correction=0)
    expected = torch.tensor([[1.0, *torch.sigmoid(torch.tensor([1.0, -1.0, -2.0]) / scale)]])
    torch.testing.assert_close(gates, expected)
    torch.testing.assert_close(soft_gates(10 * logits_TE + 3, visited_TE, 1), gates)
    assert soft_gates(logits_TE, torch.ones_like(visited_TE), 1).isfinite().all()
    assert soft_gates(torch.zeros(1, 4), visited_TE, 0).tolist() == [[0.5] * 4]


def test_layers_whose_edges_pass_information_keep_their_usual_gradient():
    graph = make()
    for layer in graph.expert_layers():
        layer.edges.fill_(True).triu_()
        with torch.no_grad():
            layer.edge_gain.fill_(0.1)
    with straight_through(graph):
        graph(input_ids=IDS, labels=IDS).loss.backward()
    assert not any(layer.router.weight.grad.any() for layer in graph.expert_layers())
