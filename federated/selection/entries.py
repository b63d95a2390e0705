"""Sparsification of the selected units: top-k entries by score, of each unit or of all units together.

An entry's value costs the same bits in every unit, so that top-k over all units together maximizes the score per byte.
The score is the magnitude of the change or its ``gradient_score``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from federated.updates.topk import top_entries
from federated.updates.update import SparseUpdate, SparseVector, join_indices, join_values, split_columns
from models.graph.unit_vectors import Unit
from models.runtime.memory import return_freed_memory

Vectors = dict[Unit, SparseVector]
Score = Callable[[Unit, Tensor], Tensor]

# Scores are counted by sign-less exponent and the upper 7 bits of the mantissa: bins 0.8 % wide.
_BIN_SHIFT, _BINS = 16, 2**15
# A packed update this near to its budget is not filled further.
_FILLED = 0.995
_MOST_TRIALS = 12
# Entries after whose scores freed memory is returned, which takes as long as the scores of a small unit.
_FREED_ENTRIES = 1 << 20


class _Scored(NamedTuple):
    """Entries of one unit and their scores, float32 ``[n]``."""

    entries: SparseVector
    scores: np.ndarray


def magnitude(unit: Unit, vector: Tensor) -> Tensor:
    """Score ``|change|``, ``[size]``."""
    return vector.abs()


def gradient_score(gradient_rms: Mapping[Unit, Tensor]) -> Score:
    """Score ``|change| * sqrt(gradient RMS)``: geometric mean of magnitude and first-order Taylor saliency.

    ``|change| * gradient RMS`` estimates the first-order change of the loss (Molchanov et al., 2017, arXiv:1611.06440).
    Adam's changes are of nearly one magnitude, so that magnitude alone carries little information; the entries of
    largest gradient are also those that raise the loss of other clients most. The square root was measured to be
    better than either.

    Args:
        gradient_rms: root mean square of each entry's gradient ``[size]``; 1 for units without.
    """

    def score(unit: Unit, vector: Tensor) -> Tensor:
        return vector.abs() * gradient_rms[unit].sqrt() if unit in gradient_rms else vector.abs()

    return score


def sparsify(vector: Tensor, density: float, scores: Tensor | None = None) -> SparseVector:
    """Keep the top ``ceil(density * size)`` entries of ``vector`` [size] by score.

    Among equal scores the lowest index is kept. Entries of score zero are never kept: a zero changes nothing.

    Args:
        vector: floats ``[size]``.
        density: kept entries / all entries.
        scores: nonnegative ``[size]``; None: magnitudes.
    """
    values = vector.detach().to(torch.float32).reshape(-1).cpu()
    ranked = values.abs() if scores is None else scores.detach().to(torch.float32).reshape(-1).cpu()
    count = min(entry_count(values.numel(), density), int(torch.count_nonzero(ranked)))
    return SparseVector.from_dense(values.numpy(), top_entries(ranked, count).numpy())


def entry_count(size: int, density: float) -> int:
    """Number of entries, ``ceil(density * size)``.

    Raises:
        ValueError: a density outside ``[0, 1]``.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"expected a density from 0 to 1, got {density}")
    # The small term keeps 0.07 * 100 = 7.000000000000001 from counting as 8.
    return math.ceil(density * size - 1e-9)


def shares(
    vectors: Mapping[Unit, Tensor], units: Iterable[Unit], density: float, score: Score = magnitude
) -> Vectors:
    """``sparsify`` each unit; units without kept entries are left out."""

    def best(unit: Unit) -> _Scored:
        vector = vectors[unit]
        return _Scored(sparsify(vector, density, score(unit, vector)), np.zeros(0, np.float32))

    return _entries(_gather(units, best))


def largest_share(
    vectors: Mapping[Unit, Tensor], units: Iterable[Unit], density: float, score: Score = magnitude
) -> Vectors:
    """Keep the top ``ceil(density * size)`` entries by score of all ``units`` together; never one of score zero.

    Two passes, one unit at a time: a histogram of the scores in narrow bins, then the entries of the bins down to the
    one in which the count is reached. Among equal scores the lowest unit and index are kept. Units without kept entries
    are left out.
    """
    units = sorted(units)
    counts, size = _score_counts(vectors, units, score)
    count = min(entry_count(size, density), int(counts.sum()))
    return _entries(_collect(vectors, units, counts, count, score))


def largest_within(
    vectors: Mapping[Unit, Tensor],
    units: Iterable[Unit],
    *,
    max_bytes: int,
    packed_bytes: Callable[[Vectors], int],
    score: Score = magnitude,
) -> Vectors:
    """Keep the top entries by score of all ``units`` together, as many as pack into ``max_bytes``.

    Args:
        vectors: float ``[size]`` per unit.
        units: units that may be shipped.
        max_bytes: byte budget; never exceeded, and filled to 0.5 % where there are enough entries.
        packed_bytes: packed size of an update of given entries.
        score: score of the entries of a unit ``[size]``.

    Raises:
        UserError: not even one entry fits.
    """
    units = sorted(units)
    counts, _ = _score_counts(vectors, units, score)
    nonzero = int(counts.sum())
    # An entry takes about a byte, less at high density.
    count = most = min(nonzero, max(1, max_bytes))
    candidates = _collect(vectors, units, counts, count, score)
    while count < nonzero and packed_bytes(_entries(candidates)) <= max_bytes:
        count = most = min(2 * count, nonzero)
        candidates = _collect(vectors, units, counts, count, score)
    return _entries(_fill(candidates, most, max_bytes, lambda scored: packed_bytes(_entries(scored))))


def _fill(
    candidates: dict[Unit, _Scored],
    most: int,
    max_bytes: int,
    packed_bytes: Callable[[dict[Unit, _Scored]], int],
) -> dict[Unit, _Scored]:
    """The top entries of ``candidates`` that fit ``max_bytes``: regula falsi on their number."""
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


def _score_counts(
    vectors: Mapping[Unit, Tensor], units: Iterable[Unit], score: Score
) -> tuple[np.ndarray, int]:
    """Histogram of the scores above zero, int64 ``[2**15]``, and the number of all entries."""
    counts, size = np.zeros(_BINS, dtype=np.int64), 0
    for unit in units:
        scores = _scores(score, unit, vectors[unit])
        size += scores.numel()
        counts[0] -= scores.numel() - int(torch.count_nonzero(scores))
        bins = scores.view(torch.int32) >> _BIN_SHIFT
        counts += torch.bincount(bins, minlength=_BINS).numpy()
    return counts, size


def _collect(
    vectors: Mapping[Unit, Tensor], units: Iterable[Unit], counts: np.ndarray, count: int, score: Score
) -> dict[Unit, _Scored]:
    """The top ``count`` entries by score, given the histogram of scores."""
    above = np.cumsum(counts[::-1])[::-1]  # entries in this bin and those above
    edge = int(np.flatnonzero(above >= count)[-1]) if count <= above[0] else 0
    floor = float(np.array(edge << _BIN_SHIFT, dtype=np.int32).view(np.float32))

    def above_floor(unit: Unit) -> _Scored:
        vector = vectors[unit].detach().to(torch.float32).cpu()
        scores = _scores(score, unit, vector).numpy()
        kept = (scores >= floor) & (scores > 0)
        return _Scored(SparseVector.from_dense(vector.numpy(), kept), scores[kept])

    return _prune(_gather(units, above_floor), count)


def _scores(score: Score, unit: Unit, vector: Tensor) -> Tensor:
    return score(unit, vector.detach().to(torch.float32).cpu())


def _gather(units: Iterable[Unit], entries_of: Callable[[Unit], _Scored]) -> dict[Unit, _Scored]:
    """Entries of each unit, without units that have none."""
    found, freed = {}, 0
    for unit in units:
        kept = entries_of(unit)
        if kept.entries.indices.size:
            found[unit] = kept
        freed += kept.entries.size
        del kept
        # Kept entries fragment the freed memory, so that without this each unit would allocate new pages.
        if freed >= _FREED_ENTRIES:
            return_freed_memory()
            freed = 0
    return found


def _prune(scored: dict[Unit, _Scored], count: int) -> dict[Unit, _Scored]:
    """The top ``count`` of these entries by score, without units that have none."""
    if not scored:
        return {}
    entries, units = _entries(scored), sorted(scored)
    update = SparseUpdate(0, "", entries)
    values, (indices, _) = join_values(update), join_indices(update)
    scores = np.concatenate([scored[unit].scores for unit in units])
    kept = top_entries(torch.from_numpy(scores), min(count, scores.size)).numpy()
    sizes = [(unit, entries[unit].size) for unit in units]
    pruned = split_columns(sizes, indices[kept], values[kept])
    parts = np.split(scores[kept], np.cumsum([pruned[unit].indices.size for unit in units])[:-1])
    return {
        unit: _Scored(pruned[unit], part)
        for unit, part in zip(units, parts, strict=True)
        if pruned[unit].indices.size
    }


def _entries(scored: Mapping[Unit, _Scored]) -> Vectors:
    return {unit: each.entries for unit, each in scored.items()}
