from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from federated.protocol.steps import split_parts
from federated.wire.codec import unpack_update
from server.model.pack_step import pack_step

SIZES = {(0, 0): 400, (0, 1): 400, (1, 0): 900, (1, -1): 50}
GRAPH = {"graph_version": 3, "graph_hash": "h"}


def random_vectors(units, *, seed=0, share=1.0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        unit: torch.randn(SIZES[unit], generator=generator)
        * (torch.rand(SIZES[unit], generator=generator) < share)
        for unit in units
    }


def dense(packed: bytes) -> dict:
    """All parts together, ``[size]`` per unit."""
    vectors: dict = {}
    for part in split_parts(packed):
        update = unpack_update(part, sizes=SIZES, graph_version=3, graph_hash="h")
        assert vectors.keys().isdisjoint(update.vectors)
        vectors |= {unit: torch.from_numpy(vector.to_dense()) for unit, vector in update.vectors.items()}
    return vectors


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("part_entries", [1, 150, 10**6])
def test_what_is_sent_and_what_is_left_are_together_what_came(density, part_entries):
    residual = random_vectors([(0, 0), (0, 1)], seed=1)
    before = {unit: vector.clone() for unit, vector in residual.items()}
    change = random_vectors([(0, 1), (1, 0), (1, -1)], share=0.5)
    packed = pack_step(change, residual, density=density, value_bits=4, part_entries=part_entries, **GRAPH)
    sent = dense(packed)
    assert len(split_parts(packed)) == {1: 3, 150: 2 if density == 1 else 1, 10**6: 1}[part_entries]
    assert set(sent) == set(change)
    for unit, size in SIZES.items():
        nothing = torch.zeros(size)
        came = before.get(unit, nothing) + change.get(unit, nothing)
        together = sent.get(unit, nothing) + residual.get(unit, nothing)
        torch.testing.assert_close(together, came, atol=1e-6, rtol=0)


def test_the_residual_of_a_unit_that_nobody_shipped_waits():
    residual = random_vectors([(0, 0)])
    kept = residual[0, 0].clone()
    assert (0, 0) not in dense(
        pack_step(random_vectors([(0, 1)]), residual, density=0.5, value_bits=4, **GRAPH)
    )
    assert torch.equal(residual[0, 0], kept)


def test_a_density_of_1_sends_the_entries_that_clients_shipped_and_no_other():
    residual = random_vectors([(0, 0)], seed=1)
    change = random_vectors([(0, 0)], share=0.1)
    sent = dense(pack_step(change, residual, density=1.0, value_bits=16, **GRAPH))[0, 0]
    assert (sent[change[0, 0] == 0] == 0).all() and (sent[change[0, 0] != 0] != 0).all()


def test_a_lower_density_sends_the_largest_whoever_shipped_them():
    residual = {(0, 0): torch.zeros(400)}
    residual[0, 0][7] = 100.0
    change = random_vectors([(0, 0)], share=0.5)
    sent = dense(pack_step(change, residual, density=0.05, value_bits=16, **GRAPH))[0, 0]
    assert int((sent != 0).sum()) == 20 and sent[7] != 0


def test_nothing_to_send_is_a_step_without_entries():
    for change in ({}, {(0, 0): torch.zeros(400)}):
        assert dense(pack_step(change, {}, density=1.0, value_bits=4, **GRAPH)) == {}
    residual = random_vectors([(0, 0)])
    change = {(0, 0): -residual[0, 0]}
    assert dense(pack_step(change, residual, density=0.5, value_bits=4, **GRAPH)) == {} and residual == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e35])
def test_a_change_that_is_not_finite_is_an_error_and_the_residual_stays(value):
    residual, change = random_vectors([(0, 0)]), random_vectors([(0, 0), (1, 0)])
    kept = residual[0, 0].clone()
    change[1, 0][3] = value
    with pytest.raises(UserError, match="finite step of unit .1, 0."):
        pack_step(change, residual, density=1.0, value_bits=4, **GRAPH)
    assert torch.equal(residual[0, 0], kept)
