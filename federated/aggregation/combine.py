"""Combination of sparse client updates into one dense change per unit, with one update decoded at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from configs.run_views import Combine
from federated.aggregation.clipping import clip_scales
from federated.aggregation.contribution import Contribution, UpdateSummary, check_size, entry_counts
from federated.aggregation.order_statistics import EntryRanges, trimmed_means
from federated.updates.update import SparseUpdate, SparseVector
from models.graph.unit_vectors import Unit

_LARGEST_FACTOR = float(np.finfo(np.float32).max)
# Combinations of each entry over the clients that shipped it, whose factors are those of ``hajek``.
_ENTRYWISE = ("entrywise", "trimmed-mean", "median")


def aggregate(
    contributions: Iterable[Contribution],
    *,
    combine: Combine = "hajek",
    server_learning_rate: float = 1.0,
    clip_norm_multiple: float = 0.0,
    clip_unit_multiple: float = 0.0,
    trim_share: float = 0.2,
) -> dict[Unit, Tensor]:
    """Return the weighted combination of client updates, float32 [size], for each unit that a client shipped.

    - ``entrywise``: ``hajek`` per entry, over the clients that shipped this entry: an entry from a single client
      enters with its full value, an entry from several is averaged;
    - ``hajek``: ``sum w/pi * change / sum w/pi`` over the clients that shipped the unit (Hajek, 1971);
    - ``horvitz-thompson``: ``sum w/pi * change`` over the weight of the clients that trained the unit (Horvitz and
      Thompson, 1952);
    - ``mean``: ``sum w * change`` over the weight of all clients;
    - ``trimmed-mean``, ``median``: as ``entrywise``, where three or more shipped an entry without ``trim_share``
      of the values at each end, or all but the middle ones (Yin et al., 2018, arXiv:1803.01498).

    Updates and their units are first clipped to multiples of the round's median norms (``clip_scales``; 0: off). The
    factors follow from the summaries alone; the updates are then decoded and added one at a time, so memory stays near
    one model (``entrywise``: two; trimmed means and medians sort entries in files) for any number of clients.

    Raises ValueError for no client, or for invalid weights, probabilities, sizes or factors.
    """
    contributions = list(contributions)
    if not contributions:
        raise ValueError("expected at least one client's update, got none")
    for contribution in contributions:
        if not 0 < contribution.weight < float("inf"):
            raise ValueError(f"expected a client weight above 0, got {contribution.weight}")
    summaries = [contribution.summarized() for contribution in contributions]
    factors = unit_factors(contributions, summaries, combine)
    scales = [
        {unit: server_learning_rate * scale for unit, scale in own.items()}
        for own in clip_scales(summaries, multiple=clip_norm_multiple, unit_multiple=clip_unit_multiple)
    ]
    if combine in ("trimmed-mean", "median"):
        trim = 0.5 if combine == "median" else trim_share
        sums = _trimmed(contributions, summaries, factors, scales, trim)
    else:
        sums = _summed(contributions, factors, scales, entrywise=combine == "entrywise")
    return {unit: torch.from_numpy(sums[unit]) for unit in sorted(sums)}


def unit_factors(
    contributions: Sequence[Contribution], shipped: Sequence[Iterable[Unit]], combine: Combine
) -> list[dict[Unit, float]]:
    """Return, per client, the factor of its change of each unit that it shipped.

    Factors are normalized before any change is summed, so that no sum can overflow.

    Raises:
        ValueError: an unknown ``combine``, a probability outside (0, 1], or a unit that was shipped but not trained.
    """
    if combine not in get_args(Combine):
        raise ValueError(f"expected combine {', '.join(get_args(Combine))}, got {combine!r}")
    largest = max(contribution.weight for contribution in contributions)
    weights = [contribution.weight / largest for contribution in contributions]
    if not min(weights) > 0:
        raise ValueError(
            "expected client weights of comparable size, got one that vanishes relative to another"
        )
    factors = []
    for contribution, units, weight in zip(contributions, shipped, weights, strict=True):
        if contribution.trained is not None and not contribution.trained.issuperset(units):
            stray = min(set(units) - contribution.trained)
            raise ValueError(f"unit {stray} was shipped by a client that did not train it")
        factors.append({unit: weight / _divisor(contribution, unit, combine) for unit in units})
    totals = {unit: _total(unit, contributions, factors, weights, combine) for unit in set().union(*factors)}
    return [{unit: factor / totals[unit] for unit, factor in own.items()} for own in factors]


def _divisor(contribution: Contribution, unit: Unit, combine: Combine) -> float:
    probability = contribution.inclusion.get(unit, 1.0)
    if not 0 < probability <= 1:
        raise ValueError(f"expected a probability in (0, 1] for unit {unit}, got {probability}")
    return 1.0 if combine == "mean" else probability


def _total(
    unit: Unit,
    contributions: Sequence[Contribution],
    factors: Sequence[dict[Unit, float]],
    weights: Sequence[float],
    combine: Combine,
) -> float:
    if combine in ("hajek", *_ENTRYWISE):
        return sum(own.get(unit, 0.0) for own in factors)
    everyone = combine == "mean"
    return sum(
        weight
        for contribution, weight in zip(contributions, weights, strict=True)
        if everyone or contribution.trained is None or unit in contribution.trained
    )


def _summed(
    contributions: Sequence[Contribution],
    factors: Sequence[Mapping[Unit, float]],
    scales: Sequence[Mapping[Unit, float]],
    *,
    entrywise: bool,
) -> dict[Unit, np.ndarray]:
    sums: dict[Unit, np.ndarray] = {}
    covered: dict[Unit, np.ndarray] | None = {} if entrywise else None
    for contribution, own, scale in zip(contributions, factors, scales, strict=True):
        _add_update(sums, covered, contribution.unpack(), own, scale)
    for unit, total in (covered or {}).items():
        np.divide(sums[unit], total, out=sums[unit], where=total > 0)
    return sums


def _trimmed(
    contributions: Sequence[Contribution],
    summaries: Sequence[UpdateSummary],
    factors: Sequence[Mapping[Unit, float]],
    scales: Sequence[Mapping[Unit, float]],
    trim: float,
) -> dict[Unit, np.ndarray]:
    sizes, counts = entry_counts(summaries)
    changes = {unit: np.zeros(size, dtype=np.float32) for unit, size in sizes.items()}
    with EntryRanges(sizes, counts) as ranges:
        for contribution, own, scale in zip(contributions, factors, scales, strict=True):
            ranges.add(contribution.unpack(), scale, own)
        for spans, entries in ranges:
            means = trimmed_means(entries, spans[-1].end, trim=trim)
            for span in spans:
                changes[span.unit][span.start : span.stop] = means[span.offset : span.end]
    return changes


def _add_update(
    sums: dict[Unit, np.ndarray],
    covered: dict[Unit, np.ndarray] | None,
    update: SparseUpdate,
    factors: Mapping[Unit, float],
    scales: Mapping[Unit, float],
) -> None:
    # A separate function, so that one update is freed before the next is decoded.
    for unit, vector in update.vectors.items():
        _add_scaled(sums, unit, vector, vector.values, scales[unit] * factors[unit])
        if covered is not None:
            _add_scaled(covered, unit, vector, np.ones_like(vector.values), factors[unit])


def _add_scaled(
    sums: dict[Unit, np.ndarray], unit: Unit, vector: SparseVector, values: np.ndarray, factor: float
) -> None:
    if not abs(factor) <= _LARGEST_FACTOR:
        raise ValueError(f"expected a finite factor for unit {unit}, got {factor}")
    total = sums.setdefault(unit, np.zeros(vector.size, dtype=np.float32))
    check_size(unit, vector.size, total.size)
    total[vector.indices] += np.float32(factor) * values
