from __future__ import annotations

import pytest
import torch

from benchmarks.support.quality.runs import graph_parameters
from models.checkpoints.load import load_graph
from tests.support.tiny_federation import save_tiny_graph


@pytest.fixture
def graph(tmp_path, tiny_tokenizer):
    return load_graph(str(save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)))


def test_parameters_of_edges_train_where_a_layer_has_edges(graph):
    with_edges, without = graph.expert_layers()
    with_edges.edges = torch.ones(4, 4, dtype=torch.bool).triu()
    without.edges = torch.eye(4, dtype=torch.bool)
    names = set(graph_parameters(graph))
    both = {"gate_up_proj", "down_proj", "router.weight", "output_gain"}
    assert {name for name in names if name.startswith("1.")} == {f"1.{name}" for name in both}
    assert names >= {f"0.{name}" for name in (*both, "edge_gain", "edge_affinity")}
