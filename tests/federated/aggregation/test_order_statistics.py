from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import trim_mean

from federated.aggregation import order_statistics
from federated.aggregation.order_statistics import EntryRanges, trimmed_means
from federated.updates.update import SparseUpdate, SparseVector

ENTRY = order_statistics._ENTRY


def records(*entries: tuple[int, float, float]) -> np.ndarray:
    return np.array(list(entries), dtype=ENTRY)


@pytest.mark.parametrize("count", [3, 4, 5, 9, 10, 11, 20])
def test_equals_scipy_where_every_client_shipped_every_entry(count):
    values = np.random.default_rng(count).normal(size=(count, 7)).astype(np.float32)
    entries = records(*((at, row[at], 1.0) for row in values for at in range(7)))
    assert trimmed_means(entries, 7, trim=0.5) == pytest.approx(np.median(values, 0), rel=1e-6)
    if count >= 5:
        assert trimmed_means(entries, 7, trim=0.2) == pytest.approx(trim_mean(values, 0.2), rel=1e-5)


def test_at_least_one_value_at_each_end_is_left_out_of_three_or_more():
    entries = records((1, 1.0, 1.0), (1, 2.0, 1.0), (1, 9.0, 1.0))
    assert trimmed_means(entries, 3, trim=0.0).tolist() == [0.0, 2.0, 0.0]


def test_one_or_two_values_are_averaged_by_weight():
    entries = records((0, 4.0, 1.0), (0, 8.0, 3.0), (2, -5.0, 0.5))
    assert trimmed_means(entries, 4, trim=0.5).tolist() == [7.0, 0.0, -5.0, 0.0]


def test_no_entry_gives_zeros():
    assert trimmed_means(records(), 2, trim=0.2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("most", [1, 3, 1 << 20])
def test_ranges_hold_every_entry_once(monkeypatch, most):
    monkeypatch.setattr(order_statistics, "MOST_ENTRIES", most)
    sizes = {(0, 0): 5, (0, 1): 4, (1, -1): 6}
    one = SparseUpdate(
        0, "", {(0, 0): SparseVector(5, [0, 4], [1.0, 2.0]), (1, -1): SparseVector(6, [3], [3.0])}
    )
    two = SparseUpdate(0, "", {(0, 0): SparseVector(5, [1, 2, 4], [4.0, 5.0, 6.0])})
    counts = {(0, 0): 5, (0, 1): 0, (1, -1): 1}
    found = {}
    with EntryRanges(sizes, counts) as ranges:
        ranges.add(one, {(0, 0): 2.0, (1, -1): 1.0}, {(0, 0): 0.25, (1, -1): 1.0})
        ranges.add(two, {(0, 0): 1.0}, {(0, 0): 0.75})
        folder = ranges._folder.name
        for spans, entries in ranges:
            for span in spans:
                inside = entries[(entries["position"] >= span.offset) & (entries["position"] < span.end)]
                for position, value, weight in inside.tolist():
                    at = (span.unit, position - span.offset + span.start)
                    found.setdefault(at, []).append((value, weight))
            assert sum(span.stop - span.start for span in spans) == spans[-1].end
    assert found == {
        ((0, 0), 0): [(2.0, 0.25)],
        ((0, 0), 1): [(4.0, 0.75)],
        ((0, 0), 2): [(5.0, 0.75)],
        ((0, 0), 4): [(4.0, 0.25), (6.0, 0.75)],
        ((1, -1), 3): [(3.0, 1.0)],
    }
    assert not Path(folder).exists()
