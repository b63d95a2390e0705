from __future__ import annotations

import numpy as np
import pytest

from federated.updates.update import (
    RefusedUpdate,
    SparseUpdate,
    SparseVector,
    density,
    join_indices,
    join_values,
    parse_unit,
    replace_values,
    split_columns,
    unit_name,
)

FIRST = SparseVector(5, np.array([1, 4]), np.array([2.0, -3.0]))
SECOND = SparseVector(3, np.array([0]), np.array([7.0]))
UPDATE = SparseUpdate(4, "abc", {(1, 0): SECOND, (0, 2): FIRST, (0, -1): SparseVector(2, [], [])})


def test_dense_and_back_by_mask_and_by_indices():
    dense = FIRST.to_dense()
    assert dense.tolist() == [0, 2, 0, 0, -3] and dense.dtype == np.float32
    assert SparseVector.from_dense(dense, dense != 0) == FIRST
    assert SparseVector.from_dense(dense, np.array([1, 4])) == FIRST
    assert SparseVector.from_dense(dense, np.zeros(5, dtype=bool)).indices.size == 0


def test_equality_sees_size_positions_and_values():
    assert SparseVector(6, FIRST.indices, FIRST.values) != FIRST
    assert SparseVector(5, np.array([1, 3]), FIRST.values) != FIRST
    assert SparseVector(5, FIRST.indices, FIRST.values + 1) != FIRST
    assert FIRST != "something else"


@pytest.mark.parametrize("indices, count", [([-1, 2], 2), ([2, 5], 2), ([2, 2], 2), ([3, 1], 2), ([1], 2)])
def test_positions_that_cannot_be_are_refused(indices, count):
    with pytest.raises(ValueError, match="expected"):
        SparseVector(5, np.array(indices), np.ones(count))


def test_density_counts_all_shipped_units():
    assert density(UPDATE) == pytest.approx(3 / 10)
    assert density(SparseUpdate(0, "", {})) == 0.0


def test_joined_columns_are_in_unit_order_and_split_back():
    indices, total = join_indices(UPDATE)
    assert total == 10 and indices.tolist() == [2 + 1, 2 + 4, 7 + 0]
    assert join_values(UPDATE).tolist() == [2.0, -3.0, 7.0]
    sizes = [((0, -1), 2), ((0, 2), 5), ((1, 0), 3)]
    assert split_columns(sizes, indices, join_values(UPDATE)) == UPDATE.vectors


def test_an_update_without_units_joins_to_empty_columns():
    empty = SparseUpdate(0, "", {})
    assert join_values(empty).size == 0 and join_indices(empty)[0].size == 0 and join_indices(empty)[1] == 0


def test_replaced_values_keep_positions():
    doubled = replace_values(UPDATE, 2 * join_values(UPDATE))
    assert doubled.vectors[(0, 2)].to_dense().tolist() == [0, 4, 0, 0, -6]
    assert (doubled.graph_version, doubled.graph_hash) == (4, "abc")


def test_a_refusal_carries_its_reason():
    assert RefusedUpdate("too short").reason == "too short" and issubclass(RefusedUpdate, ValueError)


@pytest.mark.parametrize("unit", [(0, 0), (31, 127), (2, -1)])
def test_the_name_of_a_unit_leads_back_to_it(unit):
    assert parse_unit(unit_name(unit)) == unit


@pytest.mark.parametrize("name", ["", "1", "1.2.3", "a.1", "1."])
def test_other_texts_name_no_unit(name):
    with pytest.raises(ValueError):
        parse_unit(name)
