from __future__ import annotations

import numpy as np
import pytest

from federated.aggregation import order_statistics
from federated.aggregation.agreement import opposed, sign_agreement
from federated.aggregation.contribution import Contribution
from federated.updates.update import SparseUpdate, SparseVector

SIZES = {(0, 0): 4000, (1, 2): 1000}


def client(values: dict) -> Contribution:
    """``values``: dense vector of each unit, of which entries other than zero are shipped."""
    vectors = {
        unit: SparseVector.from_dense(np.asarray(vector, dtype=np.float32), np.asarray(vector) != 0)
        for unit, vector in values.items()
    }
    update = SparseUpdate(0, "", vectors)
    return Contribution(1.0, lambda: update)


def drawn(seed: int, *, common: float = 1.0, sign: float = 1.0) -> Contribution:
    """A sparse update with a part that all share."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    return client(
        {
            unit: sign
            * (common * shared.standard_normal(size) + own.standard_normal(size))
            * (own.random(size) < 0.6)
            for unit, size in SIZES.items()
        }
    )


def test_agreement_by_hand(monkeypatch):
    one = client({(0, 0): [1, 2, -3, 0, 5], (1, 2): [1]})
    two = client({(0, 0): [2, -1, -1, 4, 0], (1, 2): [9]})
    three = client({(0, 0): [0, 0, 0, -1, 0]})
    expected = [[5 / 105, 2 / 104, 0], [2 / 104, 5 / 105, -1 / 101], [0, -1 / 101, 1 / 101]]
    for most in (1 << 19, 2):
        monkeypatch.setattr(order_statistics, "MOST_ENTRIES", most)
        assert sign_agreement([one, two, three]) == pytest.approx(np.array(expected))


def test_a_flipped_update_is_opposed_and_no_other():
    honest = [drawn(seed) for seed in range(1, 9)]
    flipped = [drawn(seed, sign=-10.0) for seed in (9, 10)]
    assert opposed([*flipped, *honest], limit=0.1) == [True] * 2 + [False] * 8
    assert opposed([*honest, drawn(9, sign=100.0)], limit=0.1) == [False] * 9
    assert opposed([*flipped, *honest], limit=0.0) == [False] * 10


def test_unrelated_updates_are_not_opposed():
    for first in range(1, 100, 10):
        clients = [drawn(seed, common=0.0) for seed in range(first, first + 10)]
        assert not any(opposed(clients, limit=0.1))
    disjoint = [client({(0, 0): np.eye(4)[at]}) for at in range(4)]
    assert not any(opposed(disjoint, limit=0.1))


def test_without_a_majority_none_is_opposed():
    assert opposed([drawn(1), drawn(2, sign=-1.0)], limit=0.1) == [False] * 2
    halves = [drawn(seed, sign=(-1.0) ** seed) for seed in range(1, 9)]
    assert opposed(halves, limit=0.1) == [False] * 8
    assert opposed([drawn(1), drawn(2), drawn(3, sign=-1.0)], limit=0.1) == [False, False, True]
