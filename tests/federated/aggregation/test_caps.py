from __future__ import annotations

import pytest

from federated.aggregation.caps import capped, untrusted


def test_values_are_capped_at_a_multiple_of_the_lower_median():
    assert capped([1.0, 2.0, 3.0, 100.0], 2.0) == [1.0, 2.0, 3.0, 4.0]
    assert capped([5.0, 1.0, 2.0], 1.0) == [2.0, 1.0, 2.0]


def test_one_of_two_cannot_raise_its_own_cap():
    assert capped([3.0, 2.0**40], 4.0) == [3.0, 12.0]


@pytest.mark.parametrize("values", [[], [7.0], [1.0, 2.0**40]])
def test_a_multiple_of_zero_caps_nothing(values):
    assert capped(values, 0.0) == values
    assert capped([7.0], 1.0) == [7.0]


def test_a_fifth_of_the_clients_is_untrusted_and_at_least_one_of_three():
    assert [untrusted(clients) for clients in (0, 1, 2, 3, 5, 9, 10, 24)] == [0, 0, 0, 1, 1, 1, 2, 4]
