from __future__ import annotations

import pytest

from benchmarks.drift.recovery import equal_byte_rounds, first_crossing, target_loss


def test_the_target_is_a_share_of_the_decrease():
    assert target_loss([5.0, 3.5, 4.0], 0.9) == pytest.approx(4.1)
    assert target_loss([5.0, 4.0], 1.0) == 4.0


def test_bytes_become_rounds_of_equal_bytes():
    assert equal_byte_rounds([100, 200, 50], 100) == [0.0, 1.0, 3.0, 3.5]


def test_the_crossing_is_interpolated():
    losses = [5.0, 4.0, 3.0, 3.0]
    assert first_crossing([0, 1, 2, 3], losses, 3.25) == pytest.approx(1.75)
    assert first_crossing([0, 2, 4, 6], losses, 3.25) == pytest.approx(3.5)
    assert first_crossing([0, 1, 2, 3], losses, 4.0) == 1.0
    assert first_crossing([0, 1, 2, 3], losses, 3.0) == 2.0
    assert first_crossing([0, 1, 2, 3], losses, 5.5) == 0
    assert first_crossing([0, 1, 2, 3], losses, 2.9) is None


def test_only_the_first_crossing_counts():
    assert first_crossing([0, 1, 2, 3], [5.0, 3.0, 4.5, 2.0], 4.0) == 0.5
