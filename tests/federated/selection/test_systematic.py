from __future__ import annotations

import numpy as np
import pytest

from federated.selection.systematic import draw_systematic, inclusion_probabilities


@pytest.mark.parametrize(
    "sizes, draws, expected",
    [
        ([1, 1, 2], 1, [0.25, 0.25, 0.5]),
        ([1, 1, 10], 2, [0.5, 0.5, 1.0]),
        ([1, 1, 10, 100], 3, [0.5, 0.5, 1.0, 1.0]),
        ([1, 2], 2, [1.0, 1.0]),
        ([1, 2, 3], 0, [1.0, 1.0, 1.0]),
    ],
)
def test_inclusion_probabilities(sizes, draws, expected):
    result = inclusion_probabilities(dict(enumerate(sizes)), draws)
    assert [result[key] for key in range(len(sizes))] == pytest.approx(expected)


def test_elements_of_size_zero_have_no_probability():
    assert inclusion_probabilities({"a": 0.0, "b": 1.0, "c": 3.0}, 1) == {"b": 0.25, "c": 0.75}
    assert inclusion_probabilities({}, 2) == {}


@pytest.mark.parametrize(
    "start, expected", [(0.0, ["a", "c"]), (0.2, ["a", "c"]), (0.3, ["b", "c"]), (0.9, ["c", "d"])]
)
def test_an_element_is_drawn_where_its_interval_holds_a_point(start, expected):
    """The intervals end at 0.25, 0.75, 1.75 and 2."""
    probabilities = {"a": 0.25, "b": 0.5, "c": 1.0, "d": 0.25}
    drawn = draw_systematic(probabilities, start)
    assert drawn == {key: probabilities[key] for key in expected}


def test_every_element_is_drawn_with_its_probability_and_their_number_is_fixed():
    probabilities = inclusion_probabilities({"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0}, 2)
    starts = (np.arange(1000) + 0.5) / 1000
    draws = [draw_systematic(probabilities, start) for start in starts]
    assert {len(drawn) for drawn in draws} == {2}
    for key, probability in probabilities.items():
        assert np.mean([key in drawn for drawn in draws]) == pytest.approx(probability, abs=1e-3)
