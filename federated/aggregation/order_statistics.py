"""Trimmed mean and median per entry over the clients that shipped it, with memory that does not grow with the clients.

The entries of all updates are written to files by ranges of positions, one update decoded at a time; the entries of one
range are then sorted in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from federated.aggregation.clipping import ENOUGH
from federated.updates.update import SparseUpdate
from models.graph.unit_vectors import Unit

# Entries of a range: of 12 bytes, and some 40 more while they are sorted.
MOST_ENTRIES = 1 << 19
_ENTRY = np.dtype([("position", "<u4"), ("value", "<f4"), ("weight", "<f4")])


class Span(NamedTuple):
    """Entries ``start`` to ``stop`` of a unit, from position ``offset`` of a range."""

    unit: Unit
    start: int
    stop: int
    offset: int

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.offset + self.stop - self.start


class EntryRanges:
    """Entries of sparse updates, sorted into ranges of positions on disk; removed at the end of its ``with`` block.

    Args:
        sizes: entries of each unit.
        counts: kept entries of each unit, summed over the clients.
    """

    def __init__(self, sizes: Mapping[Unit, int], counts: Mapping[Unit, int]) -> None:
        self._ranges = _ranges(sizes, counts)
        self._places: dict[Unit, list[tuple[int, Span]]] = {unit: [] for unit in sizes}
        for number, spans in enumerate(self._ranges):
            for span in spans:
                self._places[span.unit].append((number, span))
        self._folder = TemporaryDirectory(prefix="fedgraft-entries-")

    def add(self, update: SparseUpdate, factors: Mapping[Unit, float], weights: Mapping[Unit, float]) -> None:
        """Append an update, its values times ``factors``, and the weight of each unit."""
        parts: dict[int, list[np.ndarray]] = {}
        for unit, vector in update.vectors.items():
            values = np.float32(factors[unit]) * vector.values
            for number, span in self._places[unit]:
                first, last = np.searchsorted(vector.indices, (span.start, span.stop))
                entries = np.empty(last - first, dtype=_ENTRY)
                entries["position"] = vector.indices[first:last] - span.start + span.offset
                entries["value"], entries["weight"] = values[first:last], weights[unit]
                parts.setdefault(number, []).append(entries)
        for number, each in parts.items():
            with self._path(number).open("ab") as file:
                np.concatenate(each).tofile(file)

    def __iter__(self) -> Iterator[tuple[list[Span], np.ndarray]]:
        """Spans and entries of each range."""
        for number, spans in enumerate(self._ranges):
            path = self._path(number)
            yield spans, np.fromfile(path, dtype=_ENTRY) if path.exists() else np.empty(0, dtype=_ENTRY)

    def __enter__(self) -> EntryRanges:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.entries"


def trimmed_means(entries: np.ndarray, size: int, *, trim: float) -> np.ndarray:
    """Weighted mean per position without its largest and smallest values, float32 ``[size]``; zero without entries.

    Of ``n`` values, ``trim * n`` but at least one are left out at each end, or all but the middle one or two
    (coordinate-wise trimmed mean of Yin et al., 2018, arXiv:1803.01498; ``trim`` of a half: their median). Of one
    or two values none is.

    Args:
        entries: records of position, value and weight, in any order.
        size: number of positions.
        trim: share of the values that is left out at each end, 0 to 0.5.
    """
    entries = entries[np.lexsort((entries["value"], entries["position"]))]
    positions = entries["position"]
    starts = np.flatnonzero(np.diff(positions, prepend=-1))
    counts = np.diff(starts, append=len(positions))
    ranks = np.arange(len(positions)) - np.repeat(starts, counts)
    cut = np.floor(trim * counts + 1e-9).astype(np.int64).clip(1, (counts - 1) // 2)
    cut[counts < ENOUGH] = 0
    first, last = np.repeat(cut, counts), np.repeat(counts - 1 - cut, counts)
    kept = entries[(ranks >= first) & (ranks <= last)]
    sums = np.bincount(kept["position"], kept["weight"].astype(np.float64) * kept["value"], minlength=size)
    weights = np.bincount(kept["position"], kept["weight"], minlength=size)
    return np.divide(sums, weights, out=np.zeros(size), where=weights > 0).astype(np.float32)


def _ranges(sizes: Mapping[Unit, int], counts: Mapping[Unit, int]) -> list[list[Span]]:
    """Cut the units into ranges of about ``MOST_ENTRIES`` kept entries each."""
    ranges: list[list[Span]] = [[]]
    room, offset = float(MOST_ENTRIES), 0
    for unit, size in sorted(sizes.items()):
        pieces = max(1, -(-counts[unit] // MOST_ENTRIES))
        for start, stop in pairwise(round(size * piece / pieces) for piece in range(pieces + 1)):
            if ranges[-1] and counts[unit] / pieces > room:
                ranges.append([])
                room, offset = float(MOST_ENTRIES), 0
            ranges[-1].append(Span(unit, start, stop, offset))
            room, offset = room - counts[unit] / pieces, offset + stop - start
    return ranges
