from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.graph.expert_graph import ExpertGraph
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_graph
from models.checkpoints.save import save_checkpoint
from models.graph.graph_state import read_graph, write_graph
from tests.support.tiny_graphs import graph_of, with_random_gains


def chain(num_experts: int) -> np.ndarray:
    """A mask with one root and the edges 0 -> 1 -> 2 ..."""
    mask = np.eye(num_experts, k=1, dtype=bool)
    mask[0, 0] = True
    return mask


def test_the_graph_read_is_the_graph_written(tmp_path, tiny_tokenizer):
    model = graph_of()
    graph = ExpertGraph((chain(4), np.triu(np.ones((4, 4), dtype=bool))), version=7)
    write_graph(model, graph)
    assert read_graph(model).digest() == graph.digest() and model.config.graph_version == 7
    save_checkpoint(model, tiny_tokenizer, tmp_path)
    assert read_graph(load_graph(str(tmp_path))).digest() == graph.digest()


def test_what_was_read_is_a_copy():
    model = graph_of()
    graph = read_graph(model)
    model.expert_layers()[0].edges.zero_()
    assert graph.masks[0].any()


def test_gains_of_edges_that_go_return_to_zero_and_the_others_stay():
    model = with_random_gains(graph_of())
    before = [(layer.edge_gain.clone(), layer.edge_affinity.clone()) for layer in model.expert_layers()]
    output = [layer.output_gain.clone() for layer in model.expert_layers()]
    write_graph(model, ExpertGraph((chain(4), chain(4))))
    for layer, (gain, affinity), weight in zip(model.expert_layers(), before, output, strict=True):
        for p in range(4):
            for q in range(4):
                kept = q == p + 1
                assert layer.edge_gain[p, q] == (gain[p, q] if kept else 0)
                assert layer.edge_affinity[p, q] == (affinity[p, q] if kept else 0)
        assert torch.equal(layer.output_gain, weight)
    write_graph(model, ExpertGraph((np.triu(np.ones((4, 4), dtype=bool)),) * 2))
    assert model.expert_layers()[0].edge_gain[0, 2] == 0


def test_a_graph_of_another_depth_is_refused():
    with pytest.raises(ValueError):
        write_graph(graph_of(), ExpertGraph((chain(4),)))


@pytest.mark.parametrize("opener", [load_graph, open_mapped])
@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [((1, 1), False, "layer 1: expected every expert within reach"), ((3, 0), True, "an edge 3 -> 0")],
)
def test_a_checkpoint_whose_masks_are_no_graph_is_refused(
    tmp_path, tiny_tokenizer, opener, entry, value, words
):
    graph = graph_of(num_experts=4)
    mask = graph.expert_layers()[1].edges
    mask.copy_(torch.eye(4, dtype=torch.bool))
    mask[entry] = value
    save_checkpoint(graph, tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match=words):
        opener(str(tmp_path))
