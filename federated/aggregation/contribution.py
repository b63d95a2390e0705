"""A client's accepted update with its weight, and the summary of an update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from federated.updates.update import SparseUpdate
from models.graph.unit_vectors import Unit


class UnitSummary(NamedTuple):
    """Norm and sizes of one unit of an update.

    Attributes:
        norm: Euclidean norm of the values.
        kept: kept entries.
        size: all entries.
    """

    norm: float
    kept: int
    size: int


class UpdateSummary(dict[Unit, UnitSummary]):
    """Norm and sizes of each unit of an update: all that the weights and factors of a round depend on."""

    @property
    def norm(self) -> float:
        """Euclidean norm over all values."""
        return float(sum(unit.norm**2 for unit in self.values()) ** 0.5)


def entry_counts(summaries: Iterable[UpdateSummary]) -> tuple[dict[Unit, int], Counter[Unit]]:
    """All entries of each unit, and its kept entries summed over the clients.

    Raises:
        ValueError: two clients have different sizes of a unit.
    """
    sizes: dict[Unit, int] = {}
    counts: Counter[Unit] = Counter()
    for summary in summaries:
        for unit, each in summary.items():
            check_size(unit, each.size, sizes.setdefault(unit, each.size))
            counts[unit] += each.kept
    return sizes, counts


def check_size(unit: Unit, size: int, other: int) -> None:
    """Check that two clients have as many entries of a unit.

    Raises:
        ValueError: names the unit and both numbers.
    """
    if size != other:
        raise ValueError(f"unit {unit} has {size} entries from one client, {other} from another")


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
        """Summary of the update."""
        return summarize(self.unpack()) if self.summary is None else self.summary


def summarize(update: SparseUpdate) -> UpdateSummary:
    """Norm and sizes of each unit of an update."""
    return UpdateSummary(
        (unit, UnitSummary(_norm(vector.values), vector.values.size, vector.size))
        for unit, vector in update.vectors.items()
    )


def _norm(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum() ** 0.5)
