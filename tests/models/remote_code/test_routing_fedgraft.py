from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.remote_code.routing_fedgraft import Walk, is_top_k, walk_graph
from tests.support.reference_walk import NOBODY, walk_token

ORDERS = ("best-first", "depth-first")


@st.composite
def layers(draw):
    """Scores, mask, affinities, residency and k of a random layer; values are quarters, so that many tie."""
    num_experts, tokens = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 3, 40]))
    scores = rng.integers(-levels, levels + 1, (tokens, num_experts)) / 4
    edges = rng.random((num_experts, num_experts)) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    roots = rng.random(num_experts) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    affinity = rng.integers(-8, 9, edges.shape) / 4 * draw(st.booleans())
    resident = rng.random(num_experts) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    visits = draw(st.integers(1, num_experts + 2))
    return scores, np.triu(edges, 1) | np.diag(roots), affinity, resident, visits


def walk_of(scores, mask, affinity, resident, visits, order, dtype=torch.float64) -> Walk:
    return walk_graph(
        scores_TE=torch.as_tensor(np.array(scores), dtype=dtype),
        edges_EE=torch.from_numpy(np.array(mask, dtype=bool)),
        affinity_EE=torch.as_tensor(np.array(affinity), dtype=dtype),
        resident_E=None if resident is None else torch.from_numpy(np.array(resident, dtype=bool)),
        num_visits=visits,
        order=order,
    )


def assert_matches_reference(walk: Walk, scores, mask, affinity, resident, visits, order) -> None:
    for token, row in enumerate(scores):
        expected = walk_token(row.tolist(), mask, affinity, resident, visits, order)
        made = len(expected)
        assert walk.experts_TK[token, :made].tolist() == [visit.expert for visit in expected]
        assert walk.parents_TK[token, :made].tolist() == [visit.parent for visit in expected]
        assert walk.scores_TK[token, :made].tolist() == [visit.score for visit in expected]
        assert (walk.experts_TK[token, made:] == -1).all() and (walk.parents_TK[token, made:] == -1).all()
        assert (walk.scores_TK[token, made:] == -torch.inf).all()


@settings(max_examples=300, deadline=None)
@given(layers(), st.sampled_from(ORDERS), st.sampled_from([torch.float64, torch.float32]))
def test_the_vectorized_walk_is_the_walk_token_by_token(layer, order, dtype):
    scores, mask, affinity, resident, visits = layer
    walk = walk_of(scores, mask, affinity, resident, visits, order, dtype)
    assert walk.experts_TK.shape == (len(scores), min(visits, scores.shape[1]))
    assert_matches_reference(walk, scores, mask, affinity, resident, visits, order)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_best_first_with_all_roots_open_and_no_affinity_is_topk(layer):
    scores, mask, affinity, _, visits = layer
    mask = mask | np.eye(len(mask), dtype=bool)
    scores = (
        scores + np.random.default_rng(0).random(scores.shape) / 8
    )  # no ties: topk breaks them as it likes
    walk = walk_of(scores, mask, 0 * affinity, None, visits, "best-first")
    values, indices = torch.from_numpy(scores).topk(min(visits, scores.shape[1]), -1)
    assert torch.equal(walk.experts_TK, indices) and torch.equal(walk.scores_TK, values)


def test_on_a_tie_the_lowest_expert_is_visited_first():
    walk = walk_of([[1.0, 1.0, 1.0]], np.eye(3), np.zeros((3, 3)), None, 3, "best-first")
    assert walk.experts_TK.tolist() == [[0, 1, 2]]


def test_the_parent_is_the_visited_one_of_highest_effective_score_and_the_earlier_on_a_tie():
    mask = np.eye(3, dtype=bool)
    mask[0, 2] = mask[1, 2] = True
    parents = [
        walk_of([scores], mask, np.zeros((3, 3)), None, 3, "best-first").parents_TK[0, -1].item()
        for scores in ([1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0])
    ]
    assert parents == [1, 0, 0]


def test_credit_goes_to_the_best_parent_even_where_another_one_brings_the_larger_affinity():
    mask, affinity = np.eye(3, dtype=bool), np.zeros((3, 3))
    mask[0, 2] = mask[1, 2] = True
    affinity[1, 2] = 5.0
    walk = walk_of([[3.0, 2.0, -9.0]], mask, affinity, None, 3, "best-first")
    assert walk.experts_TK.tolist() == [[0, 1, 2]]
    assert walk.parents_TK.tolist() == [[-1, -1, 0]]
    assert walk.scores_TK.tolist() == [[3.0, 2.0, -4.0]]


def test_depth_first_follows_a_poor_branch_before_a_good_root_and_then_backtracks():
    mask = np.zeros((5, 5), dtype=bool)
    mask[0, 0] = mask[4, 4] = True  # roots
    mask[0, 1] = mask[0, 3] = mask[1, 2] = True
    scores = [[9.0, 2.0, -5.0, 1.0, 8.0]]
    deep = walk_of(scores, mask, np.zeros((5, 5)), None, 5, "depth-first")
    wide = walk_of(scores, mask, np.zeros((5, 5)), None, 5, "best-first")
    assert deep.experts_TK.tolist() == [[0, 1, 2, 3, 4]] and deep.parents_TK.tolist() == [[-1, 0, 1, 0, -1]]
    assert wide.experts_TK.tolist() == [[0, 4, 1, 3, 2]]


@pytest.mark.parametrize("order", ORDERS)
def test_a_closed_root_is_reached_only_along_an_edge_and_nothing_without_residents(order):
    mask = np.array([[True, True], [False, False]])
    assert walk_of([[0.0, 9.0]], mask, np.zeros((2, 2)), None, 2, order).experts_TK.tolist() == [[0, 1]]
    held = walk_of([[0.0, 9.0]], mask, np.zeros((2, 2)), [False, True], 2, order)
    assert held.experts_TK.tolist() == [[NOBODY, NOBODY]]
    assert (held.scores_TK == -torch.inf).all()


@pytest.mark.parametrize("order", ORDERS)
def test_no_token_makes_no_visit(order):
    walk = walk_of(np.zeros((0, 4)), np.eye(4), np.zeros((4, 4)), None, 2, order)
    assert walk.experts_TK.shape == walk.parents_TK.shape == walk.scores_TK.shape == (0, 2)


def test_effective_scores_carry_gradients_to_visited_scores_and_to_the_edges_that_gave_the_bonus():
    mask, scores = torch.eye(3, dtype=torch.bool), torch.tensor([[3.0, -1.0, 1.0]], requires_grad=True)
    mask[0, 1] = True
    affinity = torch.zeros(3, 3, requires_grad=True)
    walk = walk_graph(
        scores_TE=scores,
        edges_EE=mask,
        affinity_EE=affinity,
        resident_E=None,
        num_visits=3,
        order="depth-first",
    )
    assert walk.experts_TK.tolist() == [[0, 1, 2]]
    (walk.scores_TK * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert scores.grad.tolist() == [[1.0, 10.0, 100.0]]
    expected = torch.zeros(3, 3)
    expected[0, 1] = 10.0
    assert torch.equal(affinity.grad, expected)


def test_a_walk_is_top_k_where_all_are_roots_and_no_edge_has_an_affinity():
    edges, affinity, resident = torch.eye(3).bool(), torch.zeros(3, 3), torch.tensor([True, False, True])
    affinity[0, 1] = 1.0
    assert is_top_k(edges, affinity, None)
    edges[0, 1] = True
    assert not is_top_k(edges, affinity, None) and is_top_k(edges, affinity, resident)
    edges[1, 1] = False
    assert is_top_k(edges, affinity, resident)
    edges[2, 2] = False
    assert not is_top_k(edges, affinity, resident)
