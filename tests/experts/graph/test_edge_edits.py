from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from experts.graph.edge_edits import apply_edits, propose_edits
from experts.graph.edits import (
    AddEdge,
    CloseRoot,
    MergeExperts,
    OpenRoot,
    RemoveEdge,
    RetireExpert,
    SpawnExpert,
    edits_from_dicts,
)
from experts.graph.expert_graph import ExpertGraph, check_mask, reachable

OPPOSITE = {AddEdge: RemoveEdge, RemoveEdge: AddEdge}


def graph_of(*edges: tuple[int, int], roots=(0, 1, 2, 3), num_experts=4, layers=1, version=3) -> ExpertGraph:
    """The same mask in every layer: these roots and these edges."""
    mask = np.zeros((num_experts, num_experts), dtype=bool)
    for e in roots:
        mask[e, e] = True
    for p, q in edges:
        mask[p, q] = True
    return ExpertGraph(tuple(mask.copy() for _ in range(layers)), version)


def counts(graph: ExpertGraph, layer: int = 0, **pairs: float) -> list[np.ndarray]:
    """Usage of every layer: zero but for pairs named like ``p0q2`` in ``layer``."""
    usage = [np.zeros(mask.shape) for mask in graph.masks]
    for name, value in pairs.items():
        p, q = (int(number) for number in name[1:].split("q"))
        usage[layer][p, q] = value
    return usage


@st.composite
def graphs_with_usage(draw) -> tuple[ExpertGraph, list[np.ndarray]]:
    """Random graphs, some of whose experts are closed roots, and random usage with many ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks, usage = [], []
    for num_experts in draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)):
        mask = np.triu(rng.random((num_experts, num_experts)) < draw(st.sampled_from([0.1, 0.5, 0.9])))
        masks.append(mask)
        usage.append(np.triu(rng.integers(0, draw(st.sampled_from([2, 5, 1000])), mask.shape)).astype(float))
    return ExpertGraph(tuple(masks), 1), usage


def test_edits_are_made_in_order_on_a_copy_one_version_on():
    graph = graph_of((0, 1), layers=2)
    before = graph.digest()
    edits = [RemoveEdge(1, 0, 1), AddEdge(1, 2, 3), AddEdge(0, 0, 3)]
    edited = apply_edits(graph, edits)
    assert edited.version == 4
    expected = (graph_of((0, 1), (0, 3)).masks[0], graph_of((2, 3)).masks[0])
    assert all(np.array_equal(mask, wanted) for mask, wanted in zip(edited.masks, expected, strict=True))
    assert graph.digest() == before
    assert not any(np.shares_memory(old, new) for old, new in zip(graph.masks, edited.masks, strict=True))


def test_an_edit_and_its_inverse_leave_the_masks_as_they_were():
    graph = graph_of((0, 1), (1, 3))
    edits = [RemoveEdge(0, 1, 3), AddEdge(0, 0, 2)]
    inverse = [OPPOSITE[type(edit)](edit.layer, edit.p, edit.q) for edit in reversed(edits)]
    back = apply_edits(apply_edits(graph, edits), inverse)
    assert np.array_equal(back.masks[0], graph.masks[0])
    assert back.version == graph.version + 2


def test_no_edit_is_a_version_of_its_own():
    assert apply_edits(graph_of(), []).version == 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("swap-edge", 0, 0, 1), "one of add-edge, remove-edge, .*, got 'swap-edge'"),
        (("retire-expert", 0, 1, 1), "one of add-edge, remove-edge, .*, got 'retire-expert'"),
        (("add-edge", 1, 0, 1), "known layer"),
        (("add-edge", -1, 0, 1), "known layer"),
        (("add-edge", 0, 0, 4), "experts p < q"),
        (("add-edge", 0, -1, 1), "experts p < q"),
        (("add-edge", 0, 2, 1), "experts p < q"),
        (("remove-edge", 0, 2, 2), "experts p < q"),
        (("add-edge", 0, 1, 2), "exists already"),
        (("remove-edge", 0, 0, 1), "does not exist"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(edit, message):
    graph = graph_of((1, 2))
    before = graph.digest()
    with pytest.raises(UserError, match=message):
        values = dict(zip(("op", "layer", "p", "q"), edit, strict=True))
        apply_edits(graph, [AddEdge(0, 0, 3), *edits_from_dicts([values])])
    assert graph.digest() == before


def test_the_same_edit_twice_is_refused():
    with pytest.raises(UserError, match="exists already"):
        apply_edits(graph_of(), [AddEdge(0, 0, 1)] * 2)


def test_edits_survive_json():
    edits = [AddEdge(0, 1, 2, "why"), RemoveEdge(3, 0, 1)]
    assert edits_from_dicts(json.loads(json.dumps([edit.as_dict() for edit in edits]))) == edits
    assert edits_from_dicts([]) == []


def test_edits_of_experts_name_both_experts_as_p_and_q():
    edits = [RetireExpert(1, 3, "idle"), MergeExperts(0, expert=4, into=2)]
    values = [edit.as_dict() for edit in edits]
    assert values == [
        {"op": "retire-expert", "layer": 1, "p": 3, "q": 3, "reason": "idle"},
        {"op": "merge-experts", "layer": 0, "p": 2, "q": 4, "reason": ""},
    ]
    assert edits_from_dicts(values) == edits and AddEdge(0, 1, 2) != RemoveEdge(0, 1, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AddEdge(0, 2, 2),
        lambda: RemoveEdge(-1, 0, 1),
        lambda: RetireExpert(0, -1),
        lambda: MergeExperts(0, 1, 1),
        lambda: MergeExperts(0, 1, -1),
        lambda: OpenRoot(0, -1),
        lambda: CloseRoot(-1, 0),
        lambda: SpawnExpert(0, 3, 3),
        lambda: SpawnExpert(0, -1, 3),
    ],
)
def test_an_edit_that_fits_no_graph_is_refused_at_construction(make):
    with pytest.raises(UserError, match="expected"):
        make()


@pytest.mark.parametrize(
    "value",
    [
        {"op": "add-edge", "layer": 0, "p": 0},
        {"op": "add-edge", "layer": 0, "p": 0, "q": 1, "more": 2},
        {"op": "add-edge", "layer": 0, "p": 0, "q": 1.0},
        {"op": "add-edge", "layer": 0, "p": 0, "q": "1"},
        {"op": "add-edge", "layer": None, "p": 0, "q": 1},
        {"op": "add-edge", "layer": 0, "p": False, "q": True},
        {"op": 1, "layer": 0, "p": 0, "q": 1},
        {"op": "add-edge", "layer": 0, "p": 0, "q": 1, "reason": 5},
        [],
        None,
        7,
        "add-edge",
    ],
)
def test_values_that_are_no_edit_are_refused(value):
    with pytest.raises(UserError, match="expected"):
        edits_from_dicts([value])


@pytest.mark.parametrize("values", [None, 7, {"op": "add-edge"}, "add-edge"])
def test_what_is_no_list_of_edits_is_refused(values):
    with pytest.raises(UserError, match="expected"):
        edits_from_dicts(values)


def test_the_most_demanded_edge_takes_the_place_of_the_least_traveled():
    graph = graph_of((0, 1), (0, 2), (1, 2))
    usage = counts(graph, p0q1=50, p0q2=3, p1q2=9, p0q3=7, p1q3=40, p0q0=999)
    edits = propose_edits(graph, usage, 2)
    assert [(edit.op, edit.p, edit.q) for edit in edits] == [("remove-edge", 0, 2), ("add-edge", 1, 3)]
    assert (edits[0].reason, edits[1].reason) == ("traveled by 3 tokens", "demanded by 40 tokens")
    # The next best swap, 1 -> 2 (9 tokens) for 0 -> 3 (7), would lose.
    assert propose_edits(graph, usage, 8) == edits


def test_swaps_of_all_layers_compete_for_the_edits():
    graph = graph_of((0, 1), layers=2)
    usage = counts(graph, 0, p0q1=5, p1q2=10)
    usage[1] = counts(graph, 1, p0q1=5, p2q3=11)[1]
    assert [edit.layer for edit in propose_edits(graph, usage, 2)] == [1, 1]
    assert [edit.layer for edit in propose_edits(graph, usage, 4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("rho_max", [0, 2, 8])
def test_an_even_number_of_edits_never_changes_the_number_of_edges(rho_max):
    graph = graph_of((0, 1), (2, 3))
    edits = propose_edits(graph, counts(graph, p1q2=5, p0q3=4), rho_max)
    assert len(edits) == min(rho_max, 4)
    assert apply_edits(graph, edits).edges_per_layer() == [2]


def test_a_single_edit_adds_the_most_demanded_edge():
    graph = graph_of((0, 1), layers=2)
    usage = counts(graph, 1, p0q1=1000, p1q2=5, p2q3=6)
    (edit,) = propose_edits(graph, usage, 1)
    assert (edit.op, edit.layer, edit.p, edit.q) == ("add-edge", 1, 2, 3)
    assert propose_edits(graph, counts(graph), 1) == []


def test_the_odd_edit_is_another_edge_than_the_swaps_add():
    graph = graph_of((0, 1))
    edits = propose_edits(graph, counts(graph, p1q2=6, p2q3=5), 3)
    assert [(edit.op, edit.p, edit.q) for edit in edits] == [
        ("remove-edge", 0, 1),
        ("add-edge", 1, 2),
        ("add-edge", 2, 3),
    ]


def test_the_only_way_to_an_expert_is_kept():
    graph = graph_of((0, 1), (1, 2), (0, 3), (2, 3), roots=(0,))
    edits = propose_edits(graph, counts(graph, p0q2=90, p1q3=80), 8)
    gone = [(edit.p, edit.q) for edit in edits if edit.op == "remove-edge"]
    # 0 -> 3 and 2 -> 3 may each go, not both; nothing else leads to 1 or 2.
    assert gone == [(0, 3)]


def test_a_graph_without_edges_or_without_gaps_is_left_alone():
    empty, full = graph_of(), graph_of(*((p, q) for q in range(4) for p in range(q)))
    assert propose_edits(empty, counts(empty, p0q1=9), 2) == []
    assert propose_edits(full, counts(full, p0q1=9), 3) == []


def unreached_case() -> tuple[ExpertGraph, list[np.ndarray]]:
    """Expert 1 is the only root: the best swap leads to 2 and thereby to 3, the next one removes 2 -> 3."""
    usage = np.array([[2, 0, 3, 4], [0, 4, 4, 2], [0, 0, 2, 2], [0, 0, 0, 3]], dtype=float)
    return graph_of((0, 1), (0, 3), (2, 3), roots=(1,)), [usage]


@settings(max_examples=200, deadline=None)
@example(unreached_case(), 4)
@given(graphs_with_usage(), st.integers(0, 9))
def test_proposals_keep_all_promises(case, rho_max):
    graph, usage = case
    digest = graph.digest()
    edits = propose_edits(graph, usage, rho_max)
    assert len(edits) <= rho_max
    assert edits == propose_edits(graph, usage, rho_max)
    assert graph.digest() == digest
    edited = apply_edits(graph, edits)  # refuses an edit that does not fit
    for layer, (old, new) in enumerate(zip(graph.masks, edited.masks, strict=True)):
        check_mask(new, layer)
        assert np.array_equal(np.diagonal(old), np.diagonal(new))
        assert not (reachable(old) & ~reachable(new)).any()
    removed, added = ([edit for edit in edits if edit.op == op] for op in ("remove-edge", "add-edge"))
    assert len(added) - len(removed) in ((0, 1) if rho_max % 2 else (0,))
    for remove, add in zip(removed, added, strict=False):
        assert remove.layer == add.layer
        assert usage[add.layer][add.p, add.q] > usage[remove.layer][remove.p, remove.q]


@settings(max_examples=200, deadline=None)
@given(graphs_with_usage())
def test_one_swap_is_the_best_there_is(case):
    graph, usage = case
    edits = propose_edits(graph, usage, 2)
    gain = (
        usage[edits[1].layer][edits[1].p, edits[1].q] - usage[edits[0].layer][edits[0].p, edits[0].q]
        if edits
        else 0
    )
    assert gain == best_gain(graph, usage)


def best_gain(graph: ExpertGraph, usage: list[np.ndarray]) -> float:
    """The largest gain of any swap in any layer that keeps every expert within reach, by trying all."""
    best = 0.0
    for mask, count in zip(graph.masks, usage, strict=True):
        pairs = list(zip(*np.triu_indices(len(mask), 1), strict=True))
        for a, b in (pair for pair in pairs if mask[pair]):
            without = mask.copy()
            without[a, b] = False
            if (reachable(without) == reachable(mask)).all():
                gains = [count[pair] - count[a, b] for pair in pairs if not mask[pair]]
                best = max([best, *gains])
    return best


@pytest.mark.parametrize(("margin", "swapped"), [(1.0, True), (1.9, True), (2.0, False), (5.0, False)])
def test_a_swap_must_gain_more_than_the_margin(margin, swapped):
    graph = graph_of((0, 1))
    usage = counts(graph, p0q1=5, p2q3=10)
    assert bool(propose_edits(graph, usage, 2, margin=margin)) == swapped
