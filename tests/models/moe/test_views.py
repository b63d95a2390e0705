"""One view on the experts of a model, whatever holds them."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from models.families.family import RouterKind
from models.families.table import router_kind
from models.moe.views import moe_layers
from tests.conftest import tiny_llama
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of
from tests.support.tiny_moes import FAMILIES, tiny_moe

KINDS = {
    "mixtral": RouterKind.SOFTMAX_TOP_K_RENORMALIZED,
    "qwen2_moe": RouterKind.SOFTMAX_TOP_K,
    "qwen3_moe": RouterKind.SOFTMAX_TOP_K_RENORMALIZED,
    "olmoe": RouterKind.SOFTMAX_TOP_K,
    "granitemoe": RouterKind.TOP_K_SOFTMAX,
    "granitemoeshared": RouterKind.TOP_K_SOFTMAX,
    "deepseek_v3": RouterKind.SIGMOID_BIASED,
    "glm4_moe": RouterKind.SIGMOID_BIASED,
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_layers_router_and_experts(family):
    model = tiny_moe(family)
    layers = moe_layers(model)
    first = model.config.num_hidden_layers - 2
    assert [(layer.ordinal, layer.decoder) for layer in layers] == [(0, first), (1, first + 1)]
    for layer in layers:
        assert layer.kind is KINDS[family] and layer.top_k == 2 and layer.fused
        assert layer.num_experts == layer.experts.num_experts == layer.experts.down_proj.shape[0]
        assert layer.router_weight.shape == (layer.num_experts, 32)
        assert (layer.selection_bias is not None) == (layer.kind is RouterKind.SIGMOID_BIASED)


def read_all(layer):
    return [torch.cat([part.flatten() for part in layer.read(e)]) for e in range(layer.num_experts)]


@torch.no_grad()
@pytest.mark.parametrize("storage", ["fused", "modules", "graph"])
def test_what_is_written_is_read_and_runs(storage):
    fused = tiny_moe("qwen3_moe")
    model = {"fused": fused, "modules": with_module_experts(fused), "graph": graph_of()}[storage]
    layer = moe_layers(model)[1]
    before = read_all(layer)
    gate_up, down = (torch.randn(part.shape) for part in layer.read(2))
    layer.write(2, gate_up, down)
    assert torch.equal(layer.read(2)[0], gate_up) and torch.equal(layer.read(2)[1], down)
    for part, expected in zip(layer.read_numpy(2), (gate_up, down), strict=True):
        assert part.dtype == "float32" and (part == expected.numpy()).all()
    for expert, (one, other) in enumerate(zip(before, read_all(layer), strict=True)):
        assert torch.equal(one, other) == (expert != 2)
    rows = torch.randn(5, 32)
    gate, up = (rows @ gate_up.T).chunk(2, -1)
    torch.testing.assert_close(layer.run(2, rows), (torch.nn.functional.silu(gate) * up) @ down.T)


def test_a_graph_walks():
    layers = moe_layers(graph_of(num_experts=4, visits=3))
    assert [layer.kind for layer in layers] == [RouterKind.GRAPH_WALK] * 2
    assert [layer.top_k for layer in layers] == [3, 3] and not layers[0].fused


def test_a_layer_with_fewer_experts_than_top_k_visits_all():
    assert moe_layers(tiny_moe("mixtral", num_local_experts=1, num_experts_per_tok=1))[0].top_k == 1


def test_a_dense_model_is_refused():
    with pytest.raises(UserError, match="expected a model with experts"):
        moe_layers(tiny_llama())


@pytest.mark.parametrize("breaking", ["transposed", "bias", "router", "flat"])
def test_an_unknown_layout_is_refused(breaking):
    model = tiny_moe("mixtral")
    block = model.model.layers[1].mlp
    if breaking == "transposed":
        block.experts.is_transposed = True
    elif breaking == "bias":
        block.experts.has_bias = True
    elif breaking == "router":
        del block.gate
    else:
        block.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 10))
    with pytest.raises(UserError, match="decoder layer 1 .*not supported"):
        moe_layers(model)


def test_a_router_of_unknown_kind_is_refused():
    config = tiny_llama().config
    with pytest.raises(UserError, match="'llama'"):
        router_kind(config)
    config.norm_topk_prob = True
    assert router_kind(config) is RouterKind.SOFTMAX_TOP_K_RENORMALIZED
    config.scoring_func = "sigmoid"
    assert router_kind(config) is RouterKind.SIGMOID_BIASED
