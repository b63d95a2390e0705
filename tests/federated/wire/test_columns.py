from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.updates.update import RefusedUpdate
from federated.wire import columns
from federated.wire.columns import pack_column, unpack_column, zstd_pack, zstd_unpack

DTYPES = {2: np.uint8, 4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.data())
def test_columns_round_trip_in_the_same_bytes(width, data):
    values = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=70))
    column = np.array(values, dtype=DTYPES[width])
    packed = pack_column(column, width=width)
    assert packed == pack_column(column.copy(), width=width)
    assert len(packed) <= 1 + -(-len(values) * width // 8)
    result = unpack_column(packed, dtype=DTYPES[width], count=len(values), width=width)
    assert result.dtype == column.dtype and result.tolist() == values


@pytest.mark.parametrize("width", [4, 32])
def test_both_codings_are_used_and_read(width):
    few = pack_column(np.array([3], dtype=DTYPES[width]), width=width)
    many = pack_column(np.ones(5000, dtype=DTYPES[width]), width=width)
    assert few[0] != many[0] and len(many) < 100
    assert unpack_column(few, dtype=DTYPES[width], count=1, width=width).tolist() == [3]
    assert unpack_column(many, dtype=DTYPES[width], count=5000, width=width).tolist() == [1] * 5000


@pytest.mark.parametrize("size", [99, 100, 101, 1000, 1001])
def test_long_columns_are_coded_in_parts(monkeypatch, size):
    monkeypatch.setattr(columns, "_PART", 100)
    column = np.random.default_rng(0).geometric(0.1, size).astype(np.uint32)
    packed = pack_column(column, width=32)
    assert packed == pack_column(column, width=32) and packed[0] == 1
    assert unpack_column(packed, dtype=np.uint32, count=size, width=32).tolist() == column.tolist()
    narrow = unpack_column(packed, dtype=np.uint32, count=size, width=32, widen=False)
    assert narrow.dtype == np.uint8 and narrow.tolist() == column.tolist()
    for wrong in (packed[:4], packed[:-1]):
        with pytest.raises(RefusedUpdate):
            unpack_column(wrong, dtype=np.uint32, count=size, width=32)


def test_codes_of_few_bits_are_at_their_entropy():
    codes = (np.random.default_rng(0).binomial(14, 0.5, 200_000) + 1).astype(np.uint8)
    share = np.bincount(codes) / codes.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    packed = pack_column(codes, width=4)
    assert packed[0] == 3 and 8 * len(packed) / codes.size < 1.015 * entropy
    assert np.array_equal(unpack_column(packed, dtype=np.uint8, count=codes.size, width=4), codes)


@pytest.mark.parametrize("count", [0, 1, 4999, 5001, 10**6])
def test_another_count_than_stated_is_refused(count):
    for values in (
        np.ones(5000, np.uint32),
        np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32),
    ):
        with pytest.raises(RefusedUpdate):
            unpack_column(pack_column(values, width=32), dtype=np.uint32, count=count, width=32)


def test_wrong_types_unknown_codings_and_wide_values_are_refused():
    packed = pack_column(np.full(5000, 70_000, np.uint32), width=32)
    for data, dtype, width in ((packed, np.uint16, 16), (b"\x09abc", np.uint8, 8), (b"", np.uint8, 8)):
        with pytest.raises(RefusedUpdate):
            unpack_column(data, dtype=dtype, count=5000, width=width)
    wide = pack_column(np.full(5000, 9, np.uint8), width=8)
    with pytest.raises(RefusedUpdate, match="below 4"):
        unpack_column(wide, dtype=np.uint8, count=5000, width=2)


@pytest.mark.parametrize("content", [b"", b"x", b"abc" * 1000])
def test_zstandard_round_trip(content):
    assert zstd_unpack(zstd_pack(content), size=len(content)) == content


def test_zstandard_bombs_and_broken_frames_are_refused():
    bomb = zstd_pack(bytes(10**8))
    for data, size in ((bomb, 10), (b"", 0), (b"not a frame", 11), (zstd_pack(b"abc")[:-1], 3)):
        with pytest.raises(RefusedUpdate):
            zstd_unpack(data, size=size)
