"""Bytes that no client of ours wrote: each is refused with a reason or is a well-formed update, in bounded memory."""

from __future__ import annotations

import contextlib
import resource
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pcodec import ChunkConfig, DeltaSpec, ModeSpec
from pcodec.standalone import simple_compress

from federated.updates.update import RefusedUpdate, SparseUpdate, SparseVector
from federated.wire import columns
from federated.wire.codec import pack_update, unpack_update
from federated.wire.columns import pack_column, zstd_pack
from federated.wire.container import COLUMNS, Header, read_container, write_container
from federated.wire.factors import FactoredVector
from federated.wire.quantize import MAX_MAGNITUDE, VALUE_BITS

SIZES = {(layer, expert): 150 + 37 * layer for layer in range(3) for expert in range(-1, 2)}
CORPUS = 10_500
INTEGERS = [-(2**63), -1, 0, 1, 7, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 10**30]


def sample(bits, density):
    rng, vectors = np.random.default_rng(bits), {}
    for unit, size in SIZES.items():
        keep = rng.random(size) < density
        vectors[unit] = SparseVector.from_dense(rng.standard_normal(size).astype(np.float32), keep)
    return pack_update(SparseUpdate(3, "ab" * 8, vectors), value_bits=bits)


def factored_sample(bits):
    """Every second unit as factors of rank 2 of a 10 by 12 matrix, and a few entries behind it."""
    rng = np.random.default_rng(bits)
    vectors = dict(unpack_update(sample(bits, 0.2), sizes=SIZES).vectors)
    for unit in list(vectors)[::2]:
        rest = SparseVector(SIZES[unit], np.array([120, 125]), np.array([0.5, 1.0]))
        left, right = rng.standard_normal((2, 10)), rng.standard_normal((2, 12))
        vectors[unit] = FactoredVector(left, right, rest)
    return pack_update(SparseUpdate(3, "ab" * 8, vectors), value_bits=bits)


SAMPLES = [sample(bits, density) for bits in VALUE_BITS for density in (0.02, 0.2, 0.95)]
SAMPLES += [factored_sample(bits) for bits in VALUE_BITS]
READ = [read_container(data) for data in SAMPLES]


def rebuilt(header, parts, **fields):
    """A container under a valid checksum; where the header admits no such field, one that lies about an old one."""
    try:
        return write_container(Header(**{**header.model_dump(), **fields}), parts)
    except ValueError:
        return write_container(header.model_copy(update=fields), parts)


def flipped(data, rng):
    changed = bytearray(data)
    for position in rng.integers(0, max(len(data), 1), rng.integers(1, 5)) if data else ():
        changed[position] ^= int(rng.integers(1, 256))
    return bytes(changed)


def cut_or_grown(data, rng):
    return data[: rng.integers(0, len(data) + 1)] + rng.bytes(rng.integers(0, 12))


def flipped_near_the_start(data, rng):
    """Where lengths, types, tables and bins are stated."""
    return flipped(data[:24], rng) + data[24:]


def random_column(_, rng):
    return bytes([rng.choice([0, 1, 2, 3, 4, 8, 200])]) + rng.bytes(rng.integers(0, 60))


def pcodec_column(_, rng):
    """Valid pcodec of other numbers, types and transforms than ours."""
    dtype = rng.choice([np.uint8, np.uint16, np.uint32, np.uint64])
    values = rng.integers(0, np.iinfo(dtype).max, rng.integers(0, 900), dtype=dtype, endpoint=True)
    delta = [DeltaSpec.no_op(), DeltaSpec.try_consecutive(1), DeltaSpec.try_lookback()][rng.integers(3)]
    config = ChunkConfig(compression_level=2, mode_spec=ModeSpec.auto(), delta_spec=delta, enable_8_bit=True)
    return bytes([np.dtype(dtype).itemsize]) + simple_compress(values, config)


def zstd_column(_, rng):
    frame = zstd_pack(bytes(int(rng.integers(0, 3000))))
    return frame if rng.random() < 0.5 else b"\x03" + frame


COLUMN_MUTATIONS = [
    flipped,
    flipped,
    flipped_near_the_start,
    cut_or_grown,
    random_column,
    pcodec_column,
    zstd_column,
]


def mutant(rng):
    """One hostile input; seven in ten are under a valid checksum."""
    which = int(rng.integers(len(SAMPLES)))
    data, (header, parts) = SAMPLES[which], READ[which]
    draw = rng.random()
    if draw < 0.1:
        return cut_or_grown(data, rng)
    if draw < 0.3:
        return flipped(data, rng)
    if draw < 0.4:
        name = str(rng.choice(["count", "units", "exponent", "graph_version", "value_bits", "index"]))
        value = (
            str(rng.choice(["runs", "bitmask"])) if name == "index" else INTEGERS[rng.integers(len(INTEGERS))]
        )
        return rebuilt(
            header, parts, **{name: int(rng.choice(VALUE_BITS)) if name == "value_bits" else value}
        )
    name = COLUMNS[rng.integers(len(COLUMNS))]
    if draw < 0.5:
        return rebuilt(header, {**parts, name: READ[rng.integers(len(READ))][1][name]})
    mutate = COLUMN_MUTATIONS[rng.integers(len(COLUMN_MUTATIONS))]
    return rebuilt(header, {**parts, name: mutate(parts[name], rng)})


def check(data):
    """Whether ``data`` is refused; what it decodes to otherwise must be within the shapes and the bound."""
    try:
        update = unpack_update(data, sizes=SIZES)
    except RefusedUpdate as refusal:
        assert refusal.reason and "\n" not in refusal.reason
        return True
    for unit, vector in update.vectors.items():
        assert vector.size == SIZES[unit] and np.abs(vector.values).max(initial=0) <= MAX_MAGNITUDE
        assert vector.indices.size == vector.values.size <= vector.size and np.all(
            np.diff(vector.indices) > 0
        )
    return False


def test_every_mutant_of_the_corpus_is_refused_or_well_formed():
    rng, refused = np.random.default_rng(0), Counter()
    for data in SAMPLES:
        assert not check(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(CORPUS):
        refused[check(mutant(rng))] += 1
    # The native decoders' memory shows here only: kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000
    assert refused.total() == CORPUS and refused[True] > 0.6 * CORPUS and refused[False] > 0.01 * CORPUS


def test_memory_stays_within_what_the_shapes_allow():
    rng = np.random.default_rng(1)
    mutants = [mutant(rng) for _ in range(400)]
    tracemalloc.start()
    for data in mutants:
        check(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 64 bytes an entry of all shapes, and what Python takes for reading one input.
    assert peak < 64 * sum(SIZES.values()) + 300_000


def test_columns_of_many_parts_are_fuzzed_as_well(monkeypatch):
    monkeypatch.setattr(columns, "_PART", 100)
    header, parts = read_container(sample(8, 0.9))
    assert not check(write_container(header, parts))
    rng = np.random.default_rng(2)
    for _ in range(300):
        name = ("index", "codes")[rng.integers(2)]
        mutate = (flipped, flipped_near_the_start, cut_or_grown)[rng.integers(3)]
        check(rebuilt(header, {**parts, name: mutate(parts[name], rng)}))


@settings(max_examples=250, deadline=None)
@given(
    st.integers(0, len(SAMPLES) - 1),
    st.sampled_from(COLUMNS),
    st.one_of(
        st.binary(max_size=80),
        st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=6)),
    ),
    st.fixed_dictionaries({}, optional={"count": st.integers(0, 4000), "exponent": st.integers(-200, 200)}),
)
def test_any_column_and_header_under_a_valid_checksum(which, name, change, fields):
    header, parts = READ[which]
    column = parts[name]
    if isinstance(change, tuple):
        position, patch = change
        change = column[:position] + patch + column[position + len(patch) :]
    check(rebuilt(header, {**parts, name: change}, **fields))


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 8, b"\xff" * 4096, (2**63).to_bytes(8, "little") + b"{}", b"{" * 10_000]
)
def test_what_is_no_container_is_refused(data):
    assert check(data)


def huge_runs(dtype, count):
    return pack_column(np.full(count, np.iinfo(dtype).max, dtype=dtype), width=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"index": huge_runs(np.uint32, 36)},
        {"index": huge_runs(np.uint64, 36)},
        {"index": b"\x04" + simple_compress(np.zeros(5_000_000, np.uint32), ChunkConfig())},
        {"codes": b"\x01" + simple_compress(np.ones(5_000_000, np.uint8), ChunkConfig(enable_8_bit=True))},
        {"codes": b"\x03" + zstd_pack(bytes(10**8))},
        {"units": zstd_pack(bytes(10**8))},
        {"units": zstd_pack(np.full((6, 9), 2**40, "<i8").tobytes())},
        {"scales": b"\x00" + b"\xff" * 9},
    ],
)
def test_bombs_overflows_and_unknown_units_are_refused_before_they_cost_memory(changes):
    header, parts = READ[0]
    data = rebuilt(header, {**parts, **changes})
    tracemalloc.start()
    assert check(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(data) + 300_000


@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7E00, 0xFFFF])
def test_halves_that_are_no_numbers_are_refused(half):
    header, parts = next(each for each in READ if each[0].value_bits == 16)
    codes = pack_column(np.full(header.count, half, dtype=np.uint16), width=16)
    assert check(rebuilt(header, {**parts, "codes": codes}))


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_values_above_the_bound_are_refused_and_those_below_are_not(bits):
    header, parts = next(each for each in READ if each[0].value_bits == bits)
    assert check(rebuilt(header, parts, exponent=42))
    high = sum(check(rebuilt(header, parts, exponent=exponent)) for exponent in range(30, 42))
    assert 0 < high < 12 and not check(rebuilt(header, parts, exponent=-100))


def test_a_lookback_window_of_gigabytes_is_not_allocated():
    """pcodec states the window of a transform that we never write in five bits: up to 2**32 numbers."""
    values = np.tile(np.arange(200), 20).astype(np.uint32)
    config = ChunkConfig(
        compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.try_lookback()
    )
    coded = bytearray(simple_compress(values, config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for position in range(8, 20):
        for byte in range(0, 256, 5):
            data = bytes([*coded[:position], byte, *coded[position + 1 :]])
            with contextlib.suppress(RefusedUpdate):
                columns.unpack_column(b"\x04" + data, dtype=np.dtype(np.uint32), count=values.size, width=32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000
