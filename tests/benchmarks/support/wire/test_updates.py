"""Random masks, selection and error-feedback residuals of benchmark updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.support.wire.updates import (
    TrainedUpdates,
    kept,
    random_update,
    side_by_side,
    trained_updates,
)
from benchmarks.wire import QUICK


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_clients_side_by_side_are_layers():
    one = {(0, 0): normal(4), (1, 0): normal(4)}
    assert list(side_by_side([one, one])) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_shared_selection_compares_units():
    vectors = {(0, 0): normal(100), (0, 1): 100 * normal(100, seed=1)}
    each, together = (kept(vectors, 0.1, shared=shared).vectors for shared in (False, True))
    assert [vector.indices.size for vector in each.values()] == [10, 10]
    assert together[(0, 1)].indices.size == 20 and (0, 0) not in together


def test_a_random_update_has_the_density_and_the_units_asked_for():
    update = random_update(2500, 0.2, seed=0, unit_size=1000)
    assert [vector.size for vector in update.vectors.values()] == [1000] * 3
    assert sum(vector.indices.size for vector in update.vectors.values()) == pytest.approx(600, abs=75)
    again, other = (random_update(2500, 0.2, seed=seed, unit_size=1000) for seed in (0, 1))
    np.testing.assert_array_equal(again.vectors[(0, 2)].values, update.vectors[(0, 2)].values)
    assert not np.array_equal(other.vectors[(0, 0)].indices, update.vectors[(0, 0)].indices)


def test_matrices_are_the_weights_of_every_second_expert():
    change = torch.arange(14.0)
    updates = TrainedUpdates([], {}, hidden_size=2, weights=12)
    first, second = updates.matrices({(0, expert): change + expert for expert in range(4)}, 2)
    assert torch.equal(first, torch.arange(12.0).view(6, 2)) and torch.equal(second, first + 2)


def test_the_second_round_carries_what_the_first_did_not_ship():
    settings = replace(QUICK.training, domains=("a",))
    with_residual, without = (
        trained_updates(settings, quick=True, density=density, bits=8).carried for density in (0.01, 1.0)
    )
    (first,) = trained_updates(settings, quick=True, density=0.5, bits=8).changes
    unit = next(unit for unit in first if first[unit].any())
    left = (with_residual[unit] - without[unit]).double()
    assert float(left @ first[unit].double() / first[unit].double().square().sum()) > 0.5
