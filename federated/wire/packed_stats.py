"""Sizes of a packed update: transmitted bytes and the entropy floor of its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from federated.updates.update import RefusedUpdate
from federated.wire.container import Header
from federated.wire.quantize import QuantizedColumn
from federated.wire.unit_table import UnitRow


@dataclass(frozen=True)
class PackedStats:
    """Bytes of one packed update.

    ``raw_bytes``: every entry of the shipped units in bf16. ``entropy_floor_bytes``: the index column at
    ``n * H(density)`` bits plus the value codes and scales at their order-0 entropy (fp16 values: as packed).
    """

    raw_bytes: int
    packed_bytes: int
    entropy_floor_bytes: int
    index_floor_bytes: int
    density: float
    index_bytes: int
    value_bytes: int


def stats_of_columns(
    header: Header,
    columns: Mapping[str, bytes],
    units: Sequence[UnitRow],
    values: QuantizedColumn,
    *,
    packed_bytes: int,
) -> PackedStats:
    """Sizes of a packed update, from its opened columns.

    Args:
        header: header of the container.
        columns: packed columns by name.
        units: rows of the ``units`` column.
        values: decoded codes and scales.
        packed_bytes: bytes of the whole update.

    Raises:
        RefusedUpdate: the header states more kept entries than the index covers.
    """
    total, indexed = sum(unit.size for unit in units), indexed_entries(header, units)
    index_floor = indexed * _entropy(np.array([header.count, indexed - header.count])) / 8
    value_bytes = len(columns["codes"]) + len(columns["scales"])
    value_floor = value_bytes if values.bits == 16 else _order_0_bytes(values)
    return PackedStats(
        raw_bytes=2 * total,
        packed_bytes=packed_bytes,
        entropy_floor_bytes=int(np.ceil(index_floor + value_floor)),
        index_floor_bytes=int(np.ceil(index_floor)),
        density=header.count / total if total else 0.0,
        index_bytes=len(columns["index"]),
        value_bytes=value_bytes,
    )


def indexed_entries(header: Header, units: Sequence[UnitRow]) -> int:
    """Number of entries that the index column covers: all but those of matrices sent as factors.

    Raises:
        RefusedUpdate: the header states more kept entries.
    """
    indexed = sum(unit.size - unit.rows * unit.columns for unit in units)
    if header.count > indexed:
        raise RefusedUpdate(f"{header.count} entries kept of {indexed}")
    return indexed


def _order_0_bytes(values: QuantizedColumn) -> float:
    """Bytes of codes and scales at their order-0 entropy."""
    return sum(part.size * _entropy(np.bincount(part)) for part in (values.codes, values.scales)) / 8


def _entropy(counts: np.ndarray) -> float:
    """Entropy in bits of one draw with these counts; 0.0 without any."""
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
