from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.remote_code.decode_fedgraft import run_one_token, walk_one_token
from models.remote_code.routing_fedgraft import walk_graph
from tests.models.remote_code.test_experts_fedgraft import random_layer, reference_output, tokens


@settings(max_examples=150, deadline=None)
@given(
    num_experts=st.integers(1, 7),
    visits=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    edges=st.sampled_from([0.0, 0.4, 1.0]),
    roots=st.sampled_from([0.0, 0.3, 1.0]),
    held=st.sampled_from([None, 0.0, 0.6]),
    ties=st.booleans(),
)
def test_one_token_walks_as_many_do(num_experts, visits, seed, edges, roots, held, ties):
    layer = random_layer(num_experts, visits, seed=seed, edges=edges, roots=roots)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    affinity = layer.edge_affinity.detach()
    if ties:
        scores, affinity = scores.round(), affinity.round()
    resident = None if held is None else torch.rand(num_experts, generator=generator) < held
    shared = {"edges_EE": layer.edges, "affinity_EE": affinity, "resident_E": resident, "num_visits": visits}
    one = walk_one_token(scores_E=scores, **shared)
    many = walk_graph(scores_TE=scores[None], **shared)
    assert torch.equal(one.experts_TK, many.experts_TK)
    assert torch.equal(one.parents_TK, many.parents_TK)
    torch.testing.assert_close(one.scores_TK, many.scores_TK)


@settings(max_examples=60, deadline=None)
@given(
    num_experts=st.integers(1, 7),
    visits=st.integers(1, 7),
    seed=st.integers(0, 10_000),
    edges=st.sampled_from([0.0, 0.5, 1.0]),
    held=st.sampled_from([None, 0.0, 0.6]),
)
@torch.no_grad()
def test_one_token_gets_the_output_of_the_reference(num_experts, visits, seed, edges, held):
    layer = random_layer(num_experts, visits, seed=seed, edges=edges, roots=0.8)
    if held is not None:
        layer.resident = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed)) < held
    x = tokens(1, seed=seed)
    torch.testing.assert_close(layer(x), reference_output(layer, x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_observers_see_of_one_token_is_what_they_see_of_it_among_others():
    layer, x, seen = random_layer(5, 3, seed=4), tokens(3), []
    layer.observers.append(lambda _, scores, walk, weights: seen.append((scores, *walk, weights)))
    layer(x)
    for row in x:
        layer(row[None])
    together, *alone = seen
    for part, singles in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(singles))


def test_without_an_expert_to_visit_the_sum_is_zero():
    x = torch.ones(3)
    assert torch.equal(run_one_token(x, [1.0, 1.0], [-1, -1], [[0.0]], lambda *_: x[None]), torch.zeros(3))
