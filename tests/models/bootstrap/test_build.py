from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.choices import Features
from configs.errors import UserError
from experts.clustering import Clusters, balanced_clusters
from experts.graph.expert_graph import edges_by_lift
from models.bootstrap.build import (
    BootstrapOptions,
    build_graph,
    first_edges,
    fit_routers,
    fuse_gate_up,
    graph_config,
    neuron_features,
    order_by_activation,
    plan_experts,
)
from models.bootstrap.calibration import Calibration, neuron_statistics
from models.bootstrap.router_init import centroid_router, ridge_routers
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import ffn_inputs, graph_of, random_ids


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids(dense):
    return random_ids(dense, 8, 32)


@pytest.fixture(scope="module")
def experts(dense, ids):
    return plan_experts(dense, ids, BootstrapOptions(num_experts=8, experts_per_token=3))


def test_every_neuron_has_one_place_and_experts_fall_in_mean_activation(dense, ids, experts):
    means = neuron_statistics(dense, ids).mean_activation
    for layer, planned in enumerate(experts):
        members = planned.clusters.members
        assert members.shape == (8, 8) and sorted(members.flatten().tolist()) == list(range(64))
        activation = means[layer][torch.from_numpy(members)].mean(1)
        assert (activation.diff() <= 1e-7).all() and activation[0] > activation[-1]


def test_the_clusters_are_those_of_balanced_k_means_on_the_gate_rows(dense, experts):
    for layer, planned in zip(dense.model.layers, experts, strict=True):
        expected = balanced_clusters(layer.mlp.gate_proj.weight.detach().numpy(), 8)
        assert {tuple(rows) for rows in expected.members.tolist()} == {
            tuple(rows) for rows in planned.clusters.members.tolist()
        }
        assert planned.clusters.inertia == pytest.approx(expected.inertia)
        assert planned.seconds > 0


def test_the_clustering_can_be_that_of_the_package(dense, ids, experts):
    plan = BootstrapOptions(num_experts=8, experts_per_token=3, clustering="k-means-constrained")
    for layer, planned, flow in zip(dense.model.layers, plan_experts(dense, ids, plan), experts, strict=True):
        rows = layer.mlp.gate_proj.weight.detach().numpy()
        expected = balanced_clusters(rows, 8, clustering="k-means-constrained")
        found = {tuple(rows) for rows in planned.clusters.members.tolist()}
        assert found == {tuple(rows) for rows in expected.members.tolist()}
        assert found != {tuple(rows) for rows in flow.clusters.members.tolist()}


def test_numbering_reorders_the_clusters_and_nothing_else(dense, ids):
    statistics = neuron_statistics(dense, ids)
    members = np.arange(64).reshape(4, 16)
    clusters = Clusters(members, inertia=3.0, variance_within=2.0, variance_between=1.0)
    ordered = order_by_activation(clusters, statistics, 1)
    by_hand = sorted(
        members.tolist(), key=lambda rows: -sum(float(statistics.mean_activation[1][row]) for row in rows)
    )
    assert ordered.members.tolist() == by_hand
    assert (ordered.inertia, ordered.variance_within, ordered.variance_between) == (3.0, 2.0, 1.0)


@pytest.mark.parametrize(
    "kind, width",
    [("gate", 32), ("up", 32), ("down", 32), ("gate+up", 64), ("joint", 96), ("activation", 20)],
)
def test_features_have_a_row_per_neuron(dense, kind, width):
    mlp, profile = dense.model.layers[0].mlp, torch.randn(64, 20)
    features = neuron_features(mlp, kind, profile)
    assert features.shape == (64, width) and features.dtype == np.float32
    blocks = {"gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight.T}
    wanted = {"gate+up": ["gate", "up"], "joint": ["gate", "up", "down"], "activation": []}.get(kind, [kind])
    for place, name in enumerate(wanted):
        part = features[:, 32 * place : 32 * (place + 1)]
        np.testing.assert_array_equal(part, blocks[name].detach().numpy())
    if kind == "activation":
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("features", Features)
def test_every_kind_of_feature_gives_a_graph_equal_to_the_dense_model(dense, ids, features):
    router = "contribution" if features == Features.GATE_ACTIVATION else "ridge"
    graph = graph_of(dense, features=features, router=router)
    with torch.no_grad():
        difference = (graph(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max()
    assert difference < 1e-4


def test_routers_are_fitted_to_the_numbered_experts(dense, ids, experts):
    members = [torch.from_numpy(planned.clusters.members) for planned in experts]
    for planned, ridge in zip(experts, ridge_routers(dense, ids, members), strict=True):
        assert torch.equal(planned.router, ridge)
    for kind, reference in (
        ("ridge", ridge_routers(dense, ids, members)),
        (
            "centroid",
            [centroid_router(at.mlp, rows) for at, rows in zip(dense.model.layers, members, strict=True)],
        ),
    ):
        for got, expected in zip(fit_routers(Calibration(dense, ids), members, kind), reference, strict=True):
            assert torch.equal(got, expected)


def test_edges_come_from_what_the_router_selects_together(dense, ids, experts):
    routers = [planned.router for planned in experts]
    for layer, mask in enumerate(first_edges(dense, ids, routers, 3, 4)):
        chosen = (ffn_inputs(dense, ids, layer) @ routers[layer].T).topk(3, -1).indices
        selected = np.zeros((len(chosen), 8), dtype=bool)
        for token, row in enumerate(chosen.tolist()):
            selected[token, row] = True
        assert np.array_equal(mask, edges_by_lift(selected, 4))
        assert np.array_equal(mask, experts[layer].edges) and mask.sum() > 8


def test_a_plan_is_carried_out_the_same_again_and_side_by_side(dense, ids, experts):
    seen = []
    plan = BootstrapOptions(num_experts=8, experts_per_token=3, jobs=2)
    again = plan_experts(dense, ids, plan, on_layer=seen.append)
    assert seen == [0, 1]
    for one, other in zip(experts, again, strict=True):
        assert np.array_equal(one.clusters.members, other.clusters.members)
        assert torch.equal(one.router, other.router) and np.array_equal(one.edges, other.edges)


def test_the_graph_holds_the_dense_neurons_in_their_new_places(dense, experts):
    graph = build_graph(dense, experts, 3, base_fingerprint="f" * 64)
    assert graph.config.base_fingerprint == "f" * 64 and graph.config.experts_per_token == 3
    for layer, planned, source in zip(graph.expert_layers(), experts, dense.model.layers, strict=True):
        assert torch.equal(layer.neurons, torch.from_numpy(planned.clusters.members))
        assert torch.equal(layer.edges, torch.from_numpy(planned.edges))
        assert torch.equal(layer.router.weight, planned.router)
        for expert, place in ((0, 0), (5, 3)):
            neuron = int(layer.neurons[expert, place])
            assert torch.equal(layer.gate_up_proj[expert, place], source.mlp.gate_proj.weight[neuron])
            assert torch.equal(layer.gate_up_proj[expert, 8 + place], source.mlp.up_proj.weight[neuron])
            assert torch.equal(layer.down_proj[expert, :, place], source.mlp.down_proj.weight[:, neuron])
        fused = fuse_gate_up(source.mlp, layer.neurons)
        assert torch.equal(fused, layer.gate_up_proj)
        for gain in (layer.edge_gain, layer.edge_affinity, layer.output_gain):
            assert not gain.any()
    for name, value in dense.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(graph.state_dict()[name], value), name


def test_the_configuration_is_the_dense_ones_with_experts(dense):
    config = graph_config(tiny_llama(tie_word_embeddings=True, rope_parameters=None), [4, 4], 2)
    assert (config.num_experts, config.expert_size, config.experts_per_token) == ([4, 4], 16, 2)
    assert config.model_type == "fedgraft" and config.tie_word_embeddings
    inherited = graph_config(dense, [8, 8], 3)
    for name in (
        "vocab_size",
        "hidden_size",
        "num_key_value_heads",
        "rope_parameters",
        "rms_norm_eps",
        "eos_token_id",
    ):
        assert getattr(inherited, name) == getattr(dense.config, name), name


def test_settings_for_generation_come_along(dense, experts):
    source = tiny_llama()
    source.generation_config.eos_token_id = [1, 7]
    assert build_graph(source, experts, 3).generation_config.eos_token_id == [1, 7]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"features": "gates"}, "gate, up, down, gate\\+up, joint, activation or gate-activation.*'gates'"),
        ({"clustering": "k-means"}, "flow or k-means-constrained.*'k-means'"),
        ({"router": "riddle"}, "ridge, centroid or contribution.*'riddle'"),
        ({"experts_per_token": 9}, "between 1 and the 8 experts, got 9"),
        ({"experts_per_token": 0}, "between 1 and the 8 experts, got 0"),
        ({"edges_per_expert": -1}, "edges per expert.*-1"),
        ({"jobs": 0}, "jobs.*0"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        BootstrapOptions(**{"num_experts": 8, **wrong})


def test_half_of_the_experts_are_visited_where_nothing_else_is_said():
    assert [BootstrapOptions(num_experts=count).visits for count in (1, 2, 7, 16)] == [1, 1, 3, 8]


@pytest.mark.parametrize("count", [0, -4, 5, 128])
def test_a_count_that_does_not_divide_is_answered_with_the_nearest_that_do(dense, ids, count):
    with pytest.raises(UserError, match="divides the FFN width 64"):
        plan_experts(dense, ids, BootstrapOptions(num_experts=count))


def test_weights_that_are_not_finite_are_refused(ids):
    damaged = tiny_llama()
    damaged.model.layers[1].mlp.gate_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match="finite"):
        plan_experts(damaged, ids, BootstrapOptions(num_experts=4))


def test_a_graph_that_consumes_the_dense_model_takes_its_tensors_and_removes_its_ffns(ids, experts):
    dense = tiny_llama()
    copied = build_graph(dense, experts, 3)
    consuming = build_graph(dense, experts, 3, consume=True)
    attention = dense.model.layers[0].self_attn.q_proj.weight
    assert consuming.model.layers[0].self_attn.q_proj.weight.data_ptr() == attention.data_ptr()
    assert copied.model.layers[0].self_attn.q_proj.weight.data_ptr() != attention.data_ptr()
    assert all(layer.mlp is None for layer in dense.model.layers)
    torch.testing.assert_close(consuming(ids).logits, copied(ids).logits, rtol=0, atol=0)
