from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.remote_code.dispatch_fedgraft import dispatch, find_links


def test_visits_and_links_of_a_small_case():
    chosen = torch.tensor([[2, 0], [1, -1], [0, 1], [2, 0]])
    visits = dispatch(chosen, 4)
    assert [tokens.tolist() for tokens in visits.token_indices] == [[0, 2, 3], [1, 2], [0, 3], []]
    assert [places.tolist() for places in visits.places] == [[1, 4, 7], [2, 5], [0, 6], []]
    links = find_links(visits, torch.ones(4, 4, dtype=torch.bool).triu(1), 4)
    assert [(link.source, link.target) for link in links] == [(0, 1), (0, 2)]
    assert [link.source_rows.tolist() for link in links] == [[1], [0, 2]]
    assert [link.target_rows.tolist() for link in links] == [[1], [0, 1]]
    assert find_links(visits, torch.zeros(4, 4, dtype=torch.bool), 4) == []


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 8), experts=st.integers(1, 6), seed=st.integers(0, 1000))
def test_every_visit_has_its_place_and_every_joined_pair_its_link(tokens, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    order = scores.argsort(-1)
    chosen = torch.where(scores.gather(-1, order) > 0.4, order, -1)
    edges = (torch.rand(experts, experts, generator=generator) < 0.5).triu(1)
    visits = dispatch(chosen, experts)
    for expert, (places, visitors) in enumerate(zip(*visits, strict=True)):
        assert (chosen.flatten()[places] == expert).all() and places.tolist() == sorted(places.tolist())
        assert visitors.tolist() == [token for token in range(tokens) if expert in chosen[token]]
    links = find_links(visits, edges, tokens)
    joined = {
        (p, q): [token for token in range(tokens) if p in chosen[token] and q in chosen[token]]
        for p, q in edges.nonzero().tolist()
    }
    assert [(link.source, link.target) for link in links] == [pair for pair, both in joined.items() if both]
    for link in links:
        for expert, rows in ((link.source, link.source_rows), (link.target, link.target_rows)):
            assert visits.token_indices[expert][rows].tolist() == joined[link.source, link.target]
