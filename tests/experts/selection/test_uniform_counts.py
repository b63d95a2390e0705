from __future__ import annotations

import numpy as np
import pytest

from configs.errors import UserError
from experts.selection.uniform_counts import check_uniform, equalize


def test_layers_of_different_numbers_are_refused_by_name():
    keep = {0: np.arange(3), 1: np.arange(2), 2: np.array([1, 4, 5])}
    with pytest.raises(
        UserError, match="mixtral holds one number, got 3 in layers 0, 2; 2 in layers 1; set `equal"
    ):
        check_uniform(keep, "mixtral")
    check_uniform({0: np.array([0, 3]), 1: np.array([1, 2])}, "mixtral")
    check_uniform({}, "mixtral")


def test_the_best_ranked_of_the_pruned_come_back_and_nobody_goes():
    keep = {0: np.array([5, 0, 3]), 1: np.array([2]), 2: np.array([0, 1])}
    ranks = {1: {0: 3.0, 1: 2.5, 2: 9.0, 3: 1.0}, 2: {0: 1.0, 1: 2.0, 2: 4.0, 3: 3.5, 4: 3.5}}
    raised = equalize(keep, ranks, [6, 4, 5])
    assert {layer: ids.tolist() for layer, ids in raised.items()} == {
        0: [0, 3, 5],
        1: [1, 2, 3],
        2: [0, 1, 3],
    }
    check_uniform(raised, "mixtral")
    assert keep[1].tolist() == [2]


def test_equal_layers_need_no_ranks():
    keep = {0: np.array([1, 0]), 1: np.array([2, 3])}
    assert [ids.tolist() for ids in equalize(keep, {}, [4, 4]).values()] == [[0, 1], [2, 3]]


def test_a_layer_without_the_ranks_to_choose_by_is_refused():
    keep = {0: np.array([0, 1]), 1: np.array([0])}
    with pytest.raises(UserError, match="ranks to equalize layer 1, got none for 1, 2"):
        equalize(keep, {0: {0: 1.0}}, [3, 3])
    with pytest.raises(UserError, match="got none for 2"):
        equalize(keep, {1: {0: 1.0, 1: 2.0}}, [3, 3])


def test_a_layer_that_has_fewer_experts_than_another_keeps_is_refused():
    with pytest.raises(UserError, match="expected 3 experts in layer 1 to equalize, got 2"):
        equalize({0: np.arange(3), 1: np.array([0])}, {1: {0: 1.0, 1: 2.0}}, [3, 2])
