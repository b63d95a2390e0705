from __future__ import annotations

from dataclasses import replace

import pytest

from federated.aggregation.contribution import Contribution, UpdateSummary, summarize
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
