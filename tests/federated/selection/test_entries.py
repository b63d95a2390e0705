from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from federated.selection.entries import entry_count, largest_share, largest_within, shares, sparsify
from federated.updates.update import SparseUpdate
from federated.wire.codec import pack_update


def kept_by_sorting(values, density):
    """Indices of the largest magnitudes by a stable sort, zeros left out."""
    count = math.ceil(round(density * len(values), 6))
    ranked = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:count]
    return sorted(i for i in ranked if values[i] != 0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.sampled_from([0, 0.01, 0.07, 0.1, 0.3, 0.5, 1])
)
def test_the_largest_entries_are_kept_and_ties_go_to_the_lowest_index(values, density):
    vector = sparsify(torch.tensor(values, dtype=torch.float32), density)
    assert vector.indices.tolist() == kept_by_sorting(values, density)
    assert vector.values.tolist() == [values[i] for i in vector.indices]


def test_exact_counts_at_the_edges():
    vector = torch.arange(1, 101, dtype=torch.float32)
    for density, count in ((0.0, 0), (0.07, 7), (0.001, 1), (0.995, 100), (1.0, 100)):
        assert sparsify(vector, density).indices.size == count
    assert sparsify(torch.zeros(9), 1.0).indices.size == 0
    assert sparsify(torch.zeros(0), 0.5).size == 0
    assert sparsify(vector.bfloat16(), 1.0).values.dtype == np.float32
    for density in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="density"):
            sparsify(vector, density)
    assert [entry_count(100, density) for density in (0, 0.07, 0.001, 0.995, 1)] == [0, 7, 1, 100, 100]


units_of_integers = st.lists(st.lists(st.integers(-3, 3), max_size=12), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(units_of_integers, st.sampled_from([0, 0.01, 0.1, 0.3, 0.5, 1]), st.sampled_from([1.0, 1e-30, 1e30]))
def test_the_largest_of_all_units_are_kept_as_if_they_were_one_vector(lists, density, scale):
    vectors = {(0, e): torch.tensor(values, dtype=torch.float32) * scale for e, values in enumerate(lists)}
    found = largest_share(vectors, vectors, density)
    joined = sparsify(torch.cat(list(vectors.values())), density).to_dense()
    parts = np.split(joined, np.cumsum([len(values) for values in lists])[:-1])
    assert set(found) == {(0, e) for e, part in enumerate(parts) if part.any()}
    for (_, e), vector in found.items():
        assert np.array_equal(vector.to_dense(), parts[e])


def test_each_unit_gives_its_share_or_is_left_out():
    vectors = {
        (0, 0): torch.tensor([1.0, 3.0, 2.0, 0.0]),
        (0, 1): torch.zeros(4),
        (1, 0): torch.tensor([-1.0]),
    }
    found = shares(vectors, [(0, 1), (1, 0), (0, 0)], 0.5)
    assert {unit: vector.indices.tolist() for unit, vector in found.items()} == {(1, 0): [0], (0, 0): [1, 2]}
    assert shares(vectors, vectors, 0.0) == {}


def test_only_the_units_named_compete():
    vectors = {(0, 0): torch.tensor([9.0, 8.0]), (0, 1): torch.tensor([1.0, 2.0]), (1, 0): torch.ones(2)}
    found = largest_share(vectors, [(1, 0), (0, 1)], 0.5)
    assert {unit: vector.indices.tolist() for unit, vector in found.items()} == {(0, 1): [0, 1]}
    assert largest_share(vectors, [], 0.5) == {}


def packed_bytes(bits):
    return lambda vectors: len(pack_update(SparseUpdate(0, "0" * 64, vectors), value_bits=bits))


def random_units(seed, count=4, size=20_000):
    generator = torch.Generator().manual_seed(seed)
    return {(0, e): torch.randn(size, generator=generator) * (e + 1) for e in range(count)}


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("max_bytes", [1_000, 8_000, 60_000])
def test_a_byte_budget_is_kept_and_filled_with_the_largest(bits, max_bytes):
    vectors = random_units(bits)
    found = largest_within(vectors, vectors, max_bytes=max_bytes, packed_bytes=packed_bytes(bits))
    size = packed_bytes(bits)(found)
    count = sum(vector.indices.size for vector in found.values())
    everything = count == 80_000
    assert size <= max_bytes and (size >= 0.98 * max_bytes or everything)
    assert everything == (bits <= 4 and max_bytes == 60_000)
    expected = largest_share(vectors, vectors, count / 80_000)
    assert set(found) == set(expected) and all(found[unit] == expected[unit] for unit in found)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(700, 6000), st.sampled_from([2, 4, 16]))
def test_no_budget_is_ever_exceeded(seed, max_bytes, bits):
    vectors = random_units(seed, count=3, size=1500)
    found = largest_within(vectors, vectors, max_bytes=max_bytes, packed_bytes=packed_bytes(bits))
    assert found and packed_bytes(bits)(found) <= max_bytes


def test_a_budget_for_less_than_one_entry_is_the_users_affair():
    with pytest.raises(UserError, match="expected upload-budget-mb of at least 0.000[0-9]+ for one entry"):
        largest_within(random_units(0), random_units(0), max_bytes=50, packed_bytes=packed_bytes(4))


def test_nothing_changed_is_nothing_kept_within_a_budget():
    vectors = {(0, 0): torch.zeros(5)}
    assert largest_within(vectors, vectors, max_bytes=1000, packed_bytes=packed_bytes(4)) == {}
