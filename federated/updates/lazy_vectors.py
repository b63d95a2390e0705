"""Mapping of units to vectors computed on access, so that the changes of a whole model are never in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from models.graph.unit_vectors import Unit


class LazyVectors(Mapping[Unit, Tensor]):
    """A read-only mapping from units to vectors ``[size]``.

    Args:
        units: keys, in iteration order.
        compute: vector of a unit; called on every access, so it must be deterministic.
    """

    def __init__(self, units: Iterable[Unit], compute: Callable[[Unit], Tensor]) -> None:
        self._units = dict.fromkeys(units)
        self._compute = compute

    def __getitem__(self, unit: Unit) -> Tensor:
        if unit not in self._units:
            raise KeyError(unit)
        return self._compute(unit)

    def __contains__(self, unit: object) -> bool:
        return unit in self._units

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)
