from __future__ import annotations

import math

import pytest
import torch

from configs.errors import UserError
from federated.selection.error_feedback import Limits, choose_update, prepare_update
from federated.updates.lazy_vectors import LazyVectors
from federated.updates.update import SparseVector
from federated.wire.codec import pack_update, unpack_update
from federated.wire.factors import FactoredVector
from federated.wire.quantize import VALUE_BITS

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
    # The residual of a unit that did not train cannot be shipped.
    with pytest.raises(UserError, match="all-zero"):
        prepare_update(deltas, {(0, 1): torch.ones(4)}, density=0.5, value_bits=4, **GRAPH)
    for limits in (Limits(scope="all"), Limits(max_bytes=10_000)):
        with pytest.raises(UserError, match="all-zero"):
            choose_update(deltas, {}, limits, value_bits=4, **GRAPH)


def test_training_that_changed_nothing_still_ships_the_residual():
    residual = {(0, 0): torch.tensor([0.0, 2.0, 0.0, 0.0])}
    prepared = prepare_update({(0, 0): torch.zeros(4)}, residual, density=0.5, value_bits=16, **GRAPH)
    assert prepared.update.vectors[(0, 0)].to_dense().tolist() == [0, 2, 0, 0]
    assert prepared.residual == {}


def test_a_unit_without_any_change_is_not_shipped():
    deltas = {(0, 0): torch.zeros(4), (0, 1): torch.ones(4)}
    prepared = prepare_update(deltas, {}, density=1.0, value_bits=16, **GRAPH)
    assert set(prepared.update.vectors) == set(prepared.inclusion) == {(0, 1)}


SCOPES = [Limits(density=0.1), Limits(2, 0.1), Limits(density=0.1, scope="all"), Limits(1, max_bytes=650)]


@pytest.mark.parametrize("limits", SCOPES)
def test_lazy_vectors_give_the_same_update_and_residual(limits):
    deltas, residual = random_vectors(1, SIZES), random_vectors(2, {(0, 1): 130, (5, 5): 4})
    asked = []

    def compute(unit):
        asked.append(unit)
        return deltas[unit].clone()

    lazy = choose_update(LazyVectors(deltas, compute), residual, limits, value_bits=4, **GRAPH)
    eager = choose_update(deltas, residual, limits, value_bits=4, **GRAPH)
    assert lazy.update == eager.update and set(asked) == set(deltas)
    assert set(lazy.residual) == set(deltas) | set(residual)
    for unit, vector in eager.residual.items():
        assert torch.equal(lazy.residual[unit], vector)
        total = deltas.get(unit, torch.zeros(4)) + residual.get(unit, torch.zeros(()))
        shipped = lazy.update.vectors.get(unit)
        torch.testing.assert_close(vector + (torch.from_numpy(shipped.to_dense()) if shipped else 0), total)
    asked.clear()
    kept = choose_update(
        LazyVectors(deltas, compute), residual, limits, value_bits=4, in_memory=True, **GRAPH
    )
    assert kept.update == eager.update
    assert all(torch.equal(vector, eager.residual[unit]) for unit, vector in kept.residual.items())
    assert sorted(asked) == sorted(deltas)


def test_a_byte_budget_is_shared_among_the_units_chosen():
    deltas = {
        (0, e): torch.randn(4000, generator=torch.Generator().manual_seed(e)) * 2.0**e for e in range(4)
    }
    limits = Limits(per_layer=3, density=0.001, max_bytes=3000)
    prepared = choose_update(deltas, {}, limits, value_bits=4, **GRAPH)
    assert 2900 <= len(pack_update(prepared.update, value_bits=4)) <= 3000
    counts = {unit: vector.indices.size for unit, vector in prepared.update.vectors.items()}
    assert (0, 0) not in counts and counts[(0, 3)] > 2 * counts[(0, 2)] > 4 * counts[(0, 1)]


@pytest.mark.parametrize("limits", [Limits(1, 0.5), Limits(1, 0.5, "all"), Limits(1, max_bytes=660)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_what_is_applied_and_what_is_kept_are_what_changed(limits, unbiased):
    """Of each draw where a unit counts once, in expectation where it counts 1/pi times."""
    deltas = {(0, e): torch.tensor([8.0, 1.0, -4.0, 0.25]) * (e + 1) for e in range(3)}
    options = {"selection": "sample", "unbiased": unbiased, "value_bits": 16, **GRAPH}
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(300):
        prepared = choose_update(deltas, {}, limits, generator=generator, **options)
        rows = []
        for unit in deltas:
            shipped = prepared.update.vectors.get(unit)
            applied = torch.from_numpy(shipped.to_dense()) if shipped else torch.zeros(4)
            weight = 1 / prepared.inclusion.get(unit, 1.0) if unbiased else 1.0
            rows.append(weight * applied + prepared.residual[unit])
        draws.append(torch.cat(rows))
    found, expected = torch.stack(draws).double(), torch.cat(list(deltas.values())).double()
    if not unbiased:
        assert torch.equal(found, expected.expand_as(found))
    elif not limits.max_bytes and limits.scope == "expert":
        error = found.std(0) / len(draws) ** 0.5
        assert ((found.mean(0) - expected).abs() <= 4 * error + 1e-9).all() and error.max() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_changes_that_are_not_finite_are_an_error(bad):
    with pytest.raises(UserError, match="finite"):
        prepare_update({(0, 0): torch.tensor([1.0, bad])}, {}, density=0.5, value_bits=4, **GRAPH)


@pytest.mark.parametrize("selection", ["best", "sample"])
def test_unknown_selection_or_sample_without_generator(selection):
    with pytest.raises(ValueError, match="selection"):
        prepare_update({(0, 0): torch.ones(2)}, {}, selection=selection, density=0.5, value_bits=4, **GRAPH)


def test_units_of_low_rank_go_as_factors_and_nothing_is_lost():
    generator = torch.Generator().manual_seed(0)
    flat = torch.outer(*torch.randn(2, 24, generator=generator)).reshape(-1)
    spiky = torch.zeros(24 * 24)
    spiky[torch.randperm(24 * 24, generator=generator)[:30]] = 1.0
    rest = torch.full((5,), 9.0)
    deltas = {(0, 0): torch.cat([flat, rest]), (0, 1): torch.cat([spiky, rest]), (0, -1): torch.ones(4)}
    shapes = {(0, 0): (24, 24), (0, 1): (24, 24)}
    prepared = choose_update(
        deltas, {}, Limits(density=0.1), shapes=shapes, value_bits=16, graph_version=0, graph_hash=""
    )
    kinds = {unit: type(vector) for unit, vector in prepared.update.vectors.items()}
    assert kinds == {(0, 0): FactoredVector, (0, 1): SparseVector, (0, -1): SparseVector}
    assert (prepared.residual[(0, 0)][: 24 * 24].abs() < 0.02).all()
    for unit, delta in deltas.items():
        shipped = torch.from_numpy(prepared.update.vectors[unit].to_dense())
        torch.testing.assert_close(shipped + prepared.residual[unit], delta)
