"""What a client ships, with error feedback: what is not shipped now is shipped later.

Nothing here holds more than one dense unit at a time where changes and residual come as ``LazyVectors``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
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
    """How much of what changed is shipped.

    Attributes:
        per_layer: experts of each layer; 0 for all that trained.
        density: kept entries / all entries of the units chosen.
        scope: ``expert``, that share of every unit, or ``all``, the largest of all units together.
        max_bytes: of the packed update, in the place of ``density`` and ``scope``; 0 for no limit.
    """

    per_layer: int = 0
    density: float = 1.0
    scope: Literal["expert", "all"] = "expert"
    max_bytes: int = 0


class PreparedUpdate(NamedTuple):
    """``update``: what is shipped, with the values the server will see. ``residual``: float32 [size] per
    unit, what was not shipped. ``inclusion``: probability with which each shipped unit was drawn."""

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
    selection: Literal["top", "sample"] = "top",
    unbiased: bool = False,
    value_bits: int,
    residual_decay: float = 1.0,
    graph_version: int,
    graph_hash: str,
    generator: torch.Generator | None = None,
) -> PreparedUpdate:
    """Choose what to ship of ``deltas`` with error feedback.

    The decayed residual is added first; what is not shipped (other units, entries below the density cut,
    the quantization error) is the new residual, computed from ``deltas`` and ``residual`` when it is asked for.
    Units with a residual that were not trained keep it, decayed.

    Args:
        deltas: float ``[size]`` per trained unit.
        residual: likewise, of any units.
        limits: how much is shipped.
        score: of each entry; those of highest score are shipped.
        shapes: rows and columns of the matrix at the start of units that may go as low-rank factors in the place of
            these entries, where factors keep more energy in as many bytes; None for no unit. Not with ``max_bytes``,
            nor with ``unbiased``.
        selection: ``top``, or ``sample`` with a ``generator``.
        unbiased: of ``sample``: the server counts what is shipped 1/pi times (``horvitz-thompson``). On average that
            makes up for the units that were not drawn, so these keep only what they would not have shipped either:
            what is applied and what is kept are together, in expectation and to the quantization error, what
            changed. The expectation is over draws at a fixed ``density`` of each expert: a cut over all units together
            depends on the draw. Without it a unit that was not drawn keeps all: exact in every draw where what is
            shipped counts once (``hajek`` where one client ships the unit, ``mean``).
        value_bits: 2, 4, 8 or 16.
        residual_decay: share of the residual that counts.
        graph_version: of the graph that trained.
        graph_hash: likewise.
        generator: of the draw.

    Raises:
        UserError: there is nothing to ship (no change, and no residual of what trained), a change is not finite, or
            not even one entry fits into ``limits.max_bytes``.
    """
    totals = _totals(deltas, residual, residual_decay)
    inclusion = _select(totals, selection, limits.per_layer, generator)
    empty = SparseUpdate(graph_version, graph_hash, {})
    vectors = _entries(totals, inclusion, limits, empty, value_bits, score)
    if not vectors:
        raise UserError(
            "expected a change to ship, got an all-zero update; check local-steps and learning-rate"
        )
    for unit, shape in (shapes or {}).items():
        if unit in vectors:
            vectors[unit] = better_of(totals[unit], vectors[unit], *shape, value_bits=value_bits)
    update = quantize_update(replace(empty, vectors=vectors), value_bits)
    lowest = (
        min(_lowest(totals[unit], unit, vector, score) for unit, vector in vectors.items())
        if unbiased
        else 0.0
    )

    def left(unit: Unit) -> Tensor:
        if unit not in totals:
            return residual[unit].float() * residual_decay
        total = totals[unit]
        if unbiased and unit not in inclusion:
            return _below_cut(total, score(unit, total), limits, lowest)
        return _subtract(total, update.vectors.get(unit))

    units = [*totals, *(unit for unit in residual if unit not in totals)]
    return PreparedUpdate(update, LazyVectors(units, left), {unit: inclusion[unit] for unit in vectors})


def prepare_update(
    deltas: Mapping[Unit, Tensor],
    residual: Mapping[Unit, Tensor],
    *,
    per_layer: int = 0,
    density: float,
    **options: Any,
) -> PreparedUpdate:
    """``choose_update`` with the residual in memory, without the units of which nothing is left."""
    prepared = choose_update(deltas, residual, Limits(per_layer, density), **options)
    kept = {unit: left for unit, left in prepared.residual.items() if left.any()}
    return prepared._replace(residual=kept)


def _totals(
    deltas: Mapping[Unit, Tensor], residual: Mapping[Unit, Tensor], decay: float
) -> Mapping[Unit, Tensor]:
    """Each trained unit's change with its decayed residual, float32 ``[size]``."""

    def total(unit: Unit) -> Tensor:
        delta = deltas[unit].detach().float().cpu()
        if not torch.isfinite(delta).all():
            raise UserError(
                f"expected finite changes, got NaN or infinity in unit {unit}; lower learning-rate"
            )
        return delta + residual[unit].float() * decay if unit in residual else delta

    return LazyVectors(deltas, total)


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
    """The entries to ship; a unit of which there are none is left out."""
    if limits.max_bytes:

        def packed_bytes(vectors: Vectors) -> int:
            return len(pack_update(replace(empty, vectors=vectors), value_bits=value_bits))

        return largest_within(
            totals, units, max_bytes=limits.max_bytes, packed_bytes=packed_bytes, score=score
        )
    if limits.scope == "all":
        return largest_share(totals, units, limits.density, score)
    return shares(totals, units, limits.density, score)


def _lowest(total: Tensor, unit: Unit, shipped: SparseVector, score: Score) -> float:
    """The lowest score among the entries that a unit ships."""
    return float(score(unit, total)[torch.from_numpy(shipped.indices)].min())


def _below_cut(total: Tensor, scores: Tensor, limits: Limits, lowest: float) -> Tensor:
    """What a unit that was not drawn would have kept, had it been: all but its entries above the cut."""
    if limits.max_bytes or limits.scope == "all":
        return torch.where(scores < lowest, total, 0.0)
    return _subtract(total, sparsify(total, limits.density, scores))


def _subtract(vector: Tensor, shipped: SparseVector | None) -> Tensor:
    if shipped is None:
        return vector
    left = vector.clone()
    left[torch.from_numpy(shipped.indices)] -= torch.from_numpy(shipped.values)
    return left
