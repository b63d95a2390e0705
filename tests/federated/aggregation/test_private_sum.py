from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.aggregation.contribution import Contribution
from federated.aggregation.private_sum import check_positions, clipped_sum, unit_norm_sum
from federated.updates.update import RefusedUpdate, SparseUpdate, SparseVector

POSITIONS = {(0, 0): np.array([1, 4, 6]), (0, 2): np.array([0, 2]), (1, 1): np.array([3])}
SIZE = 8
SHIPPED = st.lists(st.tuples(st.integers(0, 5), st.floats(-1e4, 1e4, width=32)), max_size=6)


def update_of(entries) -> SparseUpdate:
    """An update with values at some of the six shared positions."""
    places = [(unit, position) for unit, positions in POSITIONS.items() for position in positions]
    found: dict = {}
    for place, value in dict(entries).items():
        unit, position = places[place]
        found.setdefault(unit, {})[int(position)] = value
    vectors = {
        unit: SparseVector(SIZE, np.array(sorted(each)), np.array([each[key] for key in sorted(each)]))
        for unit, each in found.items()
    }
    return SparseUpdate(0, "", vectors)


def contributions_of(clients) -> list[Contribution]:
    return [Contribution(1.0 + number, partial(update_of, own)) for number, own in enumerate(clients)]


def flat(sums) -> np.ndarray:
    return np.concatenate([sums[unit] for unit in POSITIONS])


@settings(max_examples=200, deadline=None)
@given(st.lists(SHIPPED, min_size=1, max_size=6), st.floats(1e-3, 1e3))
def test_no_client_changes_the_sum_by_more_than_the_bound(clients, bound):
    whole = clipped_sum(contributions_of(clients), POSITIONS, clip_norm=bound)
    assert {unit: each.size for unit, each in whole.items()} == {(0, 0): 3, (0, 2): 2, (1, 1): 1}
    for left_out in range(len(clients)):
        others = clients[:left_out] + clients[left_out + 1 :]
        rest = clipped_sum(contributions_of(others), POSITIONS, clip_norm=bound)
        assert np.linalg.norm(flat(whole) - flat(rest)) <= bound * (1 + 1e-9)


def test_updates_are_scaled_to_the_bound_over_all_units_and_added_without_weights():
    clients = [[(0, 3.0), (3, 4.0)], [(0, 0.5), (5, -0.5)]]
    sums = clipped_sum(contributions_of(clients), POSITIONS, clip_norm=1.0)
    assert np.allclose(flat(sums), [0.6 + 0.5, 0, 0, 0.8, 0, -0.5])
    loose = clipped_sum(contributions_of(clients), POSITIONS, clip_norm=100.0)
    assert np.allclose(flat(loose), [3.5, 0, 0, 4, 0, -0.5])


def test_without_clients_and_with_an_empty_update_the_sum_is_zero_everywhere():
    for clients in ([], [[]], [[(2, 0.0)]]):
        assert flat(clipped_sum(contributions_of(clients), POSITIONS, clip_norm=1.0)).tolist() == [0.0] * 6


def test_an_entry_outside_of_the_shared_positions_is_refused():
    check_positions(update_of([(0, 1.0), (5, 2.0)]), POSITIONS)
    for index in (2, 7):
        stray = SparseUpdate(0, "", {(1, 1): SparseVector(SIZE, np.array([index]), np.ones(1))})
        with pytest.raises(RefusedUpdate, match=rf"shared draw only, got {index} of unit \(1, 1\)"):
            check_positions(stray, POSITIONS)
        with pytest.raises(ValueError, match="shared positions"):
            clipped_sum([Contribution(1.0, lambda stray=stray: stray)], POSITIONS, clip_norm=1.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5), min_size=1, max_size=5))
def test_no_client_changes_the_sum_of_usage_by_more_than_one(clients):
    counts = [[np.array(each[:4]).reshape(2, 2), np.array([[each[4]]])] for each in clients]
    whole = unit_norm_sum(counts)
    for left_out in range(len(counts)):
        rest = unit_norm_sum(counts[:left_out] + counts[left_out + 1 :]) or [
            np.zeros((2, 2)),
            np.zeros((1, 1)),
        ]
        moved = [a - b for a, b in zip(whole, rest, strict=True)]
        assert np.sqrt(sum(np.square(each).sum() for each in moved)) <= 1 + 1e-9


def test_usage_counts_alike_however_many_tokens_a_client_has():
    few, many = [np.array([[3, 4]])], [np.array([[0, 10**6]])]
    assert np.allclose(unit_norm_sum([few, many])[0], [[0.6, 1.8]])
    assert unit_norm_sum([[np.zeros((1, 1))]])[0].tolist() == [[0.0]]
    assert unit_norm_sum([]) == []
