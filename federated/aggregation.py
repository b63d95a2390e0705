"""The server's step from what the clients shipped: expert by expert, one dense vector for each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from federated.update import SparseUpdate, SparseVector, Unit

Combine = Literal["hajek", "horvitz-thompson", "mean"]


@dataclass(frozen=True)
class Contribution:
    """One client's reply: its ``weight`` (share or number of examples, above 0), its ``update``, the
    probability with which each shipped unit was drawn (1 where absent) and the units it trained (None: all).
    """

    weight: float
    update: SparseUpdate
    inclusion: dict[Unit, float] = field(default_factory=dict)
    trained: set[Unit] | None = None


def aggregate(
    contributions: Iterable[Contribution],
    *,
    combine: Combine = "hajek",
    server_learning_rate: float = 1.0,
    clip_norm_multiple: float = 0.0,
) -> dict[Unit, Tensor]:
    """Return the step (float32 [size]) of every unit that at least one client shipped.

    - ``hajek``: ``sum w/pi * change / sum w/pi`` over the clients that shipped the unit;
    - ``horvitz-thompson``: ``sum w/pi * change`` over the weight of the clients that trained the unit;
    - ``mean``: ``sum w * change`` over the weight of all clients.

    A client's change is first scaled down to ``clip_norm_multiple`` times the median norm of the round
    (0: off). ``contributions`` is walked twice, so an iterable that unpacks each reply anew keeps memory near
    one model. Raises ValueError without a client, or for weights, probabilities or sizes that cannot be.
    """
    if combine not in ("hajek", "horvitz-thompson", "mean"):
        raise ValueError(f"expected combine hajek, horvitz-thompson or mean, got {combine!r}")
    if iter(contributions) is contributions:
        contributions = list(contributions)
    norms = [update_norm(contribution.update) for contribution in contributions]
    if not norms:
        raise ValueError("expected at least one client's update, got none")
    limit = clip_norm_multiple * statistics.median(norms) if clip_norm_multiple else float("inf")
    fold = _Fold(combine)
    for contribution, norm in zip(contributions, norms, strict=True):
        fold.add(contribution, scale=limit / norm if norm > limit else 1.0)
    return fold.finish(server_learning_rate)


def update_norm(update: SparseUpdate) -> float:
    """Return the Euclidean norm over all shipped values."""
    return float(sum(np.square(v.values, dtype=np.float64).sum() for v in update.vectors.values()) ** 0.5)


class _Fold:
    """Running weighted sums: one dense float32 vector for each unit seen so far."""

    def __init__(self, combine: Combine) -> None:
        self._combine = combine
        self._sums: dict[Unit, np.ndarray] = {}
        self._shipped: dict[Unit, float] = {}
        self._trained: list[tuple[float, set[Unit] | None]] = []

    def add(self, contribution: Contribution, *, scale: float) -> None:
        weight = contribution.weight
        if not 0 < weight < float("inf"):
            raise ValueError(f"expected a client weight above 0, got {weight}")
        self._trained.append((weight, contribution.trained))
        for unit, vector in contribution.update.vectors.items():
            if contribution.trained is not None and unit not in contribution.trained:
                raise ValueError(f"unit {unit} was shipped by a client that did not train it")
            factor = weight if self._combine == "mean" else weight / _probability(contribution, unit)
            self._add_scaled(unit, vector, factor * scale)
            self._shipped[unit] = self._shipped.get(unit, 0.0) + factor

    def finish(self, learning_rate: float) -> dict[Unit, Tensor]:
        steps = {}
        for unit in sorted(self._sums):
            total = self._sums.pop(unit)
            total *= np.float32(learning_rate / self._denominator(unit))
            steps[unit] = torch.from_numpy(total)
        return steps

    def _add_scaled(self, unit: Unit, vector: SparseVector, factor: float) -> None:
        total = self._sums.setdefault(unit, np.zeros(vector.size, dtype=np.float32))
        if total.size != vector.size:
            raise ValueError(
                f"unit {unit} has {vector.size} entries from one client, {total.size} from another"
            )
        total[vector.indices] += np.float32(factor) * vector.values

    def _denominator(self, unit: Unit) -> float:
        if self._combine == "hajek":
            return self._shipped[unit]
        everyone = self._combine == "mean"
        return sum(w for w, trained in self._trained if everyone or trained is None or unit in trained)


def _probability(contribution: Contribution, unit: Unit) -> float:
    probability = contribution.inclusion.get(unit, 1.0)
    if not 0 < probability <= 1:
        raise ValueError(f"expected a probability in (0, 1] for unit {unit}, got {probability}")
    return probability
