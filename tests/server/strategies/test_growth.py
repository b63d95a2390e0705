from __future__ import annotations

import numpy as np
import pytest

from experts.graph.edit_plan import apply_plan
from experts.graph.edits import AddEdge, SpawnExpert
from experts.graph.expert_graph import ExpertGraph
from server.strategies.growth import attached_visits, expert_loads, propose_retirements, propose_spawns

GRAPH = ExpertGraph(
    (np.eye(3, dtype=bool) | np.eye(3, k=1, dtype=bool), np.eye(3, dtype=bool)), num_shared=(0, 1)
)
USAGE = [np.array([[5, 2, 9], [0, 1, 4], [0, 0, 3]]), np.array([[50, 0, 0], [0, 6, 9], [0, 0, 7]])]


def test_the_load_of_an_expert_counts_entries_and_traversals_but_no_demand():
    assert [load.tolist() for load in expert_loads(GRAPH, USAGE)] == [[5, 3, 7], [50, 6, 7]]


def test_visits_of_attached_experts_are_over_the_mean_of_their_layer_without_shared_experts():
    graph = apply_plan(GRAPH, [SpawnExpert(0, 2, 3), SpawnExpert(1, 2, 3)]).graph
    usage = [np.pad(each, (0, 1)) for each in USAGE]
    usage[0][2, 3] = 5
    first, second = (ids[3] for ids in graph.ids_per_layer)
    assert attached_visits(graph, usage) == [
        {"layer": 0, "id": first, "visits_over_mean": 5 / ((5 + 3 + 7 + 5) / 4)},
        {"layer": 1, "id": second, "visits_over_mean": 0.0},
    ]
    assert attached_visits(graph, [0 * each for each in usage])[0]["visits_over_mean"] == 0.0
    assert attached_visits(GRAPH, USAGE) == attached_visits(graph, []) == []


@pytest.mark.parametrize(
    ("divergence", "most", "expected"),
    [
        ([0.1, 0.3], 1, [(1, 2)]),
        ([0.3, 0.1], 1, [(0, 2)]),
        ([0.1, 0.3], 5, [(1, 2), (0, 2)]),
        ([], 5, [(0, 2), (1, 2)]),
        ([0.1, 0.3], 0, []),
    ],
)
def test_experts_are_spawned_beside_the_most_visited_ones_of_the_layers_that_moved_most(
    divergence, most, expected
):
    edits = propose_spawns(GRAPH, USAGE, divergence, most=most, max_spawned=1)
    assert [(edit.layer, edit.parent) for edit in edits] == expected
    assert all(edit.expert == 3 for edit in edits)


def test_a_layer_grows_to_its_limit_and_no_expert_has_two():
    graph = apply_plan(GRAPH, [SpawnExpert(0, 2, 3)]).graph
    usage = [np.pad(USAGE[0], (0, 1)), USAGE[1]]
    assert {edit.layer for edit in propose_spawns(graph, usage, [], most=5, max_spawned=1)} == {1}
    first, _ = propose_spawns(graph, usage, [], most=5, max_spawned=2)
    assert (first.layer, first.parent, first.expert) == (0, 0, 4)


def test_a_layer_that_nobody_visits_does_not_grow():
    assert propose_spawns(GRAPH, [0 * each for each in USAGE], [], most=5, max_spawned=1) == []


def test_the_least_used_new_experts_retire_but_not_those_of_the_latest_plan():
    spawned = apply_plan(GRAPH, [SpawnExpert(0, 2, 3), SpawnExpert(1, 2, 3)]).graph
    usage = [np.pad(each, (0, 1)) for each in USAGE]
    usage[1][2, 3] = 1
    assert propose_retirements(spawned, usage, most=5, retire_below=0.5) == []
    graph = apply_plan(spawned, [AddEdge(0, 0, 2)]).graph
    edits = propose_retirements(graph, usage, most=5, retire_below=0.5)
    assert [(edit.layer, edit.expert) for edit in edits] == [(0, 3), (1, 3)]
    assert [edit.layer for edit in propose_retirements(graph, usage, most=1, retire_below=0.5)] == [0]
    assert [edit.layer for edit in propose_retirements(graph, usage, most=5, retire_below=0.05)] == [0]
    assert propose_retirements(graph, usage, most=5, retire_below=0.0) == []
