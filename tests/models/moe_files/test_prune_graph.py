from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import UserError
from models.checkpoints.save import save_checkpoint
from models.graph.graph_state import read_graph
from models.moe_files.layout import read_moe_layout
from models.moe_files.prune_graph import edited_pairs, pruned_pairs, read_stored_graph, retire_stored_experts
from tests.support.tiny_graphs import graph_of, with_random_gains
from tests.support.tiny_moes import saved_moe


def stored(model, tokenizer, directory):
    save_checkpoint(model, tokenizer, directory)
    return read_moe_layout(directory)


def test_the_graph_on_the_disk_is_that_of_the_model(tmp_path, tiny_tokenizer):
    model = graph_of()
    model.config.graph_version = 5
    layout = stored(model, tiny_tokenizer, tmp_path)
    assert read_stored_graph(layout).digest() == read_graph(model).digest()


def test_a_mask_that_is_no_graph_is_refused(tmp_path, tiny_tokenizer):
    model = graph_of()
    model.expert_layers()[1].edges[3, 0] = True
    with pytest.raises(UserError, match="layer 1: expected an upper-triangular mask"):
        read_stored_graph(stored(model, tiny_tokenizer, tmp_path))


def test_edges_keep_what_they_pass_and_new_ones_pass_nothing(tmp_path, tiny_tokenizer):
    model = with_random_gains(graph_of())
    first, second = model.expert_layers()
    first.edges[0, 3] = False  # through 1 there is a way
    layout = stored(model, tiny_tokenizer, tmp_path)
    edited = retire_stored_experts(layout, {0: np.array([0, 2, 3]), 1: np.array([1, 3])})
    pairs, graph = pruned_pairs(layout, {0: np.array([0, 2, 3]), 1: np.array([1, 3])})
    assert graph is not None and graph.version == edited.graph.version == layout.config["graph_version"] + 1
    assert all(torch.equal(pairs[name], each) for name, each in edited_pairs(layout, edited).items())
    prefix = "model.layers.{}.mlp.{}"
    kept = torch.tensor([0, 2, 3])
    for name in ("edge_gain", "edge_affinity"):
        expected = getattr(first, name).detach()[kept][:, kept].clone()
        assert expected[0, 2] != 0
        expected[0, 2] = 0
        assert torch.equal(pairs[prefix.format(0, name)], expected)
        assert torch.equal(pairs[prefix.format(1, name)], getattr(second, name).detach()[1::2, 1::2])
    assert torch.equal(pairs[prefix.format(0, "edges")], torch.ones(3, 3, dtype=torch.bool).triu())
    assert len(pairs) == 6


def test_a_family_without_edges_has_no_pairs(tmp_path, tiny_tokenizer):
    layout = read_moe_layout(saved_moe("mixtral", tmp_path, tiny_tokenizer))
    assert pruned_pairs(layout, {0: np.array([0, 1]), 1: np.array([0, 1])}) == ({}, None)
