"""Codec of sparse updates: entropy-coded run lengths and quantized values in a safetensors container.

The columns are ``units`` (shipped units, their sizes and factor shapes), ``index`` (positions of the kept entries),
``codes`` and ``scales`` (quantized values of factors and entries, unit after unit).
Sizes are checked before memory is allocated; any defect raises RefusedUpdate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Literal

import numpy as np

from federated.updates.update import (
    RefusedUpdate,
    SparseUpdate,
    SparseVector,
    join_indices,
    join_values,
    split_columns,
)
from federated.wire.columns import pack_column, unpack_column, zstd_pack, zstd_unpack
from federated.wire.container import Header, read_container, write_container
from federated.wire.factors import FactoredVector
from federated.wire.packed_stats import PackedStats, indexed_entries, stats_of_columns
from federated.wire.quantize import MAX_MAGNITUDE, QuantizedColumn, dequantize, quantize, scale_count
from federated.wire.rle import decode_runs, encode_runs, run_dtype
from federated.wire.unit_table import UnitRow, pack_units, read_units
from models.graph.unit_vectors import Unit

# Above this density a compressed bitmask may be smaller than the run lengths.
BITMASK_DENSITY = 0.25


def pack_update(update: SparseUpdate, *, value_bits: int) -> bytes:
    """Pack an update with values of ``value_bits`` bits (2, 4, 8 or 16); equal updates give equal bytes.

    Raises RefusedUpdate for a NaN, an infinity or a magnitude above 2**40.
    """
    for vector in update.vectors.values():
        _check_product(vector)
    indices, total = join_indices(update)
    # Coding the index takes longest, in native code that releases the GIL while the values are quantized.
    with ThreadPoolExecutor(1) as pool:
        packed_index = pool.submit(_pack_index, indices, total)
        values = quantize(join_values(update), value_bits)
        columns = {
            "units": pack_units(update),
            "codes": pack_column(values.codes, width=value_bits),
            "scales": pack_column(values.scales, width=8 * values.scales.itemsize),
        }
        kind, columns["index"] = packed_index.result()
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
    """Decode an update and check it against the receiver's units and graph.

    ``sizes``: entries of every unit that may be shipped. ``graph_version`` and ``graph_hash``: graph that the update
    must have been computed on; None accepts any. Raises RefusedUpdate for any defect; memory is bounded by ``sizes``.
    """
    header, columns, units = _open(data, sizes, graph_version, graph_hash)
    return _decode(header, columns, units, _unpack_values(columns, header, units))


def unpack_with_stats(
    data: bytes, *, sizes: Mapping[Unit, int], graph_version: int, graph_hash: str
) -> tuple[SparseUpdate, PackedStats]:
    """Update in ``data`` and its packed sizes from a single decode; arguments as for ``unpack_update``."""
    header, columns, units = _open(data, sizes, graph_version, graph_hash)
    values = _unpack_values(columns, header, units)
    stats = stats_of_columns(header, columns, units, values, packed_bytes=len(data))
    return _decode(header, columns, units, values), stats


def packed_stats(data: bytes) -> PackedStats:
    """Packed sizes of an update and their entropy floor; RefusedUpdate for bad bytes.

    Allocates as many values as the header states: call it only on updates that ``unpack_update`` has accepted.
    """
    header, columns = read_container(data)
    units = read_units(columns["units"], header.units)
    indexed_entries(header, units)
    values = _unpack_values(columns, header, units)
    return stats_of_columns(header, columns, units, values, packed_bytes=len(data))


def _open(
    data: bytes, sizes: Mapping[Unit, int], graph_version: int | None, graph_hash: str | None
) -> tuple[Header, dict[str, bytes], list[UnitRow]]:
    """Header, packed columns and units of an update, checked against the receiver's units and graph."""
    header, columns = read_container(data)
    if graph_version is not None and header.graph_version != graph_version:
        raise RefusedUpdate(f"graph version {header.graph_version}, expected {graph_version}")
    if graph_hash is not None and header.graph_hash != graph_hash:
        raise RefusedUpdate(f"graph hash {header.graph_hash[:16]!r}, expected {graph_hash[:16]!r}")
    units = _unpack_units(columns["units"], header.units, sizes)
    total = sum(unit.size for unit in units)
    if header.count > total:
        raise RefusedUpdate(f"{header.count} entries kept of {total}")
    return header, columns, units


def _decode(
    header: Header, columns: Mapping[str, bytes], units: Sequence[UnitRow], values: QuantizedColumn
) -> SparseUpdate:
    indices = _unpack_index(columns["index"], header, sum(unit.size for unit in units))
    vectors = _vectors(units, indices, dequantize(values))
    return SparseUpdate(header.graph_version, header.graph_hash, vectors)


def _unpack_units(column: bytes, count: int, sizes: Mapping[Unit, int]) -> list[UnitRow]:
    if count > len(sizes):
        raise RefusedUpdate(f"{count} units shipped, only {len(sizes)} known")
    units = read_units(column, count)
    for layer, expert, size, *_ in units:
        if (layer, expert) not in sizes:
            raise RefusedUpdate(f"unknown unit {(layer, expert)}")
        if sizes[(layer, expert)] != size:
            known = sizes[(layer, expert)]
            raise RefusedUpdate(f"unit {(layer, expert)} has {size} entries, expected {known}")
    if any(first[:2] >= second[:2] for first, second in pairwise(units)):
        raise RefusedUpdate("units are repeated or out of order")
    return units


def _vectors(units: Sequence[UnitRow], indices: np.ndarray, values: np.ndarray) -> dict[Unit, SparseVector]:
    """Split the columns: of each unit first the values of its factors, then those of its entries."""
    if not any(unit.rank for unit in units):
        return split_columns([(unit[:2], unit.size) for unit in units], indices, values)
    ends = np.searchsorted(indices, np.cumsum([unit.size for unit in units]))
    counts = np.diff(ends, prepend=0).tolist()
    spans = [(unit.factor_values, count) for unit, count in zip(units, counts, strict=True)]
    cuts = np.cumsum([length for span in spans for length in span])
    parts = np.split(values, cuts[:-1]) if units else []
    kept = np.concatenate([np.zeros(0, dtype=np.float32), *parts[1::2]])
    vectors = split_columns([(unit[:2], unit.size) for unit in units], indices, kept)
    for unit, factors in zip(units, parts[::2], strict=True):
        if unit.rank:
            vectors[unit[:2]] = _factored(unit, factors, vectors[unit[:2]])
    return vectors


def _factored(unit: UnitRow, values: np.ndarray, rest: SparseVector) -> FactoredVector:
    left, right = np.split(values, [unit.rank * unit.rows])
    try:
        vector = FactoredVector(left.reshape(unit.rank, -1), right.reshape(unit.rank, -1), rest)
    except ValueError as error:
        raise RefusedUpdate(f"unit {unit[:2]}: {error}") from error
    _check_product(vector)
    return vector


def _check_product(vector: SparseVector) -> None:
    if isinstance(vector, FactoredVector) and not vector.bound <= MAX_MAGNITUDE:
        raise RefusedUpdate("expected factors of a product of at most 2**40")


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
            unpack_column(column, dtype=dtype, count=header.count, width=8 * dtype.itemsize, widen=False),
            total,
        )
    packed = np.frombuffer(zstd_unpack(column, size=-(-total // 8)), dtype=np.uint8)
    indices = np.flatnonzero(np.unpackbits(packed))
    if indices.size != header.count or (indices.size and indices[-1] >= total):
        raise RefusedUpdate(f"expected a bitmask with {header.count} of {total} bits set")
    return indices


def _unpack_values(columns: Mapping[str, bytes], header: Header, units: Sequence[UnitRow]) -> QuantizedColumn:
    bits, count = header.value_bits, header.count + sum(unit.factor_values for unit in units)
    codes = unpack_column(
        columns["codes"],
        dtype=np.dtype(np.uint16 if bits == 16 else np.uint8),
        count=count,
        width=bits,
    )
    dtype = np.dtype(np.uint16 if bits == 8 else np.uint8)
    blocks = scale_count(count, bits)
    scales = unpack_column(columns["scales"], dtype=dtype, count=blocks, width=8 * dtype.itemsize)
    return QuantizedColumn(bits, codes, scales, header.exponent)
