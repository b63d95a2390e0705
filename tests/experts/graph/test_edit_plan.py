"""Plans of edits of all kinds, against a walk through the plan in plain Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from experts.graph.edit_plan import apply_plan, renumber_units, spawned_last
from experts.graph.edits import (
    AddEdge,
    CloseRoot,
    Edit,
    MergeExperts,
    OpenRoot,
    RemoveEdge,
    RetireExpert,
    SpawnExpert,
    edits_from_dicts,
)
from experts.graph.expert_graph import ExpertGraph, reachable


def graph_of(*edges: tuple[int, int], num_experts: int = 4, version: int = 3) -> ExpertGraph:
    mask = np.eye(num_experts, dtype=bool)
    for edge in edges:
        mask[edge] = True
    return ExpertGraph((mask, mask.copy()), version)


def test_a_spawned_expert_is_the_last_one_and_attached_to_its_parent():
    plan = apply_plan(graph_of((0, 1)), [SpawnExpert(1, 2, 4)])
    assert plan.graph.num_experts == [4, 5] and plan.graph.version == 4
    assert plan.graph.attached == ((), (4,))
    assert plan.graph.masks[1][:, 4].tolist() == [False, False, True, False, False]
    assert plan.origins[0].tolist() == [0, 1, 2, 3] and plan.origins[1].tolist() == [0, 1, 2, 3, -1]
    assert plan.parents == ({}, {4: 2})


def test_identities_outlast_renumbering_and_are_not_used_again():
    spawned = apply_plan(graph_of(), [SpawnExpert(0, 2, 4)]).graph
    retired = apply_plan(spawned, [RetireExpert(0, 1), RetireExpert(0, 4)]).graph
    again = apply_plan(retired, [SpawnExpert(0, 0, 3)]).graph
    assert spawned.ids[0][:4] == (0, 1, 2, 3) and retired.ids[0] == (0, 2, 3)
    assert again.ids[0][:3] == (0, 2, 3) and again.ids[0][3] not in spawned.ids[0]
    assert len({graph.digest() for graph in (graph_of(), spawned, retired, again)}) == 4


def test_retirements_and_spawned_experts_of_one_plan_are_in_numbers_before_it():
    plan = apply_plan(
        graph_of(), [SpawnExpert(0, 3, 4), RetireExpert(0, 1), SpawnExpert(0, 0, 5), AddEdge(0, 2, 3)]
    )
    assert plan.origins[0].tolist() == [0, 2, 3, -1, -1]
    assert plan.parents[0] == {3: 2, 4: 0} and plan.graph.attached[0] == (3, 4)
    assert plan.graph.masks[0][1, 2]  # the edge 2 -> 3
    values = {(0, 0): "a", (0, 1): "b", (0, 3): "d", (0, -1): "rest", (1, 1): "e"}
    assert plan.renumber(values) == {(0, 0): "a", (0, 2): "d", (0, -1): "rest", (1, 1): "e"}


def test_an_attached_expert_whose_last_parent_retires_becomes_a_root():
    spawned = apply_plan(graph_of((0, 2)), [SpawnExpert(0, 2, 4), SpawnExpert(0, 3, 5)]).graph
    edited = apply_plan(spawned, [RetireExpert(0, 2), RetireExpert(0, 3)]).graph
    # 4 gets an edge from 0, a parent of its parent; 5 has none left.
    assert edited.attached[0] == (2,) and edited.masks[0][0, 2] and edited.masks[0][3, 3]


def test_roots_are_opened_and_closed():
    closed = apply_plan(graph_of((0, 1)), [CloseRoot(0, 1)]).graph
    assert not closed.masks[0][1, 1] and closed.masks[1][1, 1]
    assert apply_plan(closed, [OpenRoot(0, 1)]).graph.masks[0][1, 1]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([CloseRoot(0, 2)], "within reach of a root, got none for 2"),
        ([CloseRoot(0, 1), RemoveEdge(0, 0, 1)], "within reach of a root, got none for 1"),
        ([OpenRoot(0, 1)], "open already"),
        ([CloseRoot(0, 1), CloseRoot(0, 1)], "closed already"),
        ([OpenRoot(0, 4)], "known expert"),
        ([SpawnExpert(0, 2, 5)], "next expert of its layer, 4"),
        ([SpawnExpert(0, 2, 4), SpawnExpert(0, 2, 4)], "next expert of its layer, 5"),
        ([SpawnExpert(2, 2, 4)], "known layer"),
        ([SpawnExpert(0, 4, 5)], "known parent"),
        ([SpawnExpert(0, 2, 4), RetireExpert(0, 2)], "keep a spawned expert and its parent"),
        ([SpawnExpert(0, 2, 4), RetireExpert(0, 4)], "keep a spawned expert and its parent"),
        ([RetireExpert(0, 1), RetireExpert(0, 1)], "taken out once"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(edits, message):
    graph = graph_of((0, 1))
    before = graph.digest()
    with pytest.raises(UserError, match=message):
        apply_plan(graph, edits)
    assert graph.digest() == before


@pytest.mark.parametrize(
    "edit", [AddEdge(0, 0, 4), RemoveEdge(0, 2, 4), OpenRoot(0, 4), CloseRoot(0, 4), SpawnExpert(0, 4, 5)]
)
def test_attached_experts_are_not_rewired(edit):
    spawned = apply_plan(graph_of(), [SpawnExpert(0, 2, 4)]).graph
    with pytest.raises(UserError, match="attached|the router chooses"):
        apply_plan(spawned, [edit])


def random_plan(rng: np.random.Generator, graph: ExpertGraph) -> list[Edit]:
    """Edits that fit the graph: each is tried on the result of those before it."""
    plan: list[Edit] = []
    for _ in range(rng.integers(0, 8)):
        layer = int(rng.integers(len(graph.masks)))
        p, q = sorted(rng.choice(graph.num_experts[layer] + 2, 2, replace=False).tolist())
        kinds: list[Edit] = [
            AddEdge(layer, p, q),
            RemoveEdge(layer, p, q),
            OpenRoot(layer, p),
            CloseRoot(layer, q),
            SpawnExpert(layer, p, q),
            RetireExpert(layer, p),
            MergeExperts(layer, q, p),
        ]
        edit = kinds[rng.integers(len(kinds))]
        try:
            apply_plan(graph, [*plan, edit])
        except UserError:
            continue
        plan.append(edit)
    return plan


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(275200)  # removes the only edge to an expert without a root
def test_random_plans_keep_graphs_valid_and_equal_on_all_sides(seed):
    rng = np.random.default_rng(seed)
    graph = graph_of((0, 1), (1, 3), num_experts=5)
    for _ in range(4):
        plan = random_plan(rng, graph)
        received = edits_from_dicts(json.loads(json.dumps([edit.as_dict() for edit in plan])))
        applied, theirs = apply_plan(graph, plan), apply_plan(graph, received)
        after = applied.graph
        assert after.digest() == theirs.graph.digest() and after.version == graph.version + 1
        for layer, mask in enumerate(after.masks):
            assert np.array_equal(mask, np.triu(mask)) and reachable(mask).all()
            ids, before = after.ids_per_layer[layer], graph.ids_per_layer[layer]
            assert len(set(ids)) == len(ids) == len(mask)
            for origin, identity in zip(applied.origins[layer], ids, strict=True):
                assert identity == before[origin] if origin >= 0 else identity not in before
            for expert in after.attached_per_layer[layer]:
                assert not mask[expert].any() and mask[:, expert].any()
        graph = after


def test_a_client_without_the_parent_has_no_attached_expert():
    graph = apply_plan(graph_of(), [SpawnExpert(0, 2, 4), SpawnExpert(0, 3, 5)]).graph
    held = [np.array([True, True, False, True, True, True]), np.ones(4, dtype=bool)]
    assert graph.restrict(held).attached == ((5,), ())


def test_only_experts_of_the_latest_plan_count_as_spawned_last():
    graph = apply_plan(graph_of(), [SpawnExpert(0, 2, 4)]).graph
    later = apply_plan(graph, [SpawnExpert(0, 3, 5)]).graph
    assert [spawned_last(graph, 0, expert) for expert in range(5)] == [False] * 4 + [True]
    assert not spawned_last(later, 0, 4) and spawned_last(later, 0, 5)
    assert not spawned_last(graph_of(version=0), 0, 0)


@pytest.mark.parametrize(
    ("attached", "message"),
    [
        (((3,), ()), "layer 0: expected an attached expert to have edges to it"),
        (((), (9,)), "layer 1: expected an attached expert .* expert 9 of 4"),
        (((),), "one list of attached experts for each of 2 layers, got 1"),
    ],
)
def test_attached_experts_that_do_not_fit_the_graph_are_refused(attached, message):
    with pytest.raises(UserError, match=message):
        ExpertGraph(graph_of().masks, attached=attached)


def test_units_of_other_layers_and_units_that_are_no_experts_keep_their_numbers():
    values = {(0, 0): "a", (0, 2): "c", (1, 0): "d", (1, 1): "e", (1, -1): "rest"}
    moved = renumber_units(values, {1: [1, -1]})
    assert moved == {(0, 0): "a", (0, 2): "c", (1, 0): "e", (1, -1): "rest"}
