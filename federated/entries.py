"""Which entries of the chosen units are shipped: a share of each unit, or the largest of all units together.

All of them cost the same bits but for their index, so the largest entries of all units together are those that bring
the most energy per byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from federated.top_entries import top_entries
from federated.update import SparseUpdate, SparseVector, Unit, join_indices, join_values, split_columns
from models.memory import return_freed_memory

Vectors = dict[Unit, SparseVector]

# Magnitudes are counted by sign-less exponent and the upper 7 bits of the mantissa: bins 0.8 % wide.
_BIN_SHIFT, _BINS = 16, 2**15
# A packed update this near to its budget is not filled further.
_FILLED = 0.995
_MOST_TRIALS = 12


def sparsify(vector: Tensor, density: float) -> SparseVector:
    """Keep the ``ceil(density * size)`` entries of largest magnitude of ``vector`` [size].

    Among equal magnitudes the lowest index wins. Zeros are never kept: shipping them changes nothing.
    """
    values = vector.detach().to(torch.float32).reshape(-1).cpu()
    count = min(entry_count(values.numel(), density), int(torch.count_nonzero(values)))
    return SparseVector.from_dense(values.numpy(), top_entries(values.abs(), count).numpy())


def entry_count(size: int, density: float) -> int:
    """Entries that ``density`` keeps of ``size``, rounded up.

    Raises:
        ValueError: a density outside ``[0, 1]``.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"expected a density from 0 to 1, got {density}")
    # The small term keeps 0.07 * 100 = 7.000000000000001 from counting as 8.
    return math.ceil(density * size - 1e-9)


def shares(vectors: Mapping[Unit, Tensor], units: Iterable[Unit], density: float) -> Vectors:
    """``sparsify`` each unit; one of which nothing is kept is left out."""
    return _gather(units, lambda unit: sparsify(vectors[unit], density))


def largest_share(vectors: Mapping[Unit, Tensor], units: Iterable[Unit], density: float) -> Vectors:
    """Keep the ``ceil(density * size)`` entries of largest magnitude of all ``units`` together; never a zero.

    Two passes, one unit at a time: magnitudes are counted in narrow bins, then those above the bin in which the
    count is reached are collected. Among equal magnitudes the lowest unit and index win. A unit of which nothing is
    kept is left out.
    """
    units = sorted(units)
    counts, size = _magnitude_counts(vectors, units)
    return _collect(vectors, units, counts, min(entry_count(size, density), int(counts.sum())))


def largest_within(
    vectors: Mapping[Unit, Tensor],
    units: Iterable[Unit],
    *,
    max_bytes: int,
    packed_bytes: Callable[[Vectors], int],
) -> Vectors:
    """Keep as many of the largest entries of all ``units`` together as pack into ``max_bytes``.

    Args:
        vectors: float ``[size]`` per unit.
        units: that may be shipped.
        max_bytes: never exceeded, and filled to 0.5 % where there is enough to ship.
        packed_bytes: size of an update of given entries.

    Raises:
        UserError: not even one entry fits.
    """
    units = sorted(units)
    counts, _ = _magnitude_counts(vectors, units)
    nonzero = int(counts.sum())
    count = most = min(
        nonzero, max(1, max_bytes)
    )  # an entry takes a byte, or somewhat less where most are kept
    candidates = _collect(vectors, units, counts, count)
    while count < nonzero and packed_bytes(candidates) <= max_bytes:
        count = most = min(2 * count, nonzero)
        candidates = _collect(vectors, units, counts, count)
    return _fill(candidates, most, max_bytes, packed_bytes)


def _fill(candidates: Vectors, most: int, max_bytes: int, packed_bytes: Callable[[Vectors], int]) -> Vectors:
    """The most of the largest ``candidates`` that fit, by regula falsi on their number."""
    high, high_bytes = most, packed_bytes(candidates)
    if high_bytes <= max_bytes:
        return candidates
    low = min(1, most)
    best = _prune(candidates, low)
    low_bytes = packed_bytes(best)
    if low_bytes > max_bytes:
        raise UserError(
            f"expected upload-budget-mb of at least {low_bytes / 1e6:.6f} for one entry, got {max_bytes / 1e6:g}; "
            "raise it"
        )
    for trial in range(_MOST_TRIALS):
        if high - low <= 1 or low_bytes >= _FILLED * max_bytes:
            break
        share = (0.998 * max_bytes - low_bytes) / (high_bytes - low_bytes) if trial % 3 < 2 else 0.5
        count = min(max(low + round(share * (high - low)), low + 1), high - 1)
        tried = _prune(candidates, count)
        size = packed_bytes(tried)
        if size <= max_bytes:
            best, low, low_bytes = tried, count, size
        else:
            candidates, high, high_bytes = tried, count, size
    return best


def _magnitude_counts(vectors: Mapping[Unit, Tensor], units: Iterable[Unit]) -> tuple[np.ndarray, int]:
    """How many entries other than zero lie in each bin of magnitudes, int64 ``[2**15]``, and how many there are."""
    counts, size = np.zeros(_BINS, dtype=np.int64), 0
    for unit in units:
        magnitudes = vectors[unit].detach().to(torch.float32).abs().cpu()
        size += magnitudes.numel()
        counts[0] -= magnitudes.numel() - int(torch.count_nonzero(magnitudes))
        bins = magnitudes.view(torch.int32).bitwise_right_shift_(_BIN_SHIFT)
        counts += torch.bincount(bins, minlength=_BINS).numpy()
    return counts, size


def _collect(
    vectors: Mapping[Unit, Tensor], units: Iterable[Unit], counts: np.ndarray, count: int
) -> Vectors:
    """The ``count`` largest entries, given how many there are in each bin."""
    above = np.cumsum(counts[::-1])[::-1]  # entries in this bin and those above
    edge = int(np.flatnonzero(above >= count)[-1]) if count <= above[0] else 0
    floor = float(np.array(edge << _BIN_SHIFT, dtype=np.int32).view(np.float32))

    def above_floor(unit: Unit) -> SparseVector:
        values = vectors[unit].detach().to(torch.float32).cpu().numpy()
        magnitudes = np.abs(values)
        return SparseVector.from_dense(values, (magnitudes >= floor) & (magnitudes > 0))

    return _prune(_gather(units, above_floor), count)


def _gather(units: Iterable[Unit], entries_of: Callable[[Unit], SparseVector]) -> Vectors:
    """The entries of each unit that has any."""
    found = {}
    for unit in units:
        kept = entries_of(unit)
        if kept.indices.size:
            found[unit] = kept
        del kept
        # What is kept lies between what was freed, so that units would take up new memory one after the other.
        return_freed_memory()
    return found


def _prune(vectors: Vectors, count: int) -> Vectors:
    """The ``count`` largest entries of these, without units that have none."""
    update = SparseUpdate(0, "", vectors)
    values, (indices, _) = join_values(update), join_indices(update)
    kept = top_entries(torch.from_numpy(np.abs(values)), min(count, values.size)).numpy()
    sizes = [(unit, vectors[unit].size) for unit in sorted(vectors)]
    pruned = split_columns(sizes, indices[kept], values[kept])
    return {unit: vector for unit, vector in pruned.items() if vector.indices.size}
