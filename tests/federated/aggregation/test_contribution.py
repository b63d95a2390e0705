from __future__ import annotations

from dataclasses import replace

import pytest

from federated.aggregation.contribution import (
    Contribution,
    UnitSummary,
    UpdateSummary,
    entry_counts,
    summarize,
)
from federated.updates.update import SparseUpdate, SparseVector

UPDATE = SparseUpdate(
    0, "", {(0, 0): SparseVector(6, [0, 2], [3.0, 4.0]), (1, 0): SparseVector(9, [5], [12.0])}
)


def test_the_summary_holds_norm_and_sizes_of_each_unit():
    summary = summarize(UPDATE)
    assert summary == {(0, 0): (5.0, 2, 6), (1, 0): (12.0, 1, 9)}
    assert summary[(0, 0)].norm == 5.0 and summary[(1, 0)].size == 9
    assert summary.norm == pytest.approx(13.0)
    assert summarize(SparseUpdate(0, "", {})).norm == 0.0


def test_a_known_summary_is_not_computed_again():
    one = Contribution(1.0, lambda: UPDATE)
    assert one.summarized() == summarize(UPDATE)
    empty = replace(one, unpack=lambda: pytest.fail("decoded"), summary=UpdateSummary())
    assert empty.summarized() == {}


def test_counts_of_a_unit_add_up_and_its_size_is_that_of_all_clients():
    one = UpdateSummary({(0, 1): UnitSummary(1.0, 3, 10), (1, 0): UnitSummary(1.0, 2, 5)})
    other = UpdateSummary({(0, 1): UnitSummary(2.0, 4, 10)})
    assert entry_counts([one, other]) == ({(0, 1): 10, (1, 0): 5}, {(0, 1): 7, (1, 0): 2})
    with pytest.raises(ValueError, match="has 9 entries from one client, 10 from another"):
        entry_counts([one, UpdateSummary({(0, 1): UnitSummary(2.0, 4, 9)})])
