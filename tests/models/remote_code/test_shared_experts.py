"""Shared experts in the walks: visited by every token before all others."""

import pytest
import torch

from models.remote_code.decode_fedgraft import walk_one_token
from models.remote_code.routing_fedgraft import walk_graph

SCORES = torch.tensor([[-9.0, -8.0, 1.0, 3.0, 2.0], [-1.0, -2.0, 5.0, 0.0, 7.0]])


def _graph(**changes):
    eye = torch.eye(5, dtype=torch.bool)
    return {"edges_EE": eye, "affinity_EE": torch.zeros(5, 5), "resident_E": None, "num_shared": 2} | changes


@pytest.mark.parametrize("order", ["best-first", "depth-first"])
def test_shared_experts_come_first_and_keep_their_logits(order):
    walk = walk_graph(scores_TE=SCORES, num_visits=3, order=order, **_graph())
    assert walk.experts_TK.tolist() == [[0, 1, 3], [0, 1, 4]]
    assert walk.scores_TK.tolist() == [[-9.0, -8.0, 3.0], [-1.0, -2.0, 7.0]]


def test_a_shared_expert_that_is_not_resident_is_not_visited():
    resident = torch.tensor([True, False, True, True, False])
    walk = walk_graph(scores_TE=SCORES, num_visits=4, **_graph(resident_E=resident))
    assert walk.experts_TK.tolist() == [[0, 3, 2, -1], [0, 2, 3, -1]]


@pytest.mark.parametrize("order", ["best-first", "depth-first"])
def test_edges_of_a_shared_expert_do_not_delay_the_next(order):
    edges = torch.eye(5, dtype=torch.bool)
    edges[0, 2] = True
    affinity = torch.zeros(5, 5)
    affinity[0, 2] = 0.5
    walk = walk_graph(
        scores_TE=SCORES, num_visits=3, order=order, **_graph(edges_EE=edges, affinity_EE=affinity)
    )
    assert walk.experts_TK[:, :2].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_one_token_walks_as_many_do(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 6, generator=generator)
    edges = torch.rand(6, 6, generator=generator).triu(1) > 0.5
    edges |= torch.diag(torch.rand(6, generator=generator) > 0.3)
    edges[0, 0] = edges[1, 1] = True
    graph = {
        "edges_EE": edges,
        "affinity_EE": torch.randn(6, 6, generator=generator) * edges.triu(1),
        "resident_E": torch.rand(6, generator=generator) > 0.2,
        "num_visits": 4,
        "num_shared": 2,
    }
    many, one = walk_graph(scores_TE=scores, **graph), walk_one_token(scores_E=scores[0], **graph)
    assert one.experts_TK.tolist() == many.experts_TK.tolist()
    torch.testing.assert_close(one.scores_TK, many.scores_TK)
