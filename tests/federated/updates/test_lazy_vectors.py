from __future__ import annotations

import pytest
import torch

from federated.updates.lazy_vectors import LazyVectors


def test_vectors_are_computed_when_they_are_asked_for_and_not_before():
    asked = []

    def compute(unit):
        asked.append(unit)
        return torch.tensor([float(unit[1])])

    vectors = LazyVectors([(1, 2), (0, 3)], compute)
    assert list(vectors) == [(1, 2), (0, 3)] and len(vectors) == 2
    assert (0, 3) in vectors and (0, 0) not in vectors and asked == []
    assert vectors[(0, 3)].item() == 3 and vectors[(0, 3)].item() == 3
    assert asked == [(0, 3)] * 2
    with pytest.raises(KeyError):
        vectors[(0, 0)]
    assert dict(vectors) == {(1, 2): torch.tensor([2.0]), (0, 3): torch.tensor([3.0])}
    assert dict(LazyVectors([], compute)) == {}
