from __future__ import annotations

import numpy as np
import pytest

from federated.updates.update import RefusedUpdate
from federated.wire.container import Header
from federated.wire.packed_stats import indexed_entries, stats_of_columns
from federated.wire.quantize import QuantizedColumn
from federated.wire.unit_table import UnitRow

PLAIN = UnitRow(0, 0, 64, 0, 0, 0)
FACTORED = UnitRow(0, 1, 20, 4, 4, 2)
COLUMNS = {"units": b"", "index": b"i" * 7, "codes": b"c" * 9, "scales": b"s" * 2}


def header(count: int, bits: int = 4) -> Header:
    return Header(
        graph_version=0, graph_hash="", units=1, count=count, index="runs", value_bits=bits, exponent=0
    )


def column(codes, bits: int = 4, scales=()) -> QuantizedColumn:
    return QuantizedColumn(bits, np.array(codes, np.uint8), np.array(scales, np.uint8), 0)


def test_the_floor_is_the_entropy_of_index_and_values():
    # 32 of 64 entries: one bit an entry, 8 bytes; four equally frequent codes: 2 bits each, 8 bytes.
    values = column([1, 2, 3, 4] * 8, scales=[5])
    stats = stats_of_columns(header(32), COLUMNS, [PLAIN], values, packed_bytes=100)
    assert (stats.index_floor_bytes, stats.entropy_floor_bytes) == (8, 16)
    assert (stats.raw_bytes, stats.packed_bytes, stats.density) == (128, 100, 0.5)
    assert (stats.index_bytes, stats.value_bytes) == (7, 11)


def test_values_of_16_bits_count_as_packed():
    stats = stats_of_columns(header(64, 16), COLUMNS, [PLAIN], column([0] * 64, 16), packed_bytes=1)
    assert (stats.index_floor_bytes, stats.entropy_floor_bytes) == (0, 11)


def test_the_index_leaves_out_what_is_sent_as_factors():
    assert indexed_entries(header(0), [PLAIN, FACTORED]) == 64 + 20 - 16
    assert indexed_entries(header(68), [PLAIN, FACTORED]) == 68
    with pytest.raises(RefusedUpdate, match="69 entries kept of 68"):
        indexed_entries(header(69), [PLAIN, FACTORED])


def test_an_empty_update_has_no_size():
    stats = stats_of_columns(header(0), COLUMNS, [], column([]), packed_bytes=1)
    assert (stats.raw_bytes, stats.density, stats.index_floor_bytes, stats.entropy_floor_bytes) == (
        0,
        0.0,
        0,
        0,
    )
