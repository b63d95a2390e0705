from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from experts.graph.expert_graph import ExpertGraph, check_mask, check_reachable, edges_by_lift, reachable


@st.composite
def masks(draw):
    num_experts = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    edges = rng.random((num_experts, num_experts)) < draw(st.sampled_from([0.1, 0.4, 0.9]))
    roots = rng.random(num_experts) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return np.triu(edges, 1) | np.diag(roots)


def test_counts_leave_the_roots_out():
    graph = ExpertGraph((np.triu(np.ones((4, 4), dtype=bool)), np.eye(3, dtype=bool)), version=2)
    assert graph.num_experts == [4, 3] and graph.edges_per_layer() == [6, 0]


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.tril(np.ones((3, 3), dtype=bool)), "layer 1: .*edge 1 -> 0"),
        (np.zeros((2, 3), dtype=bool), r"layer 1: .*\(2, 3\)"),
        (np.zeros(3, dtype=bool), r"layer 1: .*\(3,\)"),
        (np.eye(3), "layer 1: .*float64"),
    ],
)
def test_only_upper_triangular_boolean_squares_are_masks(mask, message):
    with pytest.raises(UserError, match=message):
        check_mask(mask, 1)
    with pytest.raises(UserError, match=message):
        ExpertGraph((np.eye(3, dtype=bool), mask))


@settings(deadline=None)
@given(masks(), st.data())
def test_the_digest_changes_with_every_bit_and_with_the_version(mask, data):
    graph = ExpertGraph((mask, mask))
    assert graph.digest() == ExpertGraph((mask.copy(), mask.copy())).digest()
    p = data.draw(st.integers(0, len(mask) - 1))
    q = data.draw(st.integers(p, len(mask) - 1))
    changed = mask.copy()
    changed[p, q] ^= True
    others = [
        ExpertGraph((changed, mask)),
        ExpertGraph((mask, changed)),
        ExpertGraph((mask, mask), version=1),
        ExpertGraph((mask,)),
    ]
    assert len({graph.digest(), *(other.digest() for other in others)}) == 5


def test_the_digest_knows_how_bits_are_dealt_to_layers():
    empty = {size: np.zeros((size, size), dtype=bool) for size in (1, 2)}
    assert ExpertGraph((empty[1], empty[2])).digest() != ExpertGraph((empty[2], empty[1])).digest()


@settings(deadline=None)
@given(masks(), st.integers(0, 99))
def test_a_client_sees_only_roots_and_edges_between_its_residents(mask, seed):
    held = np.random.default_rng(seed).random(len(mask)) < 0.5
    graph = ExpertGraph((mask,), version=3)
    restricted = graph.restrict([held])
    for p in range(len(mask)):
        for q in range(len(mask)):
            assert restricted.masks[0][p, q] == (mask[p, q] and held[p] and held[q])
    assert restricted.version == 3 and np.array_equal(graph.masks[0], mask)


def test_restrict_wants_residents_of_every_layer():
    with pytest.raises(ValueError):
        ExpertGraph((np.eye(2, dtype=bool),) * 2).restrict([np.ones(2, dtype=bool)])


@settings(deadline=None)
@given(masks())
def test_reachable_is_what_a_depth_first_search_finds(mask):
    found, stack = set(), [expert for expert in range(len(mask)) if mask[expert, expert]]
    while stack:
        expert = stack.pop()
        if expert not in found:
            found.add(expert)
            stack += [child for child in range(expert + 1, len(mask)) if mask[expert, child]]
    assert set(np.flatnonzero(reachable(mask)).tolist()) == found


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 4), st.integers(0, 999))
def test_edges_join_experts_selected_together_more_often_than_chance(num_experts, tokens, most, seed):
    selected = np.random.default_rng(seed).random((tokens, num_experts)) < 0.5
    mask = edges_by_lift(selected, most)
    check_mask(mask, 0)
    assert np.diagonal(mask).all()

    picks = sum(int(row.sum()) for row in selected) / max(tokens, 1)
    # k of E drawn at random: P(p and q) = k (k - 1) / (E (E - 1)), P(p) = P(q) = k / E.
    pair = picks * (picks - 1) / (num_experts * (num_experts - 1)) if num_experts > 1 else 0
    chance = pair / (picks / num_experts) ** 2 if picks > 1 and num_experts > 1 else 1

    def lift(p: int, q: int) -> float:
        both, one, other = (selected[:, p] & selected[:, q]).sum(), selected[:, p].sum(), selected[:, q].sum()
        return both * tokens / (one * other) if one * other else 0.0

    for p in range(num_experts):
        lifts = {q: lift(p, q) for q in range(p + 1, num_experts)}
        children = [q for q in lifts if mask[p, q]]
        left_out = [value for q, value in lifts.items() if not mask[p, q] and value > chance + 1e-9]
        assert len(children) <= most
        assert all(lifts[q] > chance - 1e-9 for q in children)
        if left_out:
            assert len(children) == most
            assert not children or min(lifts[q] for q in children) >= max(left_out) - 1e-9


def test_a_router_that_picks_the_same_number_always_is_compared_with_picks_at_random():
    every_pair = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
    assert edges_by_lift(every_pair, 4).tolist() == np.eye(3, dtype=bool).tolist()
    favored = np.concatenate([every_pair, every_pair[:1]])
    assert edges_by_lift(favored, 4).tolist() == [
        [True, True, False],
        [False, True, False],
        [False, False, True],
    ]


def test_independent_and_exclusive_experts_get_no_edge():
    both_ways = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=bool)
    assert edges_by_lift(both_ways, 4).tolist() == [[True, False], [False, True]]
    together = np.array([[1, 1], [1, 1], [0, 0], [0, 0]], dtype=bool)
    assert edges_by_lift(together, 4).tolist() == [[True, True], [False, True]]


def test_an_expert_out_of_reach_is_named():
    mask = np.eye(4, dtype=bool)
    check_reachable(mask, 0)
    mask[2, 2] = mask[3, 3] = False
    with pytest.raises(
        UserError, match="layer 5: expected every expert within reach of a root, got none for 2, 3"
    ):
        check_reachable(mask, 5)
    mask[0, 2] = mask[2, 3] = True
    check_reachable(mask, 5)
