"""Sparse updates: the kept entries of the change of each unit, and the error for updates that are refused.

A unit is ``(layer, expert)``, or ``(layer, -1)`` for everything else that trains in a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from models.graph.unit_vectors import Unit


def unit_name(unit: Unit) -> str:
    """A unit as ``"layer.expert"``."""
    return f"{unit[0]}.{unit[1]}"


def parse_unit(name: str) -> Unit:
    """Parse ``"layer.expert"``; ValueError for another text."""
    layer, expert = name.split(".")
    return int(layer), int(expert)


class RefusedUpdate(ValueError):
    """Bytes or values that must not be applied to the model; ``reason`` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class SparseVector:
    """Kept entries of one flat vector.

    ``size``: length of the dense vector. ``indices``: int64 [n], strictly increasing, each in
    ``[0, size)``. ``values``: float32 [n]. Anything else raises ValueError.
    """

    size: int
    indices: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        indices = np.ascontiguousarray(self.indices, dtype=np.int64)
        values = np.ascontiguousarray(self.values, dtype=np.float32)
        if indices.ndim != 1 or indices.shape != values.shape:
            raise ValueError(f"expected as many values as indices, got {values.shape} and {indices.shape}")
        outside = indices.size and (indices[0] < 0 or indices[-1] >= self.size)
        if outside or np.any(indices[1:] <= indices[:-1]):
            raise ValueError(f"expected strictly increasing indices in [0, {self.size})")
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "values", values)

    @classmethod
    def from_dense(cls, vector: np.ndarray, keep: np.ndarray) -> SparseVector:
        """Keep entries of ``vector`` [size]; ``keep``: a bool mask [size] or increasing indices [n]."""
        vector, keep = np.asarray(vector), np.asarray(keep)
        indices = np.flatnonzero(keep) if keep.dtype == bool else keep
        return cls(vector.size, indices, vector[indices])

    def to_dense(self) -> np.ndarray:
        """The float32 vector [size], zero outside the kept entries."""
        dense = np.zeros(self.size, dtype=np.float32)
        dense[self.indices] = self.values
        return dense

    @property
    def sent_indices(self) -> np.ndarray:
        """Positions that are transmitted, int64 [n]."""
        return self.indices

    @property
    def sent_values(self) -> np.ndarray:
        """Values that are transmitted, float32."""
        return self.values

    @property
    def factor_shape(self) -> tuple[int, int, int]:
        """Rows, columns and rank of the part sent as low-rank factors; zeros without one."""
        return 0, 0, 0

    def with_sent_values(self, values: np.ndarray) -> SparseVector:
        """This vector with other ``sent_values``."""
        return SparseVector(self.size, self.indices, values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseVector):
            return NotImplemented
        return (
            self.size == other.size
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.values, other.values)
        )


@dataclass(frozen=True)
class SparseUpdate:
    """Sparse vector of each shipped unit, and version and digest of the graph that it was computed on."""

    graph_version: int
    graph_hash: str
    vectors: dict[Unit, SparseVector]


def density(update: SparseUpdate) -> float:
    """Transmitted positions / all entries of the shipped units; 0.0 for an empty update."""
    total = sum(vector.size for vector in update.vectors.values())
    return sum(vector.sent_indices.size for vector in update.vectors.values()) / total if total else 0.0


def join_values(update: SparseUpdate) -> np.ndarray:
    """Transmitted values of all units, in unit order, as one float32 column [count]."""
    columns = [update.vectors[unit].sent_values for unit in sorted(update.vectors)]
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.float32)


def join_indices(update: SparseUpdate) -> tuple[np.ndarray, int]:
    """Transmitted positions (int64 [count]) in the concatenation of all units, and its length."""
    vectors = [update.vectors[unit] for unit in sorted(update.vectors)]
    columns = [vector.sent_indices for vector in vectors]
    joined = np.empty(sum(column.size for column in columns), dtype=np.int64)
    start = first = 0
    for vector, column in zip(vectors, columns, strict=True):
        last = first + column.size
        np.add(column, start, out=joined[first:last])
        start, first = start + vector.size, last
    return joined, start


def split_columns(
    sizes: Iterable[tuple[Unit, int]], indices: np.ndarray, values: np.ndarray
) -> dict[Unit, SparseVector]:
    """Split the columns of ``join_indices`` and ``join_values`` into units of the given sizes, in unit order."""
    sizes = list(sizes)
    starts = np.cumsum([0, *(size for _, size in sizes)])
    places = np.searchsorted(indices, starts)
    spans = zip(sizes, starts.tolist(), places.tolist(), places[1:].tolist(), strict=False)
    return {
        unit: SparseVector(size, indices[first:last] - start, values[first:last])
        for (unit, size), start, first, last in spans
    }


def replace_values(update: SparseUpdate, values: np.ndarray) -> SparseUpdate:
    """The update with other transmitted ``values``, a float32 column [count] in unit order."""
    units = sorted(update.vectors)
    ends = np.cumsum([update.vectors[unit].sent_values.size for unit in units])
    parts = zip(units, np.split(values, ends[:-1]), strict=True) if units else ()
    vectors = {unit: update.vectors[unit].with_sent_values(part) for unit, part in parts}
    return SparseUpdate(update.graph_version, update.graph_hash, vectors)
