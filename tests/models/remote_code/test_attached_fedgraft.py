"""Visits of attached experts against a plain walk through the tokens."""

from __future__ import annotations

import pytest
import torch

from models.remote_code.attached_fedgraft import chosen_experts, with_attached
from models.remote_code.routing_fedgraft import walk_graph


def test_the_walk_chooses_among_residents_that_are_not_attached():
    like = torch.zeros(4)
    resident = torch.tensor([True, False, True, True])
    assert chosen_experts(None, [], like) is None and chosen_experts(resident, [], like) is resident
    assert chosen_experts(None, [3], like).tolist() == [True, True, True, False]
    assert chosen_experts(resident, [2, 3], like).tolist() == [True, False, False, False]
    assert resident.tolist() == [True, False, True, True]


@pytest.mark.parametrize("held", [None, [0, 1, 2, 3, 5], [0, 2, 4, 5]])
def test_attached_experts_follow_the_visits_of_their_parents(held):
    torch.manual_seed(0)
    scores, edges, attached = torch.randn(50, 6), torch.eye(6, dtype=torch.bool), [4, 5]
    edges[4, 4] = edges[5, 5] = False
    edges[1, 4] = edges[0, 5] = edges[2, 5] = True
    resident = None if held is None else torch.tensor([expert in held for expert in range(6)])
    walk = walk_graph(
        scores_TE=scores,
        edges_EE=edges,
        affinity_EE=torch.zeros(6, 6),
        resident_E=chosen_experts(resident, attached, scores[0]),
        num_visits=2,
    )
    weights = torch.rand(50, 2)
    longer, longer_weights = with_attached(
        walk, weights, scores_TE=scores, edges_EE=edges, attached=attached, resident_E=resident
    )
    assert torch.equal(longer.experts_TK[:, :2], walk.experts_TK) and torch.equal(
        longer_weights[:, :2], weights
    )
    assert (longer_weights[:, 2:] == 1).all()
    for token in range(50):
        visits = walk.experts_TK[token].tolist()
        for column, (expert, parents) in enumerate([(4, [1]), (5, [0, 2])], start=2):
            found = [visit for visit in visits if visit in parents] if held is None or expert in held else []
            assert longer.experts_TK[token, column] == (expert if found else -1)
            assert longer.parents_TK[token, column] == (found[0] if found else -1)
            expected = scores[token, expert] if found else float("-inf")
            assert longer.scores_TK[token, column] == expected
