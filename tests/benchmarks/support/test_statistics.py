"""Interleaved timings, ratios and Student's t intervals against known values."""

from __future__ import annotations

import time

import pytest

from benchmarks.support.statistics import alternate, interval, median_ratio, processor_seconds


def test_runs_are_interleaved_and_warm_up_is_not_timed():
    calls, repeats = [], []
    seconds = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=2,
        warmup=1,
        on_repeat=repeats.append,
    )
    assert calls == ["a", "b"] * 3 and repeats == [1, 2, 3]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_sleep_takes_wall_clock_time_but_no_processor_time():
    seconds = alternate({"sleep": lambda: time.sleep(0.05)}, repeats=1, warmup=0)
    assert seconds["sleep"][0] >= 0.05
    assert processor_seconds(lambda: time.sleep(0.05), 3) < 0.02


def test_median_ratio_is_of_pairs():
    assert median_ratio([1.0, 6.0, 20.0], [1.0, 2.0, 5.0]) == 3.0
    with pytest.raises(ValueError, match="longer"):
        median_ratio([1.0], [1.0, 2.0])


def test_interval_of_three_values_has_students_width():
    # Mean 2, standard error 1 / sqrt(3), t quantile 4.3027 at two degrees of freedom.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-4)
    assert interval([5.0, 5.0]) == (5.0, 5.0)


def test_an_interval_of_one_value_is_refused():
    with pytest.raises(ValueError, match="two values"):
        interval([1.0])
