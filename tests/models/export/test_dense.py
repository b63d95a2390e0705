from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.checkpoints.load import load_dense
from models.checkpoints.save import cast_weights
from models.export.dense import dense_config, dense_weights, not_representable
from models.files.fingerprint import fingerprint
from models.moe.remove import keep_experts
from tests.conftest import tiny_llama
from tests.models.export.dense_export import export_dense
from tests.support.tiny_graphs import (
    graph_of,
    logit_difference,
    random_ids,
    shared_graph_of,
    with_random_gains,
)


@pytest.mark.parametrize(
    "family",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "head_dim": 16},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untouched_graph_leaves_as_the_dense_model_bit_for_bit(tmp_path, family, dtype):
    tiny_llama(**family).to(dtype).save_pretrained(tmp_path / "dense")
    wide, dense = (load_dense(str(tmp_path / "dense"), dtype=kind) for kind in (torch.float32, dtype))
    exported = export_dense(cast_weights(graph_of(wide), dtype))
    assert exported.exact and exported.not_representable == [] and exported.max_logit_difference < 1e-4
    exported.model.save_pretrained(tmp_path / "exported")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    assert loaded.dtype == dtype and fingerprint(loaded) == fingerprint(dense)
    assert logit_difference(loaded, dense, random_ids(dense)) == 0


def test_the_exported_folder_is_a_plain_llama(tmp_path):
    dense = tiny_llama()
    export_dense(graph_of(dense)).model.save_pretrained(tmp_path)
    loaded = load_dense(str(tmp_path))
    assert type(loaded.config) is LlamaConfig and loaded.config.architectures == ["LlamaForCausalLM"]
    for name in ("num_experts", "expert_size", "walk", "base_fingerprint", "auto_map"):
        assert name not in (tmp_path / "config.json").read_text()
    for name, value in dense.config.to_dict().items():
        if name not in ("_name_or_path", "dtype", "architectures"):
            assert loaded.config.to_dict()[name] == value, name


def test_settings_for_generation_go_along():
    graph = graph_of()
    graph.generation_config.eos_token_id = [1, 9]
    assert export_dense(graph).model.generation_config.eos_token_id == [1, 9]


def test_fewer_visits_and_closed_roots_do_not_change_what_is_exported():
    dense = tiny_llama()
    graph = graph_of(dense, visits=1)
    exported = export_dense(graph)
    assert exported.exact and fingerprint(exported.model) == fingerprint(dense)
    assert [layer.num_visits for layer in graph.expert_layers()] == [1, 1]
    layer = graph.expert_layers()[0]
    layer.edges[2, 2] = False
    layer.edges[0, 2] = True
    assert export_dense(graph).exact and export_dense(graph).max_logit_difference < 1e-4


def test_what_a_dense_model_cannot_hold_is_named_with_its_layers_and_measured():
    graph = graph_of()
    layers = graph.expert_layers()
    layers[1].edges[0, 1] = True
    layers[1].edge_gain.data[0, 1] = 0.5
    exported = export_dense(graph)
    assert not exported.exact and exported.max_logit_difference > 1e-3
    (line,) = exported.not_representable
    assert "edge gains" in line and line.endswith("layers 1")
    for layer in layers:
        layer.output_gain.data[3] = 0.5
    exported = export_dense(graph)
    named = {line.split("(")[1].split(" are")[0]: line for line in exported.not_representable}
    assert set(named) == {"edge gains", "output gains"}
    assert named["edge gains"].endswith("layers 1") and named["output gains"].endswith("layers 0, 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_experts_leave_exactly_and_default_outputs_only_stand_for_removed_experts(dtype):
    dense = tiny_llama().to(dtype)
    graph = cast_weights(shared_graph_of(dense.float()), dtype)
    exported = export_dense(graph)
    assert exported.exact and exported.max_logit_difference < 1e-4
    assert fingerprint(exported.model) == fingerprint(dense.to(dtype))
    assert not {"default_rank", "default_experts", "num_shared"} & set(exported.model.config.to_dict())
    keep_experts(graph, {1: np.arange(6)})
    exported = export_dense(graph)
    assert exported.not_representable == ["default outputs in place of removed experts: layers 1"]
    assert exported.max_logit_difference > 1e-3


def test_the_difference_is_that_of_the_graph_with_every_expert_active():
    graph = with_random_gains(graph_of(visits=4))
    exported = export_dense(graph, probe_tokens=30, seed=4)
    ids = torch.randint(64, (1, 30), generator=torch.Generator().manual_seed(4))
    assert exported.max_logit_difference == pytest.approx(
        logit_difference(graph, exported.model, ids), rel=1e-4
    )


def test_gains_of_closed_edges_and_affinities_with_all_visited_pass_nothing():
    graph = graph_of()
    layer = graph.expert_layers()[0]
    layer.edges.copy_(torch.eye(4, dtype=torch.bool))
    layer.edge_gain.data.fill_(0.5)
    layer.edge_affinity.data.fill_(0.5)
    exported = export_dense(graph)
    assert exported.exact and exported.max_logit_difference < 1e-4


def test_experts_that_no_walk_reaches_are_named_and_measured():
    graph = graph_of()
    graph.expert_layers()[1].edges.copy_(torch.tensor([1, 1, 0, 1], dtype=torch.bool).diag())
    exported = export_dense(graph)
    assert not exported.exact and exported.max_logit_difference > 1e-3
    assert ["no walk reaches" in line for line in exported.not_representable] == [True]
    assert not_representable(graph) == exported.not_representable


def test_layers_of_different_width_are_padded_with_neurons_that_do_nothing():
    graph = graph_of()
    layer = graph.expert_layers()[1]
    layer.hold(range(3), layer.gate_up_proj[:3].detach().clone(), layer.down_proj[:3].detach().clone())
    layer.router.weight = torch.nn.Parameter(layer.router.weight[:3].clone())
    layer.output_gain = torch.nn.Parameter(layer.output_gain[:3].clone())
    layer.edge_gain = torch.nn.Parameter(torch.zeros(3, 3))
    layer.edge_affinity = torch.nn.Parameter(torch.zeros(3, 3))
    layer.edges, layer.neurons = torch.eye(3, dtype=torch.bool), layer.neurons[:3].clone()
    graph.config.num_experts, layer.num_visits = [4, 3], 3
    exported = export_dense(graph)
    assert exported.exact and exported.max_logit_difference < 1e-4
    assert exported.model.config.intermediate_size == 64
    assert not exported.model.model.layers[1].mlp.gate_proj.weight[48:].any()


def test_spawned_neurons_follow_behind_those_with_a_place():
    graph = graph_of()
    layer = graph.expert_layers()[0]
    layer.neurons[1] = -1
    gate, up, down = dense_weights(layer, 64)
    assert gate.shape == up.shape == (64, 32) and down.shape == (32, 64)
    assert torch.equal(gate[48:], layer.gate_up_proj[1, :16]) and torch.equal(
        up[48:], layer.gate_up_proj[1, 16:]
    )
    assert torch.equal(down[:, 48:], layer.down_proj[1])
    rest = layer.neurons[layer.neurons >= 0].sort().values
    assert len(rest) == 48
    exported = export_dense(graph)
    assert exported.exact and exported.max_logit_difference < 1e-4


def test_spawned_neurons_follow_behind_those_whose_place_lies_beyond_the_width_left():
    graph = graph_of()
    for layer in graph.expert_layers():
        last = int(layer.neurons[:, 0].argmax())
        kept = torch.tensor([last, next(e for e in range(4) if e != last)])
        layer.hold(range(2), layer.gate_up_proj[kept].detach(), layer.down_proj[kept].detach())
        layer.router.weight = torch.nn.Parameter(layer.router.weight[kept].detach())
        layer.output_gain = torch.nn.Parameter(layer.output_gain[kept].detach())
        layer.edge_gain = torch.nn.Parameter(torch.zeros(2, 2))
        layer.edge_affinity = torch.nn.Parameter(torch.zeros(2, 2))
        layer.edges, layer.num_visits = torch.eye(2, dtype=torch.bool), 2
        layer.neurons = torch.stack([torch.arange(1000, 1016), torch.full((16,), -1)])
    graph.config.num_experts = [2, 2]
    gate, _, _ = dense_weights(graph.expert_layers()[0], 32)
    assert torch.equal(gate, graph.expert_layers()[0].gate_up_proj[:, :16].flatten(0, 1))
    exported = export_dense(graph)
    assert exported.exact and exported.max_logit_difference < 1e-4


def test_the_dense_configuration_drops_what_only_a_graph_has():
    config = dense_config(graph_of().config, 96)
    assert config.intermediate_size == 96 and config.model_type == "llama"
    assert not any(hasattr(config, name) for name in ("num_experts", "walk", "graph_version"))


def test_the_graph_is_left_as_it_was():
    graph = cast_weights(with_random_gains(graph_of(visits=2)), torch.bfloat16)
    before = fingerprint(graph)
    export_dense(graph)
    assert fingerprint(graph) == before and graph.dtype == torch.bfloat16
    assert [layer.num_visits for layer in graph.expert_layers()] == [2, 2]
