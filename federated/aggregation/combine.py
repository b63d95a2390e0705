"""The server's step from what the clients shipped: one reply after the other, one dense vector for each expert."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from federated.updates.update import SparseUpdate, SparseVector, Unit

Combine = Literal["entrywise", "hajek", "horvitz-thompson", "mean"]

_LARGEST_FACTOR = float(np.finfo(np.float32).max)


class Shipped(NamedTuple):
    """What the first pass needs to know of an update: its units and its Euclidean norm over all values."""

    units: frozenset[Unit]
    norm: float


@dataclass(frozen=True)
class Contribution:
    """One client's reply.

    Attributes:
        weight: share or number of examples or tokens, above 0.
        update: what it shipped, or a function that unpacks it anew, so that nobody has to hold it.
        inclusion: probability with which each shipped unit was drawn, 1 where absent.
        trained: units that the client trained; None for all.
        shipped: of the update; None where it is to be unpacked for that.
    """

    weight: float
    update: SparseUpdate | Callable[[], SparseUpdate]
    inclusion: dict[Unit, float] = field(default_factory=dict)
    trained: set[Unit] | None = None
    shipped: Shipped | None = None

    def unpacked(self) -> SparseUpdate:
        """The update itself."""
        return self.update() if callable(self.update) else self.update

    def summary(self) -> Shipped:
        """Units and norm of the update."""
        return self.shipped or summarize(self.unpacked())


def aggregate(
    contributions: Iterable[Contribution],
    *,
    combine: Combine = "hajek",
    server_learning_rate: float = 1.0,
    clip_norm_multiple: float = 0.0,
) -> dict[Unit, Tensor]:
    """Return the step (float32 [size]) of every unit that at least one client shipped.

    - ``entrywise``: ``hajek`` for each entry by itself, over the clients that shipped this entry: what one client alone
      finds worth shipping counts in full, what several ship is averaged;
    - ``hajek``: ``sum w/pi * change / sum w/pi`` over the clients that shipped the unit (Hajek, 1971);
    - ``horvitz-thompson``: ``sum w/pi * change`` over the weight of the clients that trained the unit (Horvitz and
      Thompson, 1952);
    - ``mean``: ``sum w * change`` over the weight of all clients.

    A client's change is first scaled down to ``clip_norm_multiple`` times the median norm of the round (0: off).
    A first pass reads what was shipped and its norms, which settles every factor; a second adds one unpacked
    update after the other, so memory stays near one model (``entrywise``: two) however many clients there are.

    Raises ValueError without a client, or for weights, probabilities, sizes or factors that cannot be.
    """
    contributions = list(contributions)
    if not contributions:
        raise ValueError("expected at least one client's update, got none")
    for contribution in contributions:
        if not 0 < contribution.weight < float("inf"):
            raise ValueError(f"expected a client weight above 0, got {contribution.weight}")
    shipped = [contribution.summary() for contribution in contributions]
    factors = unit_factors(contributions, [each.units for each in shipped], combine)
    scales = _clip_scales([each.norm for each in shipped], clip_norm_multiple)
    sums: dict[Unit, np.ndarray] = {}
    covered: dict[Unit, np.ndarray] | None = {} if combine == "entrywise" else None
    for contribution, own, scale in zip(contributions, factors, scales, strict=True):
        _add_update(sums, covered, contribution.unpacked(), own, server_learning_rate * scale)
    for unit, total in (covered or {}).items():
        np.divide(sums[unit], total, out=sums[unit], where=total > 0)
    return {unit: torch.from_numpy(sums[unit]) for unit in sorted(sums)}


def summarize(update: SparseUpdate) -> Shipped:
    """Units and norm of an update."""
    return Shipped(frozenset(update.vectors), update_norm(update))


def update_norm(update: SparseUpdate) -> float:
    """Return the Euclidean norm over all shipped values."""
    return float(sum(np.square(v.values, dtype=np.float64).sum() for v in update.vectors.values()) ** 0.5)


def unit_factors(
    contributions: Sequence[Contribution], shipped: Sequence[Iterable[Unit]], combine: Combine
) -> list[dict[Unit, float]]:
    """What each client's change of each unit it shipped is multiplied by, per client.

    Weights are divided before anything is summed, so that no sum of changes can overflow.

    Raises:
        ValueError: an unknown ``combine``, a probability outside (0, 1], or a unit that was shipped but not trained.
    """
    if combine not in get_args(Combine):
        raise ValueError(f"expected combine {', '.join(get_args(Combine))}, got {combine!r}")
    largest = max(contribution.weight for contribution in contributions)
    weights = [contribution.weight / largest for contribution in contributions]
    if not min(weights) > 0:
        raise ValueError("expected client weights of comparable size, got one that vanishes beside another")
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
    # A function of its own: nothing of one update is alive when the next is unpacked.
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
