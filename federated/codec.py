"""Sparse updates <-> bytes: run lengths and quantised values, entropy-coded, in a safetensors container.

The columns are ``units`` (the shipped units and their sizes), ``index`` (which entries were kept),
``codes`` and ``scales`` (their values).
Everything is checked before memory is allocated for it: a defect raises RefusedUpdate, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from federated.columns import pack_column, unpack_column, zstd_pack, zstd_unpack
from federated.container import MAX_UNIT_SIZE, Header, read_container, write_container
from federated.quantise import QuantisedColumn, dequantise, quantise, scale_count
from federated.rle import decode_runs, encode_runs, run_dtype
from federated.update import RefusedUpdate, SparseUpdate, Unit, join_indices, join_values, split_columns

# Above this density a compressed bitmask may be smaller than the run lengths.
BITMASK_DENSITY = 0.25


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


def pack_update(update: SparseUpdate, *, value_bits: int) -> bytes:
    """Pack an update with values of ``value_bits`` bits (2, 4, 8 or 16); equal updates give equal bytes.

    Raises RefusedUpdate for a NaN, an infinity or a magnitude above 2**40.
    """
    values = quantise(join_values(update), value_bits)
    indices, total = join_indices(update)
    kind, index = _pack_index(indices, total)
    columns = {
        "units": zstd_pack(_unit_table(update).tobytes()),
        "index": index,
        "codes": pack_column(values.codes, width=value_bits),
        "scales": pack_column(values.scales, width=8 * values.scales.itemsize),
    }
    header = Header(
        graph_version=update.graph_version,
        graph_hash=update.graph_hash,
        units=len(update.vectors),
        count=indices.size,
        index=kind,
        value_bits=value_bits,  # type: ignore[arg-type]
        exponent=values.exponent,
    )
    return write_container(header, columns)


def unpack_update(
    data: bytes,
    *,
    sizes: Mapping[Unit, int],
    graph_version: int | None = None,
    graph_hash: str | None = None,
) -> SparseUpdate:
    """Return the update in ``data``, checked against what the receiver knows.

    ``sizes``: entries of every unit that may be shipped. ``graph_version`` and ``graph_hash``: what the
    update must have been computed on; None accepts any. Raises RefusedUpdate with the reason for any
    defect; memory stays within the shapes in ``sizes``.
    """
    header, columns = read_container(data)
    if graph_version is not None and header.graph_version != graph_version:
        raise RefusedUpdate(f"graph version {header.graph_version}, expected {graph_version}")
    if graph_hash is not None and header.graph_hash != graph_hash:
        raise RefusedUpdate(f"graph hash {header.graph_hash[:16]!r}, expected {graph_hash[:16]!r}")
    units = _unpack_units(columns["units"], header.units, sizes)
    total = sum(size for _, size in units)
    if header.count > total:
        raise RefusedUpdate(f"{header.count} entries kept of {total}")
    indices = _unpack_index(columns["index"], header, total)
    values = dequantise(_unpack_values(columns, header))
    return SparseUpdate(header.graph_version, header.graph_hash, split_columns(units, indices, values))


def packed_stats(data: bytes) -> PackedStats:
    """Return the bytes of a packed update beside their entropy floor; RefusedUpdate for bad bytes.

    Takes the memory of as many values as the header states: call it on what ``unpack_update`` has accepted.
    """
    header, columns = read_container(data)
    total = int(_read_unit_table(columns["units"], header.units)[2].sum())
    if header.count > total:
        raise RefusedUpdate(f"{header.count} entries kept of {total}")
    share = header.count / total if total else 0.0
    index_floor = total * _entropy(np.array([header.count, total - header.count])) / 8
    return PackedStats(
        raw_bytes=2 * total,
        packed_bytes=len(data),
        entropy_floor_bytes=int(np.ceil(index_floor + _value_floor(columns, header))),
        index_floor_bytes=int(np.ceil(index_floor)),
        density=share,
        index_bytes=len(columns["index"]),
        value_bytes=len(columns["codes"]) + len(columns["scales"]),
    )


def _unit_table(update: SparseUpdate) -> np.ndarray:
    """Return layers, experts and sizes, int64 [3, units]."""
    rows = [(*unit, update.vectors[unit].size) for unit in sorted(update.vectors)]
    return np.array(rows, dtype="<i8").reshape(-1, 3).T.copy()


def _read_unit_table(column: bytes, count: int) -> np.ndarray:
    table = np.frombuffer(zstd_unpack(column, size=24 * count), dtype="<i8").reshape(3, count)
    if count and (table[2].min() < 0 or table[2].max() > MAX_UNIT_SIZE):
        raise RefusedUpdate("unit size out of range")
    return table


def _unpack_units(column: bytes, count: int, sizes: Mapping[Unit, int]) -> list[tuple[Unit, int]]:
    if count > len(sizes):
        raise RefusedUpdate(f"{count} units shipped, only {len(sizes)} known")
    units = [((layer, expert), size) for layer, expert, size in _read_unit_table(column, count).T.tolist()]
    for unit, size in units:
        if unit not in sizes:
            raise RefusedUpdate(f"unknown unit {unit}")
        if sizes[unit] != size:
            raise RefusedUpdate(f"unit {unit} has {size} entries, expected {sizes[unit]}")
    if any(first[0] >= second[0] for first, second in zip(units, units[1:], strict=False)):
        raise RefusedUpdate("units are repeated or out of order")
    return units


def _pack_index(indices: np.ndarray, total: int) -> tuple[Literal["runs", "bitmask"], bytes]:
    runs = pack_column(encode_runs(indices, total), width=8 * run_dtype(total).itemsize)
    if indices.size <= BITMASK_DENSITY * total:
        return "runs", runs
    mask = np.zeros(total, dtype=bool)
    mask[indices] = True
    bitmask = zstd_pack(np.packbits(mask).tobytes())
    return ("bitmask", bitmask) if len(bitmask) < len(runs) else ("runs", runs)


def _unpack_index(column: bytes, header: Header, total: int) -> np.ndarray:
    if header.index == "runs":
        dtype = run_dtype(total)
        return decode_runs(
            unpack_column(column, dtype=dtype, count=header.count, width=8 * dtype.itemsize), total
        )
    packed = np.frombuffer(zstd_unpack(column, size=-(-total // 8)), dtype=np.uint8)
    indices = np.flatnonzero(np.unpackbits(packed))
    if indices.size != header.count or (indices.size and indices[-1] >= total):
        raise RefusedUpdate(f"expected a bitmask with {header.count} of {total} bits set")
    return indices


def _unpack_values(columns: Mapping[str, bytes], header: Header) -> QuantisedColumn:
    bits = header.value_bits
    codes = unpack_column(
        columns["codes"],
        dtype=np.dtype(np.uint16 if bits == 16 else np.uint8),
        count=header.count,
        width=bits,
    )
    dtype = np.dtype(np.uint16 if bits == 8 else np.uint8)
    count = scale_count(header.count, bits)
    scales = unpack_column(columns["scales"], dtype=dtype, count=count, width=8 * dtype.itemsize)
    return QuantisedColumn(bits, codes, scales, header.exponent)


def _value_floor(columns: Mapping[str, bytes], header: Header) -> float:
    """Return bytes: codes and scales at their order-0 entropy; at 16 bits, nearly all distinct, as packed."""
    if header.value_bits == 16:
        return len(columns["codes"]) + len(columns["scales"])
    values = _unpack_values(columns, header)
    return sum(part.size * _entropy(np.bincount(part)) for part in (values.codes, values.scales)) / 8


def _entropy(counts: np.ndarray) -> float:
    """Return the entropy in bits of one draw with these counts (0.0 without any)."""
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
