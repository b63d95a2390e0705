"""The server's own step as it is sent: aggregated changes with what earlier steps left out, quantized and packed."""

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
    """Pack the next step in parts of whole units; ``residual`` then holds what it left out.

    Args:
        change: ``[size]`` of each unit that clients shipped; no other unit moves. All zero: a step without entries.
        residual: of any units; that of a unit that no client shipped waits.
        density: kept entries / all entries of each unit, the largest of change and residual together; 1: every
            entry that a client shipped, and no other.
        value_bits: 2, 4, 8 or 16.
        graph_version: of the graph that the step is made on.
        graph_hash: likewise.
        part_entries: kept entries from which on a part is closed.

    Raises:
        UserError: the change is not finite or too large to be sent; ``residual`` is left as it was.
    """
    _check_finite(change)
    moving = {unit: vector for unit, vector in change.items() if vector.any()}
    parts = []
    for group in _groups(moving, residual, density, part_entries):
        waiting = {unit: residual.pop(unit) for unit in group if unit in residual}
        asides = _set_aside(group, waiting) if density == 1 else {}
        if not any((vector + waiting.get(unit, 0)).any() for unit, vector in group.items()):
            residual.update(asides)  # what was left out before and what came take each other back
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
    """Entries that a unit will take, at most."""
    if density == 1:
        return int(torch.count_nonzero(vector))
    touched = int(torch.count_nonzero(vector)) + (int(torch.count_nonzero(left)) if left is not None else 0)
    return min(touched, math.ceil(density * vector.numel()))


def _set_aside(group: Mapping[Unit, Tensor], waiting: MutableMapping[Unit, Tensor]) -> dict[Unit, Tensor]:
    """Take out of ``waiting`` the entries that no client shipped, which would make every step dense after a while."""
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
