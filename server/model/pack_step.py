"""Packing of the server's step: aggregated changes with error feedback, quantized and entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from configs.errors import UserError
from federated.protocol.steps import join_parts
from federated.selection.error_feedback import prepare_update
from federated.updates.update import SparseUpdate, Unit
from federated.wire.codec import pack_update
from federated.wire.quantize import MAX_MAGNITUDE

# Packing takes some 40 bytes of memory an entry; a part costs about 350 bytes on the wire.
PART_ENTRIES = 1 << 18


def pack_step(
    change: Mapping[Unit, Tensor],
    residual: MutableMapping[Unit, Tensor],
    *,
    density: float,
    value_bits: int,
    graph_version: int,
    graph_hash: str,
    part_entries: int = PART_ENTRIES,
) -> bytes:
    """Pack a change plus residual in parts of whole units; the residual is updated in place.

    Args:
        change: ``[size]`` of each unit that clients shipped; all zero: a step without entries.
        residual: error feedback of any units; that of a unit without a change is kept for later.
        density: kept entries / all entries of each unit, the largest of change plus residual; 1: exactly the entries
            that a client shipped.
        value_bits: bits per value: 2, 4, 8 or 16.
        graph_version: version of the graph before the step.
        graph_hash: hash of that graph.
        part_entries: kept entries at which a part is closed.

    Raises:
        UserError: the change is not finite or too large for the wire; ``residual`` is unchanged.
    """
    _check_finite(change)
    moving = {unit: vector for unit, vector in change.items() if vector.any()}
    parts = []
    for group in _groups(moving, residual, density, part_entries):
        waiting = {unit: residual.pop(unit) for unit in group if unit in residual}
        asides = _set_aside(group, waiting) if density == 1 else {}
        if not any((vector + waiting.get(unit, 0)).any() for unit, vector in group.items()):
            residual.update(asides)  # residual and change cancel
            continue
        prepared = prepare_update(
            group,
            waiting,
            density=density,
            value_bits=value_bits,
            graph_version=graph_version,
            graph_hash=graph_hash,
        )
        parts.append(pack_update(prepared.update, value_bits=value_bits))
        residual.update(prepared.residual)
        for unit, aside in asides.items():
            residual[unit] = residual[unit] + aside if unit in residual else aside
    return join_parts(
        parts or [pack_update(SparseUpdate(graph_version, graph_hash, {}), value_bits=value_bits)]
    )


def _groups(
    moving: Mapping[Unit, Tensor], residual: Mapping[Unit, Tensor], density: float, part_entries: int
) -> Iterator[dict[Unit, Tensor]]:
    group: dict[Unit, Tensor] = {}
    entries = 0
    for unit in sorted(moving):
        group[unit] = moving[unit]
        entries += _kept(moving[unit], residual.get(unit), density)
        if entries >= part_entries:
            yield group
            group, entries = {}, 0
    if group:
        yield group


def _kept(vector: Tensor, left: Tensor | None, density: float) -> int:
    """Upper bound on the entries that a unit keeps."""
    if density == 1:
        return int(torch.count_nonzero(vector))
    touched = int(torch.count_nonzero(vector)) + (int(torch.count_nonzero(left)) if left is not None else 0)
    return min(touched, math.ceil(density * vector.numel()))


def _set_aside(group: Mapping[Unit, Tensor], waiting: MutableMapping[Unit, Tensor]) -> dict[Unit, Tensor]:
    """Move entries that no client shipped out of ``waiting``; sending them would make every step dense in time."""
    asides = {}
    for unit, left in waiting.items():
        aside = left.masked_fill(group[unit] != 0, 0)
        if aside.any():
            asides[unit] = aside
            waiting[unit] = left - aside
    return asides


def _check_finite(change: Mapping[Unit, Tensor]) -> None:
    for unit, vector in change.items():
        if vector.numel() and not vector.abs().max() <= MAX_MAGNITUDE:
            raise UserError(
                f"expected a finite step of unit {unit}, got NaN, infinity or more than the wire holds; "
                "lower server-learning-rate"
            )
