"""The family table against models of each family: stored names, opened modules, counts, router kind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from models.checkpoints.save import save_checkpoint
from models.families.family import RouterKind
from models.families.table import FAMILIES, family_of, router_kind
from models.moe.views import moe_layers
from models.moe_files.layout import read_moe_layout
from models.remote_code.configuration_fedgraft import FedGraftConfig
from tests.conftest import tiny_llama
from tests.support import tiny_moes
from tests.support.tiny_graphs import graph_of

# Of the tiny models, by the code of transformers.
KINDS = {
    "fedgraft": RouterKind.GRAPH_WALK,
    "mixtral": RouterKind.SOFTMAX_TOP_K_RENORMALIZED,
    "qwen2_moe": RouterKind.SOFTMAX_TOP_K,
    "qwen3_moe": RouterKind.SOFTMAX_TOP_K_RENORMALIZED,
    "olmoe": RouterKind.SOFTMAX_TOP_K,
    "granitemoe": RouterKind.TOP_K_SOFTMAX,
    "granitemoeshared": RouterKind.TOP_K_SOFTMAX,
    "deepseek_v3": RouterKind.SIGMOID_BIASED,
    "glm4_moe": RouterKind.SIGMOID_BIASED,
}


@pytest.fixture(params=[(name, original) for name in FAMILIES for original in (True, False)], ids=str)
def saved(request, tmp_path, tiny_tokenizer):
    """Model type, opened model, and its folder; stored under the names of the hub or fused."""
    name, original = request.param
    if name == FedGraftConfig.model_type:
        model = graph_of(visits=2)
        save_checkpoint(model, tiny_tokenizer, tmp_path)
    else:
        model = tiny_moes.tiny_moe(name)
        model.save_pretrained(tmp_path, save_original_format=original)
    return name, model, tmp_path


def test_every_family_has_a_tiny_model():
    assert {*tiny_moes.FAMILIES, FedGraftConfig.model_type} == set(FAMILIES) == set(KINDS)


def test_stored_and_opened_layers_hold_the_same_experts_and_routers(saved):
    _, model, folder = saved
    layout, stored = read_moe_layout(folder), load_file(folder / "model.safetensors")
    opened = moe_layers(model)
    assert layout.decoder_layers == [layer.decoder for layer in opened] and len(opened) == 2
    assert layout.experts_per_layer == [layer.num_experts for layer in opened]
    for names, layer in zip(layout.layers, opened, strict=True):
        rows = [stored[name] for name in names.rows]
        assert torch.equal(rows[0], layer.router_weight)
        if layer.selection_bias is not None:
            assert torch.equal(rows[1], layer.selection_bias)
        for expert in range(layer.num_experts):
            gate_up, down = layer.read(expert)
            if names.fused:
                values = [stored[name][expert] for name in names.fused]
            else:
                gate, up, values_down = (stored[name] for name in names.own[expert])
                values = [torch.cat([gate, up]), values_down]
            assert torch.equal(values[0], gate_up) and torch.equal(values[1], down)


def test_counts_and_router_kind(saved):
    name, model, folder = saved
    family, values = FAMILIES[name], json.loads((folder / "config.json").read_text())
    assert family_of(model.config) is family and router_kind(model.config) is KINDS[name]
    layers = moe_layers(model)
    assert {layer.kind for layer in layers} == {KINDS[name]}
    counts = [layer.num_experts for layer in layers]
    found = [values[key] for key in family.count_keys if key in values]
    assert found and all(value == family.count_value(counts) for value in found)
    assert values[family.top_k_key] == layers[0].top_k == 2
    assert (layers[0].selection_bias is not None) == (KINDS[name] is RouterKind.SIGMOID_BIASED)
    assert family.groups is None or {family.groups.count_key, family.groups.selected_key} <= set(values)


def test_a_model_of_an_unlisted_type_is_viewed_by_common_names():
    model = tiny_moes.tiny_moe("olmoe")
    model.config.model_type = "unlisted"
    assert family_of(model.config) is family_of(tiny_llama().config) is not FAMILIES["olmoe"]
    assert [layer.num_experts for layer in moe_layers(model)] == [5, 5]
