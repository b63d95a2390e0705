"""Edits of graphs with shared experts, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from experts.graph.edge_edits import apply_edits, propose_edits
from experts.graph.edits import AddEdge, Edit, MergeExperts, RemoveEdge, RetireExpert
from experts.graph.expert_edits import apply_expert_edits
from experts.graph.expert_graph import ExpertGraph, reachable

SHARED = 2


def graph_of(*edges: tuple[int, int], num_experts: int = 6, shared: int = SHARED) -> ExpertGraph:
    mask = np.eye(num_experts, dtype=bool)
    for edge in edges:
        mask[edge] = True
    return ExpertGraph((mask,), 3, (shared,))


def without_shared(graph: ExpertGraph) -> ExpertGraph:
    return ExpertGraph(tuple(mask[SHARED:, SHARED:] for mask in graph.masks), graph.version)


@st.composite
def plans(draw) -> tuple[ExpertGraph, list[Edit], list[Edit]]:
    """Random graphs with edges between routed experts, removals, and the same in numbers of routed experts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    routed = draw(st.integers(1, 6))
    mask = np.eye(routed + SHARED, dtype=bool)
    mask[SHARED:, SHARED:] = np.triu(rng.random((routed, routed)) < draw(st.sampled_from([0.2, 0.6])))
    stays = rng.permutation(routed)[: rng.integers(1, routed + 1)]
    edits: tuple[list[Edit], list[Edit]] = [], []
    for gone in np.setdiff1d(np.arange(routed), stays).tolist():
        into = int(rng.choice(stays)) if rng.random() < 0.5 else None
        for plan, first in zip(edits, (SHARED, 0), strict=True):
            merge = None if into is None else MergeExperts(0, gone + first, into + first)
            plan.append(merge or RetireExpert(0, gone + first))
    return ExpertGraph((mask,), 1, (SHARED,)), *edits


@settings(max_examples=100, deadline=None)
@given(plans())
def test_removals_change_routed_experts_as_in_a_graph_without_shared_ones(case):
    graph, edits, plain = case
    edited, expected = apply_expert_edits(graph, edits), apply_expert_edits(without_shared(graph), plain)
    mask = edited.graph.masks[0]
    assert edited.graph.num_shared == (SHARED,)
    np.testing.assert_array_equal(mask[SHARED:, SHARED:], expected.graph.masks[0])
    np.testing.assert_array_equal(mask[:SHARED], np.eye(len(mask), dtype=bool)[:SHARED])
    assert edited.kept[0].tolist() == [*range(SHARED), *(expected.kept[0] + SHARED).tolist()]


def test_no_edge_is_bridged_to_a_shared_expert():
    # Hand-made edges 0 -> 2 -> 3, although shared experts have none after a bootstrap; 3 is no root.
    graph = graph_of((0, 2), (2, 3))
    graph.masks[0][3, 3] = False
    edited = apply_expert_edits(graph, [RetireExpert(0, 2)])
    np.testing.assert_array_equal(edited.graph.masks[0], np.eye(5, dtype=bool))


@pytest.mark.parametrize(
    "edit", [RetireExpert(0, 1), MergeExperts(0, 1, 3), MergeExperts(0, 3, 1), MergeExperts(0, 0, 1)]
)
def test_a_shared_expert_is_neither_removed_nor_merged(edit):
    with pytest.raises(UserError, match="layer 0, got [01], one of its 2 shared experts"):
        apply_expert_edits(graph_of(), [edit])


@pytest.mark.parametrize("edit", [AddEdge(0, 0, 1), AddEdge(0, 1, 4), RemoveEdge(0, 0, 3)])
def test_edges_of_shared_experts_are_not_edited(edit):
    with pytest.raises(UserError, match="the first 2 experts of layer 0 are shared"):
        apply_edits(graph_of((0, 3)), [edit])


def best_pair(usage: np.ndarray, mask: np.ndarray, shared: int) -> tuple[int, int]:
    """The most demanded missing edge between routed experts, written out."""
    pairs = [(p, q) for p in range(shared, len(mask)) for q in range(p + 1, len(mask)) if not mask[p, q]]
    return max(pairs, key=lambda pair: usage[pair])


@pytest.mark.parametrize("seed", range(10))
def test_the_server_proposes_edges_between_routed_experts_only(seed):
    rng = np.random.default_rng(seed)
    graph = graph_of((2, 3), (3, 5), (4, 5), (0, 2))
    usage = np.triu(rng.permutation(36).reshape(6, 6).astype(float))
    usage[:SHARED] += 1000
    first, *_ = propose_edits(graph, [usage], 1)
    assert (first.op, first.p, first.q) == ("add-edge", *best_pair(usage, graph.masks[0], SHARED))
    edits = propose_edits(graph, [usage], 5)
    assert all(edit.p >= SHARED for edit in edits)
    edited = apply_edits(graph, edits)
    assert edited.num_shared == (SHARED,) and edited.version == 4
    np.testing.assert_array_equal(edited.masks[0][:SHARED], graph.masks[0][:SHARED])
    assert reachable(edited.masks[0]).all()


def test_shared_experts_are_part_of_a_graph_and_of_its_digest():
    mask = np.eye(3, dtype=bool)
    plain = ExpertGraph((mask,))
    assert plain.shared_per_layer == [0] and plain.digest() == ExpertGraph((mask,), 0, (0,)).digest()
    assert len({ExpertGraph((mask,), 0, (count,)).digest() for count in range(3)}) == 3
    held = ExpertGraph((mask,), 0, (1,)).restrict([np.array([True, False, True])])
    assert held.num_shared == (1,)
    with pytest.raises(UserError, match="for each of 1 layers, got 2"):
        ExpertGraph((mask,), 0, (1, 1))
