from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.choices import ExportFormat
from configs.errors import UserError
from models.export.mixture import mixture_layers, mixture_model, scale_routers
from models.export.mixture_format import CONSTANT_GATE, FORMATS
from models.moe.remove import keep_experts
from models.moe.views import moe_layers
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, shared_graph_of

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BEST = {ExportFormat.MIXTRAL: 10, ExportFormat.QWEN2_MOE: 10, ExportFormat.GRANITE_MOE: 20}
BOUND = {ExportFormat.MIXTRAL: 5e-3, ExportFormat.QWEN2_MOE: 5e-3, ExportFormat.GRANITE_MOE: 1e-4}


def exported(graph, to, tmp_path, *, equalise=False, exponent=None):
    """Export as it is written and loaded by transformers."""
    layers = mixture_layers(graph, to, random_ids(graph), equalise=equalise)
    model = mixture_model(graph, to, layers, BEST[to] if exponent is None else exponent)
    model.save_pretrained(tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is FORMATS[to].model and not report["missing_keys"] and not report["unexpected_keys"]
    return loaded.eval()


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["routed", "shared", "tied", "wide heads and llama3"])
def test_the_loaded_export_computes_what_the_graph_computes(tmp_path, to, kind):
    base = {
        "tied": {"tie_word_embeddings": True},
        "wide heads and llama3": {"head_dim": 16, "rope_parameters": LLAMA3},
    }
    dense = tiny_llama(**base.get(kind, {}))
    graph = shared_graph_of(dense, default_rank=0) if kind == "shared" else graph_of(dense, visits=2)
    found = exported(graph, to, tmp_path)
    assert logit_difference(graph, found, random_ids(graph)) < BOUND[to]


@pytest.mark.parametrize("to", FORMATS)
def test_with_every_expert_visited_the_export_is_exact(tmp_path, to):
    graph = graph_of()
    found = exported(graph, to, tmp_path, exponent=24)
    assert logit_difference(graph, found, random_ids(graph)) < 2e-5


@pytest.mark.parametrize("to", [ExportFormat.QWEN2_MOE, ExportFormat.GRANITE_MOE])
def test_biases_of_the_attention_go_along(tmp_path, to):
    graph = graph_of(tiny_llama(attention_bias=True), visits=2)
    for layer in graph.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
        layer.self_attn.o_proj.bias.data.zero_()
    assert logit_difference(graph, exported(graph, to, tmp_path), random_ids(graph)) < BOUND[to]


def test_the_gate_of_the_shared_expert_is_a_constant_other_than_zero(tmp_path):
    found = exported(graph_of(visits=2), ExportFormat.QWEN2_MOE, tmp_path)
    for layer in found.model.layers:
        assert layer.mlp.shared_expert_gate.weight.unique().tolist() == [CONSTANT_GATE]
        assert not layer.mlp.shared_expert.down_proj.weight.any()
        assert all(not getattr(layer.self_attn, name).bias.any() for name in ("q_proj", "k_proj", "v_proj"))


@pytest.mark.parametrize("to", FORMATS)
def test_layers_with_fewer_experts_are_refused_or_padded(tmp_path, to):
    dense = tiny_llama()
    dense.model.embed_tokens.weight.data[
        :, 0
    ] += 4  # hidden states of language models have a common component, too
    graph = graph_of(dense, visits=3)
    keep_experts(graph, {1: torch.tensor([0, 2]).numpy()})
    with pytest.raises(UserError, match="4, 2 experts and 3, 2 visits; set `equalise`"):
        mixture_layers(graph, to, random_ids(graph))
    found = exported(graph, to, tmp_path, equalise=True)
    assert [view.num_experts for view in moe_layers(found)] == [4, 4]
    assert logit_difference(graph, found, random_ids(graph)) < BOUND[to]


def test_copies_of_many_shared_neurons_are_refused():
    graph = shared_graph_of(num_experts=16, num_shared=4, default_rank=0)
    with pytest.raises(UserError, match="16 shared neurons.* mixtral.* set `to` to qwen2-moe or granite-moe"):
        mixture_layers(graph, ExportFormat.MIXTRAL, random_ids(graph))
    assert mixture_layers(graph, ExportFormat.GRANITE_MOE, random_ids(graph))[0].shared_down_DS.shape == (
        32,
        16,
    )


def test_router_rows_are_scaled_by_a_power_of_two_and_rounded():
    graph = graph_of(visits=2)
    layers = mixture_layers(graph, ExportFormat.MIXTRAL, random_ids(graph))
    model = mixture_model(graph, ExportFormat.MIXTRAL, layers, 3)
    rows = [view.router_weight.clone() for view in moe_layers(model)]
    for row, layer in zip(rows, graph.expert_layers(), strict=True):
        assert torch.equal(row, layer.router.weight / 8)
    scale_routers(model, layers, 10, torch.bfloat16)
    for view, layer in zip(moe_layers(model), graph.expert_layers(), strict=True):
        assert torch.equal(view.router_weight, (layer.router.weight * 2**-10).bfloat16().float())
