from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from federated.codec import pack_update, unpack_update
from federated.quantise import VALUE_BITS
from federated.selection import (
    inclusion_probabilities,
    prepare_update,
    select_sample,
    select_top,
    sparsify,
    update_energy,
)


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


VECTORS = {
    (0, 0): torch.tensor([3.0, 4.0]),
    (0, 1): torch.tensor([0.0, 1.0]),
    (0, 2): torch.tensor([5.0, 0.0]),
    (0, -1): torch.tensor([0.1]),
    (1, 1): torch.tensor([2.0]),
    (1, 0): torch.tensor([1.0]),
}


def test_energy_is_the_sum_of_squares():
    assert update_energy({(0, 0): torch.tensor([3.0, 4.0]), (1, 2): torch.zeros(3)}) == {
        (0, 0): 25.0,
        (1, 2): 0.0,
    }


def test_top_takes_the_largest_of_each_layer_and_the_rest_of_the_layer():
    assert select_top(VECTORS, 1) == [(0, -1), (0, 0), (1, 1)]
    assert select_top(VECTORS, 2) == [(0, -1), (0, 0), (0, 2), (1, 0), (1, 1)]
    assert select_top(VECTORS, 0) == select_top(VECTORS, 99) == sorted(VECTORS)
    assert select_top({}, 2) == []


@pytest.mark.parametrize(
    "sizes, draws, expected",
    [
        ([1, 1, 2], 1, [0.25, 0.25, 0.5]),
        ([1, 1, 10], 2, [0.5, 0.5, 1.0]),
        ([1, 1, 10, 100], 3, [0.5, 0.5, 1.0, 1.0]),
        ([1, 2], 2, [1.0, 1.0]),
        ([1, 2, 3], 0, [1.0, 1.0, 1.0]),
    ],
)
def test_inclusion_probabilities(sizes, draws, expected):
    result = inclusion_probabilities({(0, e): size for e, size in enumerate(sizes)}, draws)
    assert [result[(0, e)] for e in range(len(sizes))] == pytest.approx(expected)


def test_units_without_change_have_no_probability():
    assert inclusion_probabilities({(0, 0): 0.0, (0, 1): 1.0, (0, 2): 3.0}, 1) == {(0, 1): 0.25, (0, 2): 0.75}
    assert inclusion_probabilities({}, 2) == {}


def test_sampling_draws_each_unit_as_often_as_its_probability_says():
    norms = [1.0, 2.0, 0.5, 8.0, 3.0]
    vectors = {(0, e): torch.tensor([norm]) for e, norm in enumerate(norms)} | {(0, -1): torch.zeros(1)}
    expected = inclusion_probabilities({(0, e): norm for e, norm in enumerate(norms)}, 3)
    generator, rounds = torch.Generator().manual_seed(0), 4000
    counts = dict.fromkeys(vectors, 0)
    estimate = np.zeros(5)
    for _ in range(rounds):
        drawn = select_sample(vectors, 3, generator=generator)
        assert len(drawn) == 4 and drawn[(0, -1)] == 1.0
        for unit, probability in drawn.items():
            counts[unit] += 1
            if unit[1] >= 0:
                assert probability == pytest.approx(expected[unit])
                estimate[unit[1]] += norms[unit[1]] / probability / rounds
    for unit, probability in expected.items():
        assert counts[unit] / rounds == pytest.approx(probability, abs=4 * 0.5 / math.sqrt(rounds))
    # Weighted by 1/probability the mean over draws is the full vector: unbiased.
    np.testing.assert_allclose(estimate, norms, rtol=0.12)
    assert estimate.sum() == pytest.approx(sum(norms), rel=0.03)


def test_sampling_repeats_with_the_seed_and_takes_all_when_asked():
    draws = [
        select_sample(VECTORS, 1, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2, 3, 4, 5)
    ]
    assert draws[0] == draws[1] and any(draw != draws[0] for draw in draws)
    everything = select_sample(VECTORS, 0, generator=torch.Generator())
    assert everything == dict.fromkeys(sorted(VECTORS), 1.0)


GRAPH = {"graph_version": 2, "graph_hash": "ab"}


def random_vectors(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    return {unit: torch.randn(size, generator=generator) * 1e-3 for unit, size in sizes.items()}


SIZES = {(0, -1): 7, (0, 0): 130, (0, 1): 130, (1, 0): 130, (1, 1): 131}


@pytest.mark.parametrize("bits", VALUE_BITS)
@pytest.mark.parametrize("density, per_layer", [(0.1, 1), (1.0, 0), (0.5, 2)])
def test_nothing_is_lost_between_shipped_and_residual(bits, density, per_layer):
    deltas, residual = random_vectors(1, SIZES), random_vectors(2, {(0, 1): 130, (1, 0): 130, (5, 5): 4})
    prepared = prepare_update(
        deltas, residual, density=density, value_bits=bits, per_layer=per_layer, residual_decay=0.5, **GRAPH
    )
    for unit in {**deltas, **residual}:
        size = SIZES.get(unit, 4)
        expected = deltas.get(unit, torch.zeros(size)) + 0.5 * residual.get(unit, torch.zeros(size))
        shipped = prepared.update.vectors.get(unit)
        total = prepared.residual.get(unit, torch.zeros(size)) + (
            torch.from_numpy(shipped.to_dense()) if shipped else 0
        )
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)
    assert (5, 5) not in prepared.update.vectors
    assert set(prepared.update.vectors) == set(prepared.inclusion)


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_the_server_sees_exactly_the_prepared_values(bits):
    update, _, _ = prepare_update(random_vectors(3, SIZES), {}, density=0.2, value_bits=bits, **GRAPH)
    assert unpack_update(pack_update(update, value_bits=bits), sizes=SIZES, **GRAPH) == update


def test_the_residual_decides_what_is_shipped_next():
    deltas = {(0, 0): torch.tensor([1.0, 0.0]), (0, 1): torch.tensor([0.9, 0.0])}
    kwargs = {"density": 0.5, "value_bits": 16, "per_layer": 1, **GRAPH}
    first = prepare_update(deltas, {}, **kwargs)
    second = prepare_update(deltas, first.residual, **kwargs)
    assert list(first.update.vectors) == [(0, 0)] and list(second.update.vectors) == [(0, 1)]
    assert second.update.vectors[(0, 1)].values[0] == pytest.approx(1.8, rel=1e-3)
    forgotten = prepare_update(deltas, first.residual, residual_decay=0.0, **kwargs)
    assert list(forgotten.update.vectors) == [(0, 0)]


def test_inputs_are_left_as_they_were():
    deltas, residual = random_vectors(1, SIZES), random_vectors(2, SIZES)
    before = {unit: (deltas[unit].clone(), residual[unit].clone()) for unit in SIZES}
    prepare_update(deltas, residual, density=1.0, value_bits=2, **GRAPH)
    for unit, (delta, left) in before.items():
        assert torch.equal(deltas[unit], delta) and torch.equal(residual[unit], left)


def test_sampling_reports_its_probabilities():
    prepared = prepare_update(
        random_vectors(4, SIZES),
        {},
        density=1.0,
        value_bits=8,
        selection="sample",
        per_layer=1,
        generator=torch.Generator().manual_seed(0),
        **GRAPH,
    )
    assert len(prepared.inclusion) == 3 and prepared.inclusion[(0, -1)] == 1.0
    assert all(0 < p <= 1 for p in prepared.inclusion.values())
    assert set(prepared.update.vectors) == set(prepared.inclusion)


@pytest.mark.parametrize("deltas", [{}, {(0, 0): torch.zeros(4)}])
def test_an_all_zero_update_is_an_error(deltas):
    with pytest.raises(UserError, match="all-zero"):
        prepare_update(deltas, {(0, 0): torch.ones(4)}, density=0.5, value_bits=4, **GRAPH)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_changes_that_are_not_finite_are_an_error(bad):
    with pytest.raises(UserError, match="finite"):
        prepare_update({(0, 0): torch.tensor([1.0, bad])}, {}, density=0.5, value_bits=4, **GRAPH)


@pytest.mark.parametrize("selection", ["best", "sample"])
def test_unknown_selection_or_sample_without_generator(selection):
    with pytest.raises(ValueError, match="selection"):
        prepare_update(VECTORS, {}, selection=selection, density=0.5, value_bits=4, **GRAPH)
