from __future__ import annotations

import numpy as np
import pytest
import torch

from federated.selection.entries import shares
from federated.selection.shared_entries import SharedEntries
from models.graph.unit_vectors import Span

SIZE = 1000
SPANS = {
    (0, 0): Span(0, SIZE, SIZE),
    (0, 1): Span(0, SIZE, SIZE),
    (3, -1): Span(0, SIZE, SIZE),
    (1, 0): Span(100, 400, SIZE),
}


def draw(seed: int = 7, server_round: int = 2) -> SharedEntries:
    return SharedEntries(seed, server_round, SPANS)


@pytest.mark.parametrize("density", [0.001, 0.0371, 0.3, 1.0])
def test_positions_are_those_that_every_client_ships_whatever_its_data(density):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-9, 1.0, 1e6):
        vectors = {unit: scale * torch.randn(SIZE, generator=generator) for unit in SPANS}
        shipped = shares(vectors, SPANS, density, draw().score)
        assert {unit: each.indices.tolist() for unit, each in shipped.items()} == {
            unit: draw().positions(unit, density).tolist() for unit in SPANS
        }
        for unit, each in shipped.items():
            assert np.array_equal(each.values, vectors[unit][each.indices].numpy())


def test_positions_differ_between_rounds_units_and_seeds():
    drawn = [
        tuple(each.positions(unit, 0.1))
        for each in (draw(), draw(server_round=3), draw(seed=8))
        for unit in ((0, 0), (0, 1), (3, -1))
    ]
    assert len(set(drawn)) == len(drawn)


def test_a_lower_density_takes_some_of_the_same_positions():
    few, more = (draw().positions((0, 0), density) for density in (0.02, 0.2))
    assert len(few) == 20 and len(more) == 200 and set(few) < set(more)


def test_entries_that_do_not_train_are_never_shipped():
    every = draw().positions((1, 0), 1.0)
    assert every.tolist() == list(range(100, 400))
    some = draw().positions((1, 0), 0.1)
    assert len(some) == 100 and some.min() >= 100 and some.max() < 400


def test_positions_are_spread_evenly():
    counts = np.zeros(SIZE)
    for server_round in range(400):
        counts[draw(server_round=server_round).positions((0, 0), 0.25)] += 1
    assert counts.mean() == 100 and abs(counts - 100).max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_the_draw_is_the_same_in_every_version():
    """Clients and server may run on different machines: a draw that changes would refuse every update."""
    assert draw().positions((0, 0), 0.005).tolist() == [110, 249, 483, 859, 963]
