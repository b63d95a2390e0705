from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.selection.entries import sparsify
from federated.updates.update import RefusedUpdate, SparseUpdate, SparseVector
from federated.wire.codec import pack_update, packed_stats, unpack_update, unpack_with_stats
from federated.wire.columns import zstd_pack
from federated.wire.container import Header, read_container, write_container
from federated.wire.quantize import VALUE_BITS, quantize_update

HASH = "f" * 16


def make_update(sizes, density, *, seed=0, scale=1e-3):
    rng = np.random.default_rng(seed)
    vectors = {}
    for unit, size in sizes.items():
        dense = (rng.standard_normal(size) * scale).astype(np.float32)
        vectors[unit] = SparseVector.from_dense(dense, rng.random(size) < density)
    return SparseUpdate(3, HASH, vectors)


def repacked(data, *, columns=(), **header_changes):
    """The packed update with some columns or header fields replaced, under a valid checksum."""
    header, parts = read_container(data)
    return write_container(Header(**{**header.model_dump(), **header_changes}), {**parts, **dict(columns)})


SIZES = {(0, -1): 5, (0, 0): 300, (0, 3): 300, (1, 2): 301}
UPDATE = quantize_update(make_update(SIZES, 0.1), 4)
DATA = pack_update(UPDATE, value_bits=4)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.tuples(st.integers(0, 40), st.integers(-1, 40)), st.integers(0, 200), max_size=6),
    st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from(VALUE_BITS),
    st.integers(0, 100),
)
def test_any_update_round_trips_in_the_same_bytes(sizes, density, bits, seed):
    update = quantize_update(make_update(sizes, density, seed=seed), bits)
    data = pack_update(update, value_bits=bits)
    assert unpack_update(data, sizes=sizes, graph_version=3, graph_hash=HASH) == update
    assert unpack_update(data, sizes={**sizes, (99, 99): 4}) == update
    shuffled = SparseUpdate(3, HASH, dict(reversed(update.vectors.items())))
    assert pack_update(shuffled, value_bits=bits) == data


@pytest.mark.parametrize("bits", VALUE_BITS)
@pytest.mark.parametrize(
    "vectors", [{}, {(0, 0): SparseVector(9, [], [])}, {(2, 1): SparseVector(1, [0], [0.5])}]
)
def test_no_unit_no_entry_and_one_entry(vectors, bits):
    sizes = {(0, 0): 9, (2, 1): 1}
    data = pack_update(SparseUpdate(0, "", vectors), value_bits=bits)
    result = unpack_update(data, sizes=sizes)
    assert result == quantize_update(SparseUpdate(0, "", vectors), bits)
    assert len(data) <= 600


@pytest.mark.parametrize("density", [0.001, 0.4])
def test_one_giant_unit(density):
    sizes = {(0, 0): 1_000_003}
    update = quantize_update(make_update(sizes, density), 8)
    assert unpack_update(pack_update(update, value_bits=8), sizes=sizes) == update


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_changes_of_any_float_type_are_packed_alike(dtype):
    change = torch.randn(301, generator=torch.Generator().manual_seed(0)).to(dtype)
    for bits in VALUE_BITS:
        packed, same = (
            pack_update(SparseUpdate(0, "", {(1, 2): sparsify(vector, 0.3)}), value_bits=bits)
            for vector in (change, change.float())
        )
        assert packed == same and packed_stats(packed).density == pytest.approx(0.3, abs=0.01)
    halves = unpack_update(packed, sizes=SIZES).vectors[(1, 2)]
    torch.testing.assert_close(
        torch.from_numpy(halves.values), change.float()[halves.indices], rtol=2**-10, atol=0
    )


def test_what_is_unpacked_is_what_quantizing_said():
    raw = make_update(SIZES, 0.2, seed=5)
    for bits in VALUE_BITS:
        assert unpack_update(pack_update(raw, value_bits=bits), sizes=SIZES) == quantize_update(raw, bits)


def test_dense_random_masks_fall_back_to_the_smaller_index():
    for density in (0.3, 0.5, 0.9, 1.0):
        stats = packed_stats(pack_update(make_update({(0, 0): 200_000}, density), value_bits=4))
        assert stats.index_bytes <= 1.02 * stats.index_floor_bytes + 64
    # Alternating entries: run lengths are constant, so they must win over the bitmask at density 0.5.
    every_second = SparseUpdate(
        0, "", {(0, 0): SparseVector(200_000, np.arange(0, 200_000, 2), np.ones(100_000))}
    )
    assert packed_stats(pack_update(every_second, value_bits=4)).index_bytes < 200


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**41])
def test_values_that_are_not_finite_are_not_packed(bad):
    with pytest.raises(RefusedUpdate, match="finite"):
        pack_update(SparseUpdate(0, "", {(0, 0): SparseVector(2, [0], [bad])}), value_bits=4)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"graph_version": 4}, "graph version 3, expected 4"),
        ({"graph_hash": "0" * 16}, "graph hash"),
        ({"sizes": {unit: SIZES[unit] for unit in [(0, -1), (0, 0), (1, 2)]}}, "only 3 known"),
        ({"sizes": {**{unit: SIZES[unit] for unit in [(0, -1), (0, 0), (1, 2)]}, (9, 9): 1}}, "unknown unit"),
        ({"sizes": {**SIZES, (0, 3): 299}}, "has 300 entries, expected 299"),
        ({"sizes": {}}, "known"),
    ],
)
def test_updates_for_another_graph_are_refused(arguments, reason):
    with pytest.raises(RefusedUpdate, match=reason):
        unpack_update(DATA, **{"sizes": SIZES, **arguments})


def test_lies_in_the_header_are_refused():
    total, count = sum(SIZES.values()), packed_stats(DATA).density * sum(SIZES.values())
    lies = [{"count": total + 1}, {"count": int(count) + 1}, {"count": 0}, {"units": 3}, {"units": 2**20}]
    lies += [{"value_bits": 8}, {"value_bits": 16}, {"index": "bitmask"}, {"exponent": 5000}]
    for lie in lies:
        with pytest.raises(RefusedUpdate):
            unpack_update(repacked(DATA, **lie), sizes=SIZES)


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([(0, 0, 300), (0, 0, 300)], "repeated or out of order"),
        ([(0, 3, 300), (0, 0, 300)], "repeated or out of order"),
        ([(0, 0, -1), (0, 3, 300)], "size out of range"),
        ([(0, 0, 300, 30, 11, 1), (0, 3, 300)], "size out of range"),
        ([(0, 0, 300, 30, 10, 11), (0, 3, 300)], "size out of range"),
        ([(0, 0, 300, -30, -10, 1), (0, 3, 300)], "size out of range"),
        ([(0, 0, 300, 30, 10, 0), (0, 3, 300)], "size out of range"),
        ([(0, 0, 300, 2**62, 2**62, 2**62), (0, 3, 300)], "size out of range"),
    ],
)
def test_unit_tables_that_no_packer_writes_are_refused(rows, reason):
    rows = [(*row, 0, 0, 0)[:6] for row in rows]
    table = np.array(rows, dtype="<i8").T.copy().tobytes()
    with pytest.raises(RefusedUpdate, match=reason):
        unpack_update(repacked(DATA, columns={"units": zstd_pack(table)}, units=2), sizes=SIZES)


def test_a_stated_count_allocates_nothing_before_it_is_checked():
    bombs = [
        repacked(DATA, count=2**40),
        repacked(DATA, index="bitmask", columns={"index": zstd_pack(bytes(2 * 10**8))}),
        repacked(DATA, units=2**20, columns={"units": zstd_pack(bytes(48 * 2**20))}),
    ]
    tracemalloc.start()
    for bomb in bombs:
        with pytest.raises(RefusedUpdate):
            unpack_update(bomb, sizes=SIZES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def refused_or_equal(data, expected):
    try:
        return unpack_update(data, sizes=SIZES, graph_version=3, graph_hash=HASH) == expected
    except RefusedUpdate as refusal:
        return bool(refusal.reason)


def test_every_truncation_is_refused():
    for length in range(len(DATA)):
        with pytest.raises(RefusedUpdate):
            unpack_update(DATA[:length], sizes=SIZES)


def test_flipped_bytes_are_refused_or_change_nothing():
    rng = np.random.default_rng(0)
    for _ in range(600):
        mutated = bytearray(DATA)
        for position in rng.integers(0, len(DATA), rng.integers(1, 4)):
            mutated[position] ^= int(rng.integers(1, 256))
        assert refused_or_equal(bytes(mutated), UPDATE)


@pytest.mark.parametrize(
    "name, bits", list(itertools.product(["codes", "index", "scales", "units"], [2, 4, 16]))
)
def test_flipped_columns_under_a_valid_checksum_are_refused_or_well_formed(name, bits):
    sizes = {(layer, expert): 2000 for layer in range(3) for expert in range(4)}
    data = pack_update(make_update(sizes, 0.2), value_bits=bits)
    column, rng = read_container(data)[1][name], np.random.default_rng(1)
    for _ in range(80):
        mutated = bytearray(column)
        for position in rng.integers(0, len(column), rng.integers(1, 3)) if column else ():
            mutated[position] ^= int(rng.integers(1, 256))
        if rng.random() < 0.3:
            mutated = mutated[: rng.integers(0, len(column) + 1)] + rng.bytes(rng.integers(0, 9))
        try:
            update = unpack_update(repacked(data, columns={name: bytes(mutated)}), sizes=sizes)
        except RefusedUpdate:
            continue
        assert all(sizes[unit] == vector.size for unit, vector in update.vectors.items())
        assert all(np.isfinite(vector.values).all() for vector in update.vectors.values())


def test_stats_count_the_bytes_and_the_floor():
    sizes = {(layer, expert): 40_001 for layer in range(2) for expert in range(4)}
    update = make_update(sizes, 0.03)
    data = pack_update(update, value_bits=4)
    stats = packed_stats(data)
    total, kept = 8 * 40_001, sum(vector.indices.size for vector in update.vectors.values())
    share = kept / total
    floor = -(kept * np.log2(share) + (total - kept) * np.log2(1 - share)) / 8
    assert stats.raw_bytes == 2 * total and stats.packed_bytes == len(data) and stats.density == share
    assert stats.index_floor_bytes == pytest.approx(floor, abs=1)
    assert stats.index_floor_bytes < stats.index_bytes <= 1.02 * stats.index_floor_bytes
    assert stats.index_floor_bytes < stats.entropy_floor_bytes < stats.packed_bytes
    assert (
        stats.index_bytes + stats.value_bytes
        < stats.packed_bytes
        <= stats.index_bytes + stats.value_bytes + 700
    )
    # Normal values at a scale per 64: a little over three bits each, so below the nominal four.
    assert 3 < 8 * stats.value_bytes / kept < 4


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_single_decode_gives_the_update_and_the_stats_that_separate_decodes_give(bits):
    update = make_update(SIZES, 0.3)
    data = pack_update(update, value_bits=bits)
    both = unpack_with_stats(data, sizes=SIZES, graph_version=3, graph_hash=update.graph_hash)
    assert both == (unpack_update(data, sizes=SIZES), packed_stats(data))
    for version, graph_hash in ((4, update.graph_hash), (3, "another")):
        with pytest.raises(RefusedUpdate, match="graph"):
            unpack_with_stats(data, sizes=SIZES, graph_version=version, graph_hash=graph_hash)


def test_stats_of_nothing_and_of_bad_bytes():
    stats = packed_stats(pack_update(SparseUpdate(0, "", {}), value_bits=16))
    assert (stats.raw_bytes, stats.density, stats.index_floor_bytes) == (0, 0.0, 0)
    with pytest.raises(RefusedUpdate):
        packed_stats(DATA[:-1])
    with pytest.raises(RefusedUpdate):
        packed_stats(repacked(DATA, count=10**6))
