"""Comparison of runs: ratios of bytes, worst clients and perplexities where runs reach the same loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.support.quality.result import Run, mean_loss
from benchmarks.support.statistics import interval

# Share of the log-perplexity gain of FedAvg over all its rounds that is the target.
GAIN_SHARE = 0.9

# Values of a figure by seed; None where a run does not reach the loss at which they are compared.
Values = list[float | None]


def target(run: Run) -> float:
    """Mean loss at which a run has made ``GAIN_SHARE`` of its gain."""
    start = mean_loss(run.trajectory[0])
    return start - GAIN_SHARE * (start - run.loss)


def byte_ratios(
    ones: Sequence[Run],
    others: Sequence[Run],
    goals: Sequence[float],
    bytes_of: Callable[[Mapping[str, Any]], float],
) -> Values:
    """Per seed, the ratio of the bytes of two runs where each reaches the goal; None where one does not.

    Args:
        ones: runs of the numerator, one per seed.
        others: runs of the denominator, of the same seeds.
        goals: mean loss of each seed, nats per token.
        bytes_of: ``uplink`` or ``both_directions``.
    """
    ratios: Values = []
    for one, other, goal in zip(ones, others, goals, strict=True):
        values = [bytes_of(entry) for entry in (one.reached(goal), other.reached(goal)) if entry]
        ratios.append(values[0] / values[1] if len(values) == 2 and values[1] else None)
    return ratios


def worst_ratios(ones: Sequence[Run], others: Sequence[Run], goals: Sequence[float]) -> Values:
    """Per seed, the ratio of the two runs' worst-client perplexity changes, both at the same mean loss."""
    changes = [
        [run.worst_change(goal) for run in pair] for *pair, goal in zip(ones, others, goals, strict=True)
    ]
    return [one / other if one is not None and other is not None else None for one, other in changes]


def uplink(entry: Mapping[str, Any]) -> float:
    """Uplink bytes up to an entry of a trajectory."""
    return entry["up"]


def both_directions(entry: Mapping[str, Any]) -> float:
    """Bytes of both directions up to an entry of a trajectory."""
    return entry["up"] + entry["down"]


def mean_figures(found: Mapping[str, Values]) -> dict[str, float | None]:
    """Mean of each figure over its seeds; None where one is missing."""
    return {name: _mean(values) for name, values in found.items()}


def intervals(found: Mapping[str, Values]) -> dict[str, Any]:
    """95 % interval of each figure that has a value on every one of several seeds."""
    complete = {name: values for name, values in found.items() if None not in values}
    return {name: interval(values) for name, values in complete.items() if len(values) > 1}


def figure_notes(found: Mapping[str, Values], mean_of: str) -> dict[str, str]:
    """Note on each figure: over how many seeds it is a mean (``mean_of`` says of which), or that it was not reached."""
    return {
        name: (
            f"mean over seeds ({len(values)}){mean_of}"
            if _mean(values) is not None
            else "not reached on every seed within the rounds there are"
        )
        for name, values in found.items()
    }


def perplexities(run: Run) -> dict[str, Any]:
    """Geometric mean perplexity over clients at the start and at the end of a run, and its rounds and bytes."""
    start, end = (math.exp(mean_loss(run.trajectory[index])) for index in (0, -1))
    return {"start": start, "end": end, **{key: run.trajectory[-1][key] for key in ("round", "up", "down")}}


def run_line(run: Run) -> str:
    """One line about a finished run."""
    end = run.trajectory[-1]
    keys = "".join(f", {name} {value}" for name, value in run.keys.items())
    return (
        f"{run.method}, seed {run.seed}, {run.learning_rate[0]:g} {run.learning_rate[1]}{keys}: loss "
        f"{mean_loss(run.trajectory[0]):.4f} to {run.loss:.4f} in {end['round']} rounds, "
        f"{end['up'] / 1e6:.3f} MB up, {end['down'] / 1e6:.3f} MB down, {run.edits} edits, {run.seconds:.0f} s"
    )


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
