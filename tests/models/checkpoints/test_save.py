from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.clustering import balanced_clusters
from experts.graph.expert_graph import ExpertGraph
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_graph
from models.checkpoints.save import (
    cast_weights,
    cluster_table,
    read_graph,
    save_graph,
    write_graph,
)
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains


def chain(num_experts: int) -> np.ndarray:
    """A mask with one root and the edges 0 -> 1 -> 2 ..."""
    mask = np.eye(num_experts, k=1, dtype=bool)
    mask[0, 0] = True
    return mask


def test_a_checkpoint_carries_its_code_and_its_tokenizer(tmp_path, tiny_tokenizer):
    save_graph(graph_of(), tiny_tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "configuration_fedgraft.py",
        "experts_fedgraft.py",
        "modeling_fedgraft.py",
        "routing_fedgraft.py",
    } <= names


def test_the_graph_read_is_the_graph_written(tmp_path, tiny_tokenizer):
    model = graph_of()
    graph = ExpertGraph((chain(4), np.triu(np.ones((4, 4), dtype=bool))), version=7)
    write_graph(model, graph)
    assert read_graph(model).digest() == graph.digest() and model.config.graph_version == 7
    save_graph(model, tiny_tokenizer, tmp_path)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_leaves_what_routes_in_fp32(dtype):
    model = cast_weights(graph_of(), dtype)
    exact = ("router", "edge_gain", "edge_affinity", "output_gain")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(exact) else dtype), name
    for layer in model.expert_layers():
        assert layer.edges.dtype == torch.bool and layer.neurons.dtype == torch.int64
    assert model.config.dtype == dtype == model.dtype
    assert torch.isfinite(model(input_ids=random_ids(model)).logits).all()


def test_tied_embeddings_stay_tied_when_cast():
    model = cast_weights(graph_of(tiny_llama(tie_word_embeddings=True)), torch.bfloat16)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_cluster_table_has_a_line_per_layer_and_the_mean():
    clusters = [
        balanced_clusters(np.random.default_rng(seed).normal(size=(12, 3)), count)
        for seed, count in enumerate((3, 4))
    ]
    lines = cluster_table(clusters).splitlines()
    assert lines[0].split() == ["layer", "experts", "neurons", "within", "between", "inertia"]
    for layer, (line, each) in enumerate(zip(lines[1:3], clusters, strict=True)):
        fields = line.split()
        assert fields[:3] == [str(layer), str(len(each.members)), str(12 // len(each.members))]
        figures = [each.variance_within, each.variance_between, each.inertia]
        assert [float(field) for field in fields[3:]] == pytest.approx(figures, abs=1e-4)
    mean = (clusters[0].inertia + clusters[1].inertia) / 2
    assert float(lines[3].split()[-1]) == pytest.approx(mean, abs=1e-4) and len(lines) == 4


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
    save_graph(graph, tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match=words):
        opener(str(tmp_path))
