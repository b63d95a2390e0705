from __future__ import annotations

import pytest

from federated.aggregation.clipping import clip_scales
from federated.aggregation.contribution import UnitSummary, UpdateSummary

A, B = (0, 0), (1, 0)


def summary(**norms: float) -> UpdateSummary:
    return UpdateSummary((({"a": A, "b": B}[name]), UnitSummary(norm, 1, 4)) for name, norm in norms.items())


def scales(*summaries: UpdateSummary, whole: float = 0.0, unit: float = 0.0) -> list[dict]:
    return clip_scales(summaries, multiple=whole, unit_multiple=unit)


def test_without_multiples_nothing_is_clipped():
    assert scales(summary(a=1.0), summary(a=1e9, b=2.0)) == [{A: 1.0}, {A: 1.0, B: 1.0}]


def test_a_whole_update_is_clipped_to_a_multiple_of_the_median_norm():
    found = scales(summary(a=3.0, b=4.0), summary(a=5.0), summary(a=30.0, b=40.0), whole=2.0)
    assert found == [{A: 1.0, B: 1.0}, {A: 1.0}, {A: 0.2, B: 0.2}]


def test_one_of_two_cannot_raise_its_own_limit():
    assert scales(summary(a=1.0), summary(a=100.0), whole=3.0) == [{A: 1.0}, {A: pytest.approx(0.03)}]


def test_a_unit_is_clipped_where_three_clients_shipped_it():
    found = scales(summary(a=1.0, b=1.0), summary(a=2.0), summary(a=8.0, b=9.0), unit=2.0)
    assert found == [{A: 1.0, B: 1.0}, {A: 1.0}, {A: 0.5, B: 1.0}]


def test_units_are_clipped_after_the_whole_update():
    found = scales(summary(a=1.0), summary(a=1.0), summary(a=10.0), whole=4.0, unit=2.0)
    assert found[2] == {A: pytest.approx(0.2)}
    assert scales(summary(), summary(a=0.0), whole=1.0, unit=1.0) == [{}, {A: 1.0}]
