from __future__ import annotations

import pytest

from benchmarks.exchange.__main__ import measure


def test_a_quick_run_measures_both_ways():
    measured = measure(True, lambda *step: None)
    figures = measured.figures
    assert set(figures) == {"seconds_own", "seconds_flower", "ratio"}
    assert figures["seconds_own"] > 0
    assert figures["seconds_flower"] >= 3  # Flower waits 3 s between two queries
    assert figures["ratio"] == pytest.approx(figures["seconds_own"] / figures["seconds_flower"])
