from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from experts.graph.edge_edits import apply_edits
from experts.graph.edits import Edit, MergeExperts, RetireExpert, edits_from_dicts
from experts.graph.expert_edits import apply_expert_edits, retirements, unchanged
from experts.graph.expert_graph import ExpertGraph, check_mask, check_reachable


def graph_of(*edges: tuple[int, int], roots=(0, 1, 2, 3), num_experts=4, version=3) -> ExpertGraph:
    mask = np.zeros((num_experts, num_experts), dtype=bool)
    for e in roots:
        mask[e, e] = True
    for p, q in edges:
        mask[p, q] = True
    return ExpertGraph((mask,), version)


def retire(*experts: int) -> list[RetireExpert]:
    return [RetireExpert(0, expert) for expert in experts]


def merge(*pairs: tuple[int, int]) -> list[MergeExperts]:
    return [MergeExperts(0, gone, into) for into, gone in pairs]


def edges_of(edited, layer: int = 0) -> list[tuple[int, int]]:
    return [(int(p), int(q)) for p, q in np.argwhere(np.triu(edited.graph.masks[layer], 1))]


def roots_of(edited, layer: int = 0) -> list[int]:
    return np.flatnonzero(np.diagonal(edited.graph.masks[layer])).tolist()


@st.composite
def plans(draw) -> tuple[ExpertGraph, list[Edit]]:
    """Random graphs, and plans that retire and merge some of their experts in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks, edits = [], []
    for layer, num_experts in enumerate(draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))):
        mask = np.triu(rng.random((num_experts, num_experts)) < draw(st.sampled_from([0.1, 0.4, 0.9])))
        masks.append(mask)
        stays = rng.permutation(num_experts)[: rng.integers(1, num_experts + 1)]
        for expert in np.setdiff1d(np.arange(num_experts), stays).tolist():
            if rng.random() < 0.5:
                edits.append(RetireExpert(layer, expert))
            else:
                edits.append(MergeExperts(layer, expert, int(rng.choice(stays))))
    return ExpertGraph(tuple(masks), 1), [edits[index] for index in rng.permutation(len(edits))]


def test_the_parents_of_a_retired_expert_get_edges_to_its_children():
    edited = apply_expert_edits(graph_of((0, 2), (1, 2), (2, 3)), retire(2))
    assert edges_of(edited) == [(0, 2), (1, 2)] and roots_of(edited) == [0, 1, 2]
    assert edited.kept[0].tolist() == [0, 1, 3] and edited.numbers == ({0: 0, 1: 1, 3: 2},)
    assert edited.added[0].tolist() == [[False, False, True], [False, False, True], [False, False, False]]
    assert edited.graph.version == 4


def test_edges_that_were_there_are_not_added():
    edited = apply_expert_edits(graph_of((0, 2), (2, 3), (0, 3)), retire(2))
    assert edges_of(edited) == [(0, 2)] and not edited.added[0].any()


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_chain_of_retired_experts_is_bridged_as_one(order):
    assert edges_of(apply_expert_edits(graph_of((0, 1), (1, 2), (2, 3)), retire(*order))) == [(0, 1)]


def test_children_of_a_retired_root_become_roots_where_nothing_else_leads_to_them():
    edited = apply_expert_edits(graph_of((0, 1), (1, 2), (0, 3), (2, 3), roots=(0,)), retire(0))
    assert roots_of(edited) == [0] and edges_of(edited) == [(0, 1), (1, 2)]
    edited = apply_expert_edits(graph_of((0, 1), (0, 2), roots=(0, 3)), retire(0))
    assert roots_of(edited) == [0, 1, 2]


def test_a_merged_expert_leaves_its_edges_and_its_root_to_the_one_that_stays():
    graph = graph_of((0, 1), (0, 2), (2, 3), (1, 2), roots=(0, 2))
    edited = apply_expert_edits(graph, merge((1, 2)))
    assert edges_of(edited) == [(0, 1), (1, 2)] and roots_of(edited) == [0, 1]
    assert edited.numbers == ({0: 0, 1: 1, 2: 1, 3: 2},)
    assert edited.added[0].tolist() == [[False] * 3, [False, False, True], [False] * 3]


def test_edges_that_would_run_down_are_dropped_when_the_higher_expert_stays():
    edited = apply_expert_edits(graph_of((0, 1), (1, 2), roots=(0, 1, 3)), merge((3, 1)))
    assert edges_of(edited) == [(0, 2)]  # 0 -> 1 becomes 0 -> 3
    assert roots_of(edited) == [0, 1, 2]  # 1 -> 2 cannot become 3 -> 2, so that 2 is entered from the router


def test_edges_between_two_experts_that_both_merge_join_those_they_went_into():
    graph = graph_of((2, 3), roots=range(6), num_experts=6)
    assert edges_of(apply_expert_edits(graph, merge((0, 2), (5, 3)))) == [(0, 3)]
    assert edges_of(apply_expert_edits(graph, merge((5, 2), (0, 3)))) == []
    assert edges_of(apply_expert_edits(graph, merge((0, 2), (0, 3)))) == []


def test_a_merge_takes_over_what_lies_behind_a_retired_expert():
    graph = graph_of((1, 2), (2, 3))
    assert edges_of(apply_expert_edits(graph, [*merge((0, 1)), *retire(2)])) == [(0, 1)]


def test_no_edit_changes_nothing_but_the_version():
    graph = graph_of((0, 1), (1, 3))
    edited = apply_expert_edits(graph, [])
    assert np.array_equal(edited.graph.masks[0], graph.masks[0]) and edited.graph.version == 4
    assert edited.numbers == ({0: 0, 1: 1, 2: 2, 3: 3},) and not edited.added[0].any()


def test_layers_are_edited_apart():
    graph = ExpertGraph((np.eye(3, dtype=bool), np.eye(2, dtype=bool)))
    edited = apply_expert_edits(graph, [RetireExpert(1, 0)])
    assert edited.graph.num_experts == [3, 1] and edited.kept[1].tolist() == [1]


@settings(max_examples=150, deadline=None)
@given(plans())
def test_a_plan_leaves_a_whole_graph_whatever_its_order(case):
    graph, edits = case
    before = graph.digest()
    edited = apply_expert_edits(graph, edits)
    assert graph.digest() == before and edited.graph.version == graph.version + 1
    assert edited.graph.digest() == apply_expert_edits(graph, edits[::-1]).graph.digest()
    for layer, mask in enumerate(edited.graph.masks):
        check_mask(mask, layer)
        check_reachable(mask, layer)
        kept, old = edited.kept[layer], graph.masks[layer]
        gone = {edit.expert for edit in edits if edit.layer == layer}
        assert set(kept.tolist()) == set(range(len(old))) - gone and (np.diff(kept) > 0).all()
        assert (mask | ~old[np.ix_(kept, kept)]).all()  # no edge or root of those that stay is lost
        assert np.array_equal(edited.added[layer], np.triu(mask & ~old[np.ix_(kept, kept)], 1))
        assert [edited.numbers[layer][int(each)] for each in kept] == list(range(len(kept)))


@settings(max_examples=100, deadline=None)
@given(plans())
def test_retiring_joins_two_experts_exactly_where_a_path_led_through_retired_ones(case):
    graph, edits = case
    edits = [RetireExpert(edit.layer, edit.expert) for edit in edits]
    edited = apply_expert_edits(graph, edits)
    for layer, mask in enumerate(edited.graph.masks):
        kept = edited.kept[layer].tolist()
        whole = networkx.from_numpy_array(np.triu(graph.masks[layer], 1), create_using=networkx.DiGraph)
        for new_p, p in enumerate(kept):
            for new_q, q in enumerate(kept[new_p + 1 :], start=new_p + 1):
                through = whole.subgraph({p, q, *set(whole) - set(kept)})
                assert mask[new_p, new_q] == networkx.has_path(through, p, q)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([("add-edge", 0, 0, 1)], "one of retire-expert, merge-experts, got 'add-edge'"),
        ([("retire-expert", 1, 0, 0)], "known layer"),
        ([("retire-expert", -1, 0, 0)], "known layer"),
        ([("retire-expert", 0, 4, 4)], "known experts"),
        ([("retire-expert", 0, -1, -1)], "known experts"),
        ([("retire-expert", 0, 0, 1)], "p == q for an edit of one expert"),
        ([("merge-experts", 0, 1, 1)], "p != q to merge"),
        ([("merge-experts", 0, 4, 1)], "known experts"),
        ([("merge-experts", 0, 1, -1)], "known experts"),
        (
            [("swap-experts", 0, 1, 2)],
            "one of add-edge, remove-edge, .*, retire-expert, merge-experts, got 'swap",
        ),
        ([("retire-expert", 0, 1, 1)] * 2, "0:1 to be taken out once"),
        ([("retire-expert", 0, 1, 1), ("merge-experts", 0, 0, 1)], "0:1 to be taken out once"),
        ([("merge-experts", 0, 0, 1), ("merge-experts", 0, 1, 2)], "merge into one that stays, got 1"),
        ([("merge-experts", 0, 0, 1), ("retire-expert", 0, 0, 0)], "merge into one that stays, got 0"),
        ([("retire-expert", 0, expert, expert) for expert in range(4)], "an expert to stay in layer 0"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(edits, message):
    graph = graph_of((1, 2))
    before = graph.digest()
    values = [dict(zip(("op", "layer", "p", "q"), edit, strict=True)) for edit in edits]
    with pytest.raises(UserError, match=message):
        apply_expert_edits(graph, edits_from_dicts(values))
    assert graph.digest() == before


def test_clients_refuse_to_replay_edits_that_renumber():
    for edit in (*retire(1), *merge((0, 1))):
        received = edits_from_dicts([edit.as_dict()])
        with pytest.raises(UserError, match="one of add-edge, remove-edge, open-root, close-root, got"):
            apply_edits(graph_of(), received)


def test_a_keep_map_becomes_a_plan():
    edits = retirements({1: np.array([2, 0]), 0: np.array([1])}, [2, 3, 4], "worst")
    assert edits == [RetireExpert(0, 0, "worst"), RetireExpert(1, 1, "worst")]
    assert retirements({}, [2]) == []


def test_a_graph_without_edits_keeps_all_experts_and_its_version():
    graph = graph_of((1, 2))
    same = unchanged(graph)
    assert same.graph is graph and [kept.tolist() for kept in same.kept] == [list(range(4))]
    assert same.numbers == ({0: 0, 1: 1, 2: 2, 3: 3},) and not same.added[0].any()
