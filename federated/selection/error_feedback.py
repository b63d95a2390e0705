"""Error feedback: selection of the shipped part of a change; the rest is the residual of later rounds.

With experts drawn at random (``sample``) and weighted by 1/pi at the server (``unbiased``), a unit that was not drawn
keeps only what it would not have shipped either: applied change and residual together equal, in expectation and to the
quantization error, the change. The expectation is over draws at a fixed ``density`` of each expert; a cut over all
units together depends on the draw. Without that weighting such a unit keeps its whole change, which is exact in every
draw where a shipped change counts once (``hajek`` where one client ships the unit, ``mean``).

With ``LazyVectors`` for changes and residual, at most one dense unit is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from configs.run_views import DensityScope, Selection
from federated.selection.entries import (
    Score,
    Vectors,
    largest_share,
    largest_within,
    magnitude,
    shares,
    sparsify,
)
from federated.selection.unit_selection import select_sample, select_top
from federated.updates.lazy_vectors import LazyVectors
from federated.updates.update import SparseUpdate, SparseVector
from federated.wire.codec import pack_update
from federated.wire.factors import better_of
from federated.wire.quantize import quantize_update
from models.graph.unit_vectors import Unit


@dataclass(frozen=True)
class Limits:
    """Size limits of an update.

    Attributes:
        per_layer: experts per layer; 0: all that trained.
        density: kept entries / all entries of the selected units.
        scope: units that share the density: each by itself (``expert``), or all together (``all``).
        max_bytes: bytes of the packed update, in place of ``density`` and ``scope``; 0: no limit.
    """

    per_layer: int = 0
    density: float = 1.0
    scope: DensityScope = "expert"
    max_bytes: int = 0


class PreparedUpdate(NamedTuple):
    """A selected update: ``update`` with the dequantized values that the server will see, ``residual`` float32 [size]
    per unit, and ``inclusion``, the inclusion probability of each shipped unit."""

    update: SparseUpdate
    residual: Mapping[Unit, Tensor]
    inclusion: dict[Unit, float]


def choose_update(
    deltas: Mapping[Unit, Tensor],
    residual: Mapping[Unit, Tensor],
    limits: Limits,
    *,
    score: Score = magnitude,
    shapes: Mapping[Unit, tuple[int, int]] | None = None,
    selection: Selection = "top",
    unbiased: bool = False,
    value_bits: int,
    residual_decay: float = 1.0,
    graph_version: int,
    graph_hash: str,
    generator: torch.Generator | None = None,
    in_memory: bool = False,
) -> PreparedUpdate:
    """Select, sparsify and quantize the sum of ``deltas`` and the decayed residual.

    Args:
        deltas: change, float ``[size]`` per trained unit.
        residual: residual of earlier rounds, float ``[size]`` per unit; units that did not train keep it, decayed.
        limits: size limits.
        score: ranking of entries.
        shapes: matrix shape of units that may be sent as low-rank factors if these hold more energy in as many bytes;
            None: no unit. Not with ``max_bytes`` or ``unbiased``.
        selection, unbiased: rule for experts (``sample`` needs a ``generator``); whether the server weights by 1/pi.
        value_bits, residual_decay: bits per value (2, 4, 8 or 16) and factor on the residual.
        graph_version, graph_hash, generator: version and digest of the trained graph; generator of the draw.
        in_memory: keep the sum of each unit, which is computed three times otherwise.

    Raises:
        UserError: no change and no residual to ship, values that are not finite, ``max_bytes`` below one entry.
    """
    totals = _totals(deltas, residual, residual_decay, in_memory)
    inclusion = _select(totals, selection, limits.per_layer, generator)
    empty = SparseUpdate(graph_version, graph_hash, {})
    entries = _entries(totals, inclusion, limits, empty, value_bits, score)
    vectors = _with_factors(totals, entries, shapes or {}, value_bits)
    update = quantize_update(replace(empty, vectors=vectors), value_bits)
    threshold = _threshold(totals, vectors, score) if unbiased else 0.0

    def left(unit: Unit) -> Tensor:
        if unit not in totals:
            return residual[unit].float() * residual_decay
        if unbiased and unit not in inclusion:
            return _below_cut(totals[unit], score(unit, totals[unit]), limits, threshold)
        return _subtract(totals[unit], update.vectors.get(unit))

    rest = LazyVectors([*totals, *residual], left)
    return PreparedUpdate(update, rest, {unit: inclusion[unit] for unit in vectors})


def prepare_update(
    deltas: Mapping[Unit, Tensor],
    residual: Mapping[Unit, Tensor],
    *,
    per_layer: int = 0,
    density: float,
    **options: Any,
) -> PreparedUpdate:
    """``choose_update`` with the nonzero residuals in memory."""
    prepared = choose_update(deltas, residual, Limits(per_layer, density), **options)
    kept = {unit: left for unit, left in prepared.residual.items() if left.any()}
    return prepared._replace(residual=kept)


def _totals(
    deltas: Mapping[Unit, Tensor], residual: Mapping[Unit, Tensor], decay: float, in_memory: bool
) -> Mapping[Unit, Tensor]:
    """Sum of change and decayed residual of each trained unit, float32 ``[size]``; ``in_memory``: computed once."""

    def total(unit: Unit) -> Tensor:
        delta = deltas[unit].detach().float().cpu()
        if not torch.isfinite(delta).all():
            raise UserError(
                f"expected finite changes, got NaN or infinity in unit {unit}; lower learning-rate"
            )
        return delta + residual[unit].float() * decay if unit in residual else delta

    totals = LazyVectors(deltas, total)
    return dict(totals) if in_memory else totals


def _select(
    vectors: Mapping[Unit, Tensor], selection: str, per_layer: int, generator: torch.Generator | None
) -> dict[Unit, float]:
    if selection == "top":
        return dict.fromkeys(select_top(vectors, per_layer), 1.0)
    if selection != "sample" or generator is None:
        raise ValueError(f"expected selection top, or sample with a generator, got {selection!r}")
    return select_sample(vectors, per_layer, generator=generator)


def _entries(
    totals: Mapping[Unit, Tensor],
    units: Iterable[Unit],
    limits: Limits,
    empty: SparseUpdate,
    value_bits: int,
    score: Score,
) -> Vectors:
    """Entries to ship within the limits, without units that have none.

    Raises:
        UserError: none at all.
    """
    if limits.max_bytes:

        def packed_bytes(vectors: Vectors) -> int:
            return len(pack_update(replace(empty, vectors=vectors), value_bits=value_bits))

        vectors = largest_within(
            totals, units, max_bytes=limits.max_bytes, packed_bytes=packed_bytes, score=score
        )
    elif limits.scope == "all":
        vectors = largest_share(totals, units, limits.density, score)
    else:
        vectors = shares(totals, units, limits.density, score)
    if not vectors:
        raise UserError(
            "expected a change to ship, got an all-zero update; check local-steps and learning-rate"
        )
    return vectors


def _with_factors(
    totals: Mapping[Unit, Tensor], vectors: Vectors, shapes: Mapping[Unit, tuple[int, int]], value_bits: int
) -> Vectors:
    """Replace entries by low-rank factors where a unit has a shape and factors hold more energy."""
    return {
        unit: (
            better_of(totals[unit], vector, *shapes[unit], value_bits=value_bits)
            if unit in shapes
            else vector
        )
        for unit, vector in vectors.items()
    }


def _threshold(totals: Mapping[Unit, Tensor], vectors: Vectors, score: Score) -> float:
    """Lowest score among the shipped entries."""
    return min(
        float(score(unit, totals[unit])[torch.from_numpy(vector.indices)].min())
        for unit, vector in vectors.items()
    )


def _below_cut(total: Tensor, scores: Tensor, limits: Limits, threshold: float) -> Tensor:
    """Residual of an unsampled unit as if sampled: entries below the threshold."""
    if limits.max_bytes or limits.scope == "all":
        return torch.where(scores < threshold, total, 0.0)
    return _subtract(total, sparsify(total, limits.density, scores))


def _subtract(vector: Tensor, shipped: SparseVector | None) -> Tensor:
    if shipped is None:
        return vector
    left = vector.clone()
    left[torch.from_numpy(shipped.indices)] -= torch.from_numpy(shipped.values)
    return left
