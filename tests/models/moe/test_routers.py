"""Gates from router scores, against transformers' own routers."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from models.families.family import RouterKind
from models.moe.routers import all_gates, route, router_logits
from models.moe.views import moe_layers
from tests.support.tiny_graphs import graph_of
from tests.support.tiny_moes import FAMILIES, tiny_moe

VARIANTS: list[tuple[str, dict]] = [(family, {}) for family in FAMILIES]
VARIANTS += [("qwen3_moe", {"norm_topk_prob": False}), ("qwen2_moe", {"norm_topk_prob": True})]


@torch.no_grad()
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_route_is_what_transformers_router_does(family, overrides):
    x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    for layer in moe_layers(tiny_moe(family, **overrides)):
        _, expected_TK, expected_experts_TK = layer.router(x_TD)
        experts_TK, gates_TK = route(layer, router_logits(layer, x_TD))
        dense, expected = torch.zeros(2, 40, layer.num_experts)
        dense.scatter_(-1, experts_TK, gates_TK)
        expected.scatter_(-1, expected_experts_TK, expected_TK.float())
        torch.testing.assert_close(dense, expected)


@torch.no_grad()
def test_all_gates_of_softmax_sum_to_one_and_of_sigmoid_stand_alone():
    for family in ("mixtral", "glm4_moe"):
        layer = moe_layers(tiny_moe(family))[0]
        logits = torch.tensor([[0.0] * layer.num_experts])
        gates = all_gates(layer, logits)
        expected = 0.5 if layer.kind is RouterKind.SIGMOID_BIASED else 1 / layer.num_experts
        torch.testing.assert_close(gates, torch.full_like(gates, expected))


def test_groups_of_experts_and_graphs_are_refused():
    layer = moe_layers(tiny_moe("deepseek_v3", n_group=2, topk_group=1))[0]
    with pytest.raises(UserError, match="num_group = 2"):
        route(layer, torch.zeros(1, layer.num_experts))
    with pytest.raises(UserError, match="walk"):
        route(moe_layers(graph_of())[0], torch.zeros(1, 4))
