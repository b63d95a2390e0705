"""Timings of two things side by side, and intervals over seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from scipy import stats


def alternate(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    on_repeat: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Time each of ``runs`` ``repeats`` times in turn: seconds by name.

    In turn, so that what else the machine does meets all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if repeat >= warmup:
                seconds[name].append(elapsed)
        on_repeat(repeat + 1)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of pairs that were measured one after the other."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of at least two values, e.g. one per seed."""
    if len(values) < 2:
        raise ValueError(f"expected at least two values for an interval, got {len(values)}")
    mean, error = statistics.fmean(values), stats.sem(values)
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)
