from __future__ import annotations

import copy

import numpy as np

from experts.graph.edits import AddEdge, RetireExpert, SpawnExpert
from server.state.usage_average import UsageAverage


def test_usage_is_averaged_over_rounds():
    average = UsageAverage()
    one, two = np.array([[1, 2], [0, 3]]), np.array([[3, 1], [0, 2]])
    average.add([one + two, 2 * two], decay=0.75)
    assert np.array_equal(average.counts[0], one + two) and np.array_equal(average.counts[1], 2 * two)
    average.add([two, one], decay=0.75)
    assert np.allclose(average.counts[0], 0.75 * (one + two) + 0.25 * two)
    assert np.allclose(average.counts[1], 0.75 * 2 * two + 0.25 * one)
    before = copy.deepcopy(average.counts)
    average.add([], decay=0.75)
    assert all(np.array_equal(a, b) for a, b in zip(average.counts, before, strict=True))


def test_a_decay_of_zero_forgets_the_past():
    average = UsageAverage()
    for value in (5, 7):
        average.add([np.full((2, 2), value)], decay=0.0)
    assert average.counts[0].tolist() == [[7, 7], [7, 7]]


def test_pairs_whose_edge_came_or_went_start_from_the_mean_of_their_layer():
    average = UsageAverage()
    counts = np.array([[9, 1, 2], [0, 9, 6], [0, 0, 9]])
    average.add([counts, counts], decay=0.5)
    average.reset([AddEdge(1, 1, 2)])
    assert np.array_equal(average.counts[0], counts)
    assert average.counts[1].tolist() == [[9, 1, 2], [0, 9, 3], [0, 0, 9]]


def test_counts_follow_a_plan_and_those_of_new_experts_are_zero():
    average = UsageAverage([np.arange(9.0).reshape(3, 3)])
    average.renumber([np.array([0, 2, -1])])
    np.testing.assert_array_equal(average.counts[0], [[0, 2, 0], [6, 8, 0], [0, 0, 0]])
    average.reset([SpawnExpert(0, 1, 3), RetireExpert(0, 1)])  # no edge is edited
    np.testing.assert_array_equal(average.counts[0], [[0, 2, 0], [6, 8, 0], [0, 0, 0]])
    empty = UsageAverage()
    empty.renumber([np.array([0])])
    assert empty.counts == []
