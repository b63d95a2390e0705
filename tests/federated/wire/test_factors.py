from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.selection.entries import sparsify
from federated.updates.update import RefusedUpdate, SparseUpdate, SparseVector, density
from federated.wire.codec import pack_update, packed_stats, unpack_update
from federated.wire.factors import FactoredVector, better_of, equal_rank, factorize
from federated.wire.quantize import VALUE_BITS, quantize_update

ROWS, COLUMNS, SIZE = 24, 16, 24 * 16 + 9
REST = SparseVector(SIZE, np.array([384, 390]), np.array([0.5, -2.0]))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rank, seed=0):
    matrix = normal(ROWS, rank, seed=seed) @ normal(rank, COLUMNS, seed=seed + 1)
    return torch.cat([matrix.reshape(-1), normal(SIZE - ROWS * COLUMNS, seed=seed + 2)])


def factored(rank, seed=0):
    return factorize(low_rank(rank, seed), ROWS, COLUMNS, rank, REST)


def test_factors_read_as_the_vector_they_stand_for():
    vector = factored(2)
    expected = low_rank(2).clone()
    expected[384:] = 0
    expected[384], expected[390] = 0.5, -2.0
    np.testing.assert_allclose(vector.to_dense(), expected, atol=1e-4)
    assert vector.indices.tolist() == [*range(384), 384, 390] and vector.values.dtype == np.float32
    assert vector.factor_shape == (ROWS, COLUMNS, 2) and vector.sent_indices.tolist() == [384, 390]
    assert vector.sent_values.size == 2 * (ROWS + COLUMNS) + 2
    assert vector == vector.with_sent_values(vector.sent_values) != factored(2, seed=5)
    assert np.abs(vector.values[:384]).max() <= vector.bound


def test_the_product_has_the_same_bits_in_any_layout():
    vector = factored(3)
    by_hand = np.zeros((ROWS, COLUMNS), dtype=np.float32)
    for row in range(ROWS):
        for column in range(COLUMNS):
            total = vector.left[0, row] * vector.right[0, column]
            for rank in (1, 2):
                total = np.float32(total + np.float32(vector.left[rank, row] * vector.right[rank, column]))
            by_hand[row, column] = total
    np.testing.assert_array_equal(vector.values[:384].reshape(ROWS, COLUMNS), by_hand)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_truncation_is_the_best_of_its_rank(rank):
    change = normal(SIZE, seed=4)
    matrix = change[:384].view(ROWS, COLUMNS)
    singular = torch.linalg.svdvals(matrix)
    product = torch.from_numpy(factorize(change, ROWS, COLUMNS, rank, REST).values[:384]).view(ROWS, COLUMNS)
    assert float((matrix - product).square().sum()) == pytest.approx(
        float(singular[rank:].square().sum()), abs=1e-3
    )


def test_large_matrices_are_factorized_by_iteration_without_touching_the_generator():
    matrix = normal(520, 4) @ normal(4, 530, seed=1)
    rest, state = SparseVector(matrix.numel(), [], []), torch.random.get_rng_state()
    product = factorize(matrix.reshape(-1), 520, 530, 4, rest).values
    np.testing.assert_allclose(product.reshape(520, 530), matrix, atol=1e-3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "left, right, rest",
    [
        (np.ones((1, 5)), np.ones((2, 5)), REST),
        (np.ones((0, 5)), np.ones((0, 5)), REST),
        (np.ones(5), np.ones(5), REST),
        (np.ones((1, 200)), np.ones((1, 5)), REST),
        (np.ones((1, 24)), np.ones((1, 16)), SparseVector(SIZE, [383], [1.0])),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(left, right, rest):
    with pytest.raises(ValueError, match="expected"):
        FactoredVector(left, right, rest)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(VALUE_BITS), st.sampled_from([0.0, 0.1, 1.0]))
def test_units_of_both_kinds_round_trip_in_the_same_bytes(ranks, bits, share):
    vectors = {
        (0, unit): factored(rank, seed=unit) if rank else sparsify(low_rank(1, seed=unit), share)
        for unit, rank in enumerate(ranks)
    }
    update = quantize_update(SparseUpdate(3, "ab", vectors), bits)
    data = pack_update(update, value_bits=bits)
    again = unpack_update(data, sizes=dict.fromkeys(vectors, SIZE))
    assert again == update and [type(v) for v in again.vectors.values()] == [
        type(v) for v in vectors.values()
    ]
    assert pack_update(again, value_bits=bits) == data
    stats = packed_stats(data)
    assert stats.density == pytest.approx(density(update)) and stats.raw_bytes == 2 * SIZE * len(ranks)


def test_factors_of_a_product_beyond_the_bound_are_refused():
    huge = FactoredVector(np.full((1, ROWS), 2.0**21), np.full((1, COLUMNS), 2.0**20), REST)
    with pytest.raises(RefusedUpdate, match="product"):
        pack_update(SparseUpdate(0, "", {(0, 0): huge}), value_bits=4)


def test_the_rank_takes_as_many_bits_as_the_entries():
    entropy = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)) * 10_000
    assert equal_rank(1000, 10_000, 100, 100, 4) == int((entropy + 4000) / (200 * 4))
    assert equal_rank(0, 10_000, 100, 100, 4) == 0 and equal_rank(10_000, 10_000, 10, 1000, 16) == 9
    assert equal_rank(5, 10_000, 100, 100, 4) == 0 and equal_rank(0, 0, 0, 0, 4) == 0


def test_the_kind_with_more_energy_is_chosen():
    smooth, few = low_rank(1), torch.zeros(SIZE)
    few[torch.randperm(384, generator=torch.Generator().manual_seed(1))[:30]] = 1.0
    for change, kind in ((smooth, FactoredVector), (few, SparseVector)):
        entries = sparsify(change, 0.1)
        chosen = better_of(change, entries, ROWS, COLUMNS, value_bits=4)
        assert type(chosen) is kind
        left = change - torch.from_numpy(chosen.to_dense())
        assert left.square().sum() <= (change - torch.from_numpy(entries.to_dense())).square().sum()
    assert better_of(smooth, sparsify(smooth, 0.001), ROWS, COLUMNS, value_bits=4) == sparsify(smooth, 0.001)
