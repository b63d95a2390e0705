from __future__ import annotations

import math

import pytest
import torch

from models.graph.runtime_settings import observing_walks, set_walk
from server.reporting.call_trace import call_trace
from tests.support.reference_walk import walk_token
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains

KEYS = {"sequence", "layer", "token", "experts", "parents", "weights"}


@pytest.fixture
def model():
    """Expert 3 of both layers cannot be reached, expert 2 along edges only."""
    graph = with_random_gains(graph_of(visits=4))
    for layer in graph.expert_layers():
        layer.edges[2, 2] = layer.edges[3, 3] = False
        layer.edges[:3, 3] = False
    return graph


@pytest.mark.parametrize("order", ["best-first", "depth-first"])
def test_the_walk_of_every_token_is_told_as_it_was(model, order):
    set_walk(model, order)
    ids = random_ids(model, 2, 5)
    scores: dict[int, list] = {}
    with (
        torch.no_grad(),
        observing_walks(
            model,
            lambda index: lambda layer, scores_TE, walk, weights: scores.update({index: scores_TE.tolist()}),
        ),
    ):
        model(input_ids=ids)
    entries = call_trace(model, ids, 10)
    places = [(entry["sequence"], entry["token"], entry["layer"]) for entry in entries]
    assert places == [(n, t, layer) for n in range(2) for t in range(5) for layer in range(2)]
    for entry in entries:
        assert set(entry) == KEYS
        layer = model.expert_layers()[entry["layer"]]
        row = scores[entry["layer"]][entry["sequence"] * 5 + entry["token"]]
        edges, affinity = layer.edges.numpy(), layer.edge_affinity.detach().numpy()
        visits = walk_token(row, edges, affinity, [True] * 4, 4, order)
        assert entry["experts"] == [visit.expert for visit in visits]
        assert entry["parents"] == [visit.parent for visit in visits]
        assert 3 not in entry["experts"]
        total = sum(math.exp(visit.score) for visit in visits)
        expected = [1 + layer.output_gain[v.expert].item() * math.exp(v.score) / total for v in visits]
        assert entry["weights"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("tokens", "entries"), [(0, 0), (1, 2), (5, 10), (6, 12), (99, 20)])
def test_as_many_tokens_are_told_as_asked_for(model, tokens, entries):
    assert len(call_trace(model, random_ids(model, 2, 5), tokens)) == entries


def test_the_model_is_left_unobserved(model):
    call_trace(model, random_ids(model, 1, 4), 4)
    assert all(layer.observers == [] for layer in model.expert_layers())
