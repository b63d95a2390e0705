from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.graph.expert_graph import ExpertGraph
from federated.aggregation.usage import (
    DEMANDS,
    UsageCounter,
    combine_usage,
    demand,
    pack_usage,
    traversals,
    unpack_usage,
)
from federated.updates.update import RefusedUpdate
from models.graph.graph_state import read_graph, write_graph
from models.graph.runtime_settings import observing_walks, set_residents, set_walk, visiting
from models.remote_code.routing_fedgraft import Walk, walk_graph
from tests.support.reference_walk import walk_token
from tests.support.tiny_graphs import graph_of, random_ids, shared_graph_of, with_random_gains

# Closed roots 2 and 4; 4 cannot be reached at all; the edge 1 -> 3 leads to a root.
MASK = np.array(
    [
        [1, 0, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
    ],
    dtype=bool,
)


def counted_by_hand(
    scores: np.ndarray, mask: np.ndarray, affinity: np.ndarray, resident: list[bool], visits: int, order: str
) -> np.ndarray:
    """Usage ``[E, E]`` of the tokens ``scores [T, E]``, one token after the other in plain Python."""
    counts = np.zeros(mask.shape, dtype=np.int64)
    for row in scores:
        for visit in walk_token(row.tolist(), mask, affinity, resident, visits, order):
            counts[visit.parent if visit.parent >= 0 else visit.expert, visit.expert] += 1
        wanted = sorted(sorted(range(len(row)), key=lambda e: -row[e])[:visits])
        for first, p in enumerate(wanted):
            for q in wanted[first + 1 :]:
                if not mask[p, q]:
                    counts[p, q] += 1
    return counts


@pytest.mark.parametrize("order", ["best-first", "depth-first"])
@pytest.mark.parametrize("visits", [1, 3, 5])
def test_traversals_and_demand_are_those_of_single_tokens(order, visits):
    generator = torch.Generator().manual_seed(visits)
    scores = torch.randn(200, 5, generator=generator)
    affinity = torch.randn(5, 5, generator=generator)
    walk = walk_graph(
        scores_TE=scores,
        edges_EE=torch.from_numpy(MASK),
        affinity_EE=affinity,
        resident_E=None,
        num_visits=visits,
        order=order,
    )
    counted = traversals(walk, 5) + demand(scores, visits) * torch.from_numpy(~MASK)
    expected = counted_by_hand(scores.numpy(), MASK, affinity.numpy(), [True] * 5, visits, order)
    assert np.array_equal(counted.numpy(), expected)
    assert (walk.experts_TK == -1).any() == (visits == 5)  # expert 4 is never reached


def test_the_diagonal_holds_visits_from_the_router_and_unmade_visits_do_not_count():
    walk = Walk(
        torch.tensor([[0, 2, -1], [1, -1, -1], [2, 0, 1]]),
        torch.tensor([[-1, 0, -1], [-1, -1, -1], [-1, -1, 0]]),
        torch.zeros(3, 3),
    )
    expected = [[2, 1, 1], [0, 1, 0], [0, 0, 1]]
    assert traversals(walk, 3).tolist() == expected


def test_demand_counts_pairs_within_the_best_k():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    assert demand(scores, 2).tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert demand(scores, 1).sum() == 0
    assert demand(scores, 3).tolist() == [[0, 3, 3], [0, 0, 3], [0, 0, 0]]


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_attached_experts_take_no_place_among_the_best_k(top_k):
    scores = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    found = demand(scores, top_k, attached=[3])
    assert torch.equal(found[:3, :3], demand(scores[:, :3], min(top_k, 3))) and found[:, 3].sum() == 0
    assert torch.equal(scores, before)


@pytest.mark.parametrize("order", ["best-first", "depth-first"])
def test_a_model_is_counted_layer_by_layer_over_all_forward_passes(order):
    model = with_random_gains(graph_of(num_experts=4, visits=3))
    masks = (np.triu(np.ones((4, 4), dtype=bool)), np.eye(4, k=1, dtype=bool))
    masks[1][0, 0] = masks[1][3, 3] = True
    write_graph(model, ExpertGraph(masks))
    set_walk(model, order)
    held = [True, True, False, True]
    set_residents(model, [None, torch.tensor(held)])
    ids = [random_ids(model, 2, 16, seed=seed) for seed in (1, 2)]
    counter = UsageCounter(read_graph(model))
    scores = scores_of(model, ids)
    with counter.counting(model):
        for batch in ids:
            model(input_ids=batch, use_cache=False)
    model(input_ids=ids[0], use_cache=False)  # outside the block: not counted
    for layer, (counts, resident) in enumerate(zip(counter.counts(), ([True] * 4, held), strict=True)):
        affinity = model.expert_layers()[layer].edge_affinity.detach().numpy()
        expected = counted_by_hand(scores[layer].numpy(), masks[layer], affinity, resident, 3, order)
        assert counts.dtype == np.int64 and np.array_equal(counts, expected)
    # What a client does not hold is not visited, but it can be asked for.
    assert counter.counts()[1][:, 2].sum() > 0 == counter.counts()[1][2, 2]


@torch.no_grad()
def scores_of(model, batches) -> list[torch.Tensor]:
    """Router scores ``[T, E]`` of each layer."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.expert_layers()]
    with observing_walks(
        model, lambda index: lambda layer, scores, walk, weights: seen[index].append(scores)
    ):
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return [torch.cat(parts) for parts in seen]


def test_demand_follows_the_visits_of_the_moment():
    model = graph_of(num_experts=4, visits=4)
    write_graph(model, ExpertGraph((np.eye(4, dtype=bool),) * 2))
    counter = UsageCounter(read_graph(model))
    with visiting(model, [1, 2]), counter.counting(model):
        model(input_ids=random_ids(model, 1, 10), use_cache=False)
    assert [int(np.triu(count, 1).sum()) for count in counter.counts()] == [0, 10]
    assert [int(np.trace(count)) for count in counter.counts()] == [10, 20]


def test_what_was_counted_is_a_copy():
    counter = UsageCounter(ExpertGraph((MASK,)))
    counter.counts()[0][0, 0] = 5
    assert counter.counts()[0].sum() == 0


@pytest.mark.parametrize("sizes", [[4, 4], [1], [5, 1, 16]])
def test_packed_usage_comes_back(sizes):
    rng = np.random.default_rng(0)
    counts = [np.triu(rng.integers(0, 10**9, (size, size))) for size in sizes]
    packed = pack_usage(counts)
    unpacked = unpack_usage(packed, sizes)
    assert all(np.array_equal(one, other) for one, other in zip(unpacked, counts, strict=True))
    assert {count.dtype for count in unpacked} == {np.dtype(np.int64)}
    assert packed == pack_usage(counts)


def test_counts_beyond_32_bits_are_cut_off():
    counts = [np.array([[2**40, 2**32 - 1], [0, 0]])]
    assert unpack_usage(pack_usage(counts), [2])[0].tolist() == [[2**32 - 1, 2**32 - 1], [0, 0]]


@pytest.mark.parametrize("damage", ["empty", "short", "garbage", "fewer", "more", "coding"])
def test_damaged_usage_is_refused(damage):
    packed = pack_usage([np.triu(np.arange(16).reshape(4, 4) * 1000)])
    data = {
        "empty": b"",
        "short": packed[:-1],
        "garbage": b"\x01" + b"\xff" * 40,
        "fewer": pack_usage([np.triu(np.ones((3, 3), dtype=np.int64))]),
        "more": pack_usage([np.triu(np.ones((5, 5), dtype=np.int64))]),
        "coding": b"\x07" + packed[1:],
    }[damage]
    with pytest.raises(RefusedUpdate):
        unpack_usage(data, [4])


def test_shared_experts_are_never_demanded():
    model = shared_graph_of()
    counter = UsageCounter(read_graph(model))
    ids = random_ids(model, 1, 20)
    scores = scores_of(model, [ids])
    with counter.counting(model):
        model(input_ids=ids, use_cache=False)
    for counts, score_TE, layer in zip(counter.counts(), scores, model.expert_layers(), strict=True):
        # All 20 tokens enter both shared experts, and two others each.
        assert counts[0, 0] == counts[1, 1] == 20 and not np.triu(counts, 1)[:2].any()
        wanted = np.zeros((8, 8), dtype=np.int64)
        for row in score_TE.numpy():
            p, q = sorted(2 + np.argsort(-row[2:])[:2])
            wanted[p, q] += not layer.edges[p, q]
        missing = np.triu(~layer.edges.numpy(), 1)
        assert np.array_equal(counts * missing, wanted) and wanted.any()


def test_only_the_largest_demands_are_reported():
    mask = np.eye(40, dtype=bool)
    mask[0, 1:] = True
    counter = UsageCounter(ExpertGraph((mask, np.eye(3, dtype=bool))))
    generator = torch.Generator().manual_seed(0)
    for count in counter._counts:
        count += torch.randint(0, 1000, count.shape, generator=generator).triu()
    every, reported = counter.counts(), counter.largest_counts()
    assert np.array_equal(reported[0][mask], every[0][mask])
    absent = np.triu(~mask, 1)
    kept = reported[0][absent] > 0
    assert DEMANDS - 10 <= kept.sum() <= DEMANDS < absent.sum()
    assert np.array_equal(reported[0][absent][kept], every[0][absent][kept])
    assert every[0][absent][kept].min() > every[0][absent][~kept].max()
    assert np.array_equal(reported[1], every[1])  # few experts: all pairs


def test_demands_that_tie_beyond_the_limit_are_left_out():
    counter = UsageCounter(ExpertGraph((np.eye(40, dtype=bool),)))
    counter._counts[0] += torch.ones(40, 40, dtype=torch.int64).triu()
    (reported,) = counter.largest_counts()
    assert np.array_equal(reported, np.eye(40))


def test_every_client_has_the_same_say_per_layer():
    few, many = np.array([[1, 2], [0, 1]]), np.array([[30, 0], [0, 10]])
    (total,) = combine_usage([[few], [many]])
    assert total.tolist() == [[1 + 3, 2], [0, 1 + 1]]


def test_forged_counts_do_not_decide_alone():
    honest = [np.array([[5, 3, 2], [0, 5, 4], [0, 0, 1]])] * 4
    forged = np.zeros((3, 3), dtype=np.int64)
    forged[0, 2] = 2**32 - 1
    (total,) = combine_usage([[counts] for counts in [*honest, forged]])
    assert total[0, 2] == 5 * 2 and total[1, 2] == 4 * 4
    (pair,) = combine_usage([[counts] for counts in [*honest * 2, forged, forged]])
    assert pair[0, 2] == 10 * 2


def test_clients_without_counts_leave_those_of_others():
    counts, none = np.array([[1, 2], [0, 1]]), np.zeros((2, 2), dtype=np.int64)
    assert combine_usage([[counts], [none]])[0].tolist() == counts.tolist()
    assert combine_usage([[none], [none]])[0].tolist() == none.tolist()
    assert combine_usage([[counts]])[0].tolist() == counts.tolist()
    given = counts.astype(np.float64)
    combine_usage([[given], [given * 9]])
    assert given.tolist() == counts.tolist()
