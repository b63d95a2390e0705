"""Weighted combination of sparse client updates into one dense change per unit, with one update decoded at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from configs.run_views import Combine
from federated.updates.update import SparseUpdate, SparseVector
from models.graph.unit_vectors import Unit

_LARGEST_FACTOR = float(np.finfo(np.float32).max)


class UpdateSummary(NamedTuple):
    """Units of an update and its Euclidean norm over all values: all that the weights of a round depend on."""

    units: frozenset[Unit]
    norm: float


@dataclass(frozen=True)
class Contribution:
    """One client's accepted update and its weight.

    Attributes:
        weight: share or number of examples or tokens, above 0.
        unpack: decodes the update; called once per pass, so that a single update is in memory at a time.
        inclusion: inclusion probability of each shipped unit, 1 where absent.
        trained: units that the client trained; None for all.
        summary: of the update; None: computed by an additional decode.
    """

    weight: float
    unpack: Callable[[], SparseUpdate]
    inclusion: dict[Unit, float] = field(default_factory=dict)
    trained: set[Unit] | None = None
    summary: UpdateSummary | None = None

    def summarized(self) -> UpdateSummary:
        """Units and norm of the update."""
        return self.summary or summarize(self.unpack())


def aggregate(
    contributions: Iterable[Contribution],
    *,
    combine: Combine = "hajek",
    server_learning_rate: float = 1.0,
    clip_norm_multiple: float = 0.0,
) -> dict[Unit, Tensor]:
    """Return the weighted combination of client updates, float32 [size], for each unit that a client shipped.

    - ``entrywise``: ``hajek`` per entry, over the clients that shipped this entry: an entry from a single client
      enters with its full value, an entry from several is averaged;
    - ``hajek``: ``sum w/pi * change / sum w/pi`` over the clients that shipped the unit (Hajek, 1971);
    - ``horvitz-thompson``: ``sum w/pi * change`` over the weight of the clients that trained the unit (Horvitz and
      Thompson, 1952);
    - ``mean``: ``sum w * change`` over the weight of all clients.

    Each update is first scaled down to at most ``clip_norm_multiple`` times the round's median norm (0: off).
    The factors follow from the summaries alone; the updates are then decoded and added one at a time, so memory
    stays near one model (``entrywise``: two) for any number of clients.

    Raises ValueError for no client, or for invalid weights, probabilities, sizes or factors.
    """
    contributions = list(contributions)
    if not contributions:
        raise ValueError("expected at least one client's update, got none")
    for contribution in contributions:
        if not 0 < contribution.weight < float("inf"):
            raise ValueError(f"expected a client weight above 0, got {contribution.weight}")
    summaries = [contribution.summarized() for contribution in contributions]
    factors = unit_factors(contributions, [each.units for each in summaries], combine)
    scales = _clip_scales([each.norm for each in summaries], clip_norm_multiple)
    sums: dict[Unit, np.ndarray] = {}
    covered: dict[Unit, np.ndarray] | None = {} if combine == "entrywise" else None
    for contribution, own, scale in zip(contributions, factors, scales, strict=True):
        _add_update(sums, covered, contribution.unpack(), own, server_learning_rate * scale)
    for unit, total in (covered or {}).items():
        np.divide(sums[unit], total, out=sums[unit], where=total > 0)
    return {unit: torch.from_numpy(sums[unit]) for unit in sorted(sums)}


def summarize(update: SparseUpdate) -> UpdateSummary:
    """Units and norm of an update."""
    return UpdateSummary(frozenset(update.vectors), update_norm(update))


def update_norm(update: SparseUpdate) -> float:
    """Return the Euclidean norm over all shipped values."""
    return float(sum(np.square(v.values, dtype=np.float64).sum() for v in update.vectors.values()) ** 0.5)


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
    if combine in ("entrywise", "hajek"):
        return sum(own.get(unit, 0.0) for own in factors)
    everyone = combine == "mean"
    return sum(
        weight
        for contribution, weight in zip(contributions, weights, strict=True)
        if everyone or contribution.trained is None or unit in contribution.trained
    )


def _clip_scales(norms: Sequence[float], multiple: float) -> list[float]:
    limit = multiple * statistics.median(norms) if multiple else float("inf")
    return [limit / norm if norm > limit else 1.0 for norm in norms]


def _add_update(
    sums: dict[Unit, np.ndarray],
    covered: dict[Unit, np.ndarray] | None,
    update: SparseUpdate,
    factors: dict[Unit, float],
    scale: float,
) -> None:
    # A separate function, so that one update is freed before the next is decoded.
    for unit, vector in update.vectors.items():
        _add_scaled(sums, unit, vector, vector.values, scale * factors[unit])
        if covered is not None:
            _add_scaled(covered, unit, vector, np.ones_like(vector.values), factors[unit])


def _add_scaled(
    sums: dict[Unit, np.ndarray], unit: Unit, vector: SparseVector, values: np.ndarray, factor: float
) -> None:
    if not abs(factor) <= _LARGEST_FACTOR:
        raise ValueError(f"expected a finite factor for unit {unit}, got {factor}")
    total = sums.setdefault(unit, np.zeros(vector.size, dtype=np.float32))
    if total.size != vector.size:
        raise ValueError(f"unit {unit} has {vector.size} entries from one client, {total.size} from another")
    total[vector.indices] += np.float32(factor) * values
