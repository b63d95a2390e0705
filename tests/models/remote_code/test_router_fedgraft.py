from __future__ import annotations

import pytest
import torch

from models.remote_code.experts_fedgraft import ROUTING
from models.remote_code.router_fedgraft import GraphRouter, opened_name, stored_name
from tests.support.tiny_graphs import graph_of, random_ids


def router(dtype: torch.dtype = torch.float32) -> GraphRouter:
    module = GraphRouter(hidden_size=8, num_experts=3, layer_index=5).to(dtype)
    torch.nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_logits_are_those_of_a_linear_map_in_fp32_or_wider(dtype):
    module, x = router(dtype), torch.randn(6, 8).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(x)
    assert logits.dtype == wide and logits.shape == (6, 3)
    torch.testing.assert_close(logits, (x.to(wide)[:, None] * module.weight.to(wide)).sum(-1))


def test_logits_that_are_not_finite_are_refused():
    module = router()
    with pytest.raises(FloatingPointError, match="layer 5"):
        module(torch.full((2, 8), float("inf")))


@pytest.mark.parametrize("length", [7, 1], ids=["many tokens", "one token"])
def test_a_forward_hook_sees_the_logits_and_can_replace_them(length):
    graph, seen = graph_of(visits=2).requires_grad_(False), []
    layer = graph.expert_layers()[1]
    ids = random_ids(graph, 1, length)
    before = graph(input_ids=ids).logits

    def keep(module, inputs, logits):
        seen.append(logits)
        return logits.flip(-1)

    with torch.no_grad():
        handle = layer.router.register_forward_hook(keep)
        changed = graph(input_ids=ids).logits
        handle.remove()
        after = graph(input_ids=ids).logits
    assert [each.shape for each in seen] == [(length, 4)]
    assert not torch.allclose(changed, before) and torch.allclose(after, before, atol=1e-6)


def test_routing_parameters_are_named_as_they_are_stored():
    layer = graph_of().expert_layers()[0]
    parameters = layer.routing_parameters()
    assert tuple(parameters) == ROUTING and parameters["router"] is layer.router.weight
    stored = {stored_name(f"model.layers.0.mlp.{name}") for name, _ in layer.named_parameters()}
    assert stored >= {f"model.layers.0.mlp.{name}" for name in ROUTING}


def test_names_of_checkpoints_and_of_opened_graphs_are_inverse_to_each_other():
    opened = list(graph_of().state_dict())
    stored = [stored_name(name) for name in opened]
    assert [opened_name(name) for name in stored] == opened
    assert "model.layers.1.mlp.router" in stored and not any(
        name.endswith("router.weight") for name in stored
    )
    changed = {name for name, other in zip(opened, stored, strict=True) if name != other}
    assert changed == {f"model.layers.{layer}.mlp.router.weight" for layer in (0, 1)}
