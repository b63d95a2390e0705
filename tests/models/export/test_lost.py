from __future__ import annotations

import torch

from models.export.lost import listed_by_layer, lost_in_mixture
from tests.support.tiny_graphs import graph_of, shared_graph_of, with_random_gains


def test_properties_are_listed_with_their_layers():
    assert listed_by_layer({"a": [0, 2], "b": [1]}) == ["a: layers 0, 2", "b: layers 1"]


def test_an_untrained_graph_without_default_outputs_loses_nothing():
    assert lost_in_mixture(graph_of(visits=2)) == []
    assert lost_in_mixture(shared_graph_of(default_rank=0)) == []


def test_default_outputs_are_lost_unless_every_expert_is_visited():
    graph = shared_graph_of()
    assert lost_in_mixture(graph) == ["default outputs of experts that a token does not visit: layers 0, 1"]
    graph.expert_layers()[1].num_visits = 8
    assert lost_in_mixture(graph) == ["default outputs of experts that a token does not visit: layers 0"]


def test_every_property_is_named_with_its_layers():
    graph = graph_of(visits=2)
    first, second = graph.expert_layers()
    first.edges.copy_(torch.ones(4, 4, dtype=torch.bool).triu())
    first.edge_gain.data[0, 1] = 1
    first.order = "depth-first"
    second.edge_affinity.data[0, 3] = 1  # without an edge it counts for nothing
    second.edges[0, 3] = False
    second.output_gain.data[2] = 1
    second.attached = [1]
    assert lost_in_mixture(graph) == [
        "information passed along edges (edge gains are not zero): layers 0",
        "the depth-first order of visits: layers 0",
        "outputs weighted by the router (output gains are not zero): layers 1",
        "attached experts, visited wherever their parents are: layers 1",
    ]


def test_closed_roots_and_affinities_matter_only_where_experts_are_left_out():
    graph = graph_of(visits=2)
    layer = graph.expert_layers()[0]
    layer.edges[0, 2], layer.edges[2, 2] = True, False
    layer.edge_affinity.data[0, 2] = 0.5
    assert lost_in_mixture(graph) == [
        "choices that depend on visited parents (edge affinities are not zero): layers 0",
        "experts that are reached along edges only (closed roots): layers 0",
    ]
    layer.num_visits = 4
    assert lost_in_mixture(graph) == []
    layer.edges[:, 2] = False
    assert lost_in_mixture(graph) == ["experts that no walk reaches: layers 0"]


def test_random_gains_are_named_for_all_layers():
    lines = lost_in_mixture(with_random_gains(graph_of(visits=2)))
    assert len(lines) == 3 and all(line.endswith("layers 0, 1") for line in lines)
