"""Interleaved timings and their ratios, and confidence intervals over seeds."""

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
    """Wall-clock seconds of each run, interleaved so that other load on the machine affects all of them alike.

    Args:
        runs: functions to time, by name.
        repeats: timed repetitions of each.
        warmup: repetitions before them that are not timed.
        on_repeat: called with the number of repetitions done.
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


def processor_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median processor seconds of ``run``, summed over threads."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of paired measurements."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t confidence interval of the mean of at least two values, e.g. one per seed.

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"expected at least two values for an interval, got {len(values)}")
    mean, error = statistics.fmean(values), stats.sem(values)
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)
