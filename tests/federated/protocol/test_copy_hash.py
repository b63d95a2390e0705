from __future__ import annotations

import pytest
import torch

from federated.protocol.copy_hash import copy_hash, routing_vector, unit_digest, vector_digest
from models.graph.attention_vectors import read_attention, write_attention
from models.graph.unit_vectors import OTHERS, read_unit, write_unit
from tests.support.tiny_graphs import graph_of, with_random_gains

UNITS = [(0, 1), (1, 3), (1, OTHERS)]


@pytest.fixture
def model():
    return with_random_gains(graph_of())


def digests(model) -> dict:
    return {unit: unit_digest(model, unit) for unit in UNITS}


def test_equal_copies_have_equal_hashes_and_each_part_counts(model):
    reference = copy_hash(model, digests(model))
    assert reference == copy_hash(with_random_gains(graph_of()), digests(with_random_gains(graph_of())))
    layer = model.expert_layers()[1]
    with torch.no_grad():
        for parameter in (layer.router.weight, layer.edge_gain, layer.edge_affinity, layer.output_gain):
            kept = parameter.clone()
            parameter.view(-1)[-1] += 1e-6
            assert copy_hash(model, digests(model)) != reference
            parameter.copy_(kept)
    assert copy_hash(model, digests(model)) == reference
    layer.edges[0, 1] ^= True
    assert copy_hash(model, digests(model)) != reference
    layer.edges[0, 1] ^= True
    model.config.graph_version += 1
    assert copy_hash(model, digests(model)) != reference


def test_units_count_by_their_digests_whatever_their_order(model):
    moved = digests(model)
    assert copy_hash(model, moved) == copy_hash(model, dict(reversed(moved.items())))
    assert copy_hash(model, {**moved, (0, 1): "0" * 32}) != copy_hash(model, moved)
    assert copy_hash(model, {(0, 1): moved[0, 1]}) != copy_hash(model, moved)


def test_the_digest_of_an_expert_is_of_its_matrices_alone(model):
    before = unit_digest(model, (0, 1))
    vector = read_unit(model, (0, 1))
    vector[-1] += 1  # its routing
    write_unit(model, (0, 1), vector)
    assert unit_digest(model, (0, 1)) == before
    vector[0] += 1
    write_unit(model, (0, 1), vector)
    assert unit_digest(model, (0, 1)) != before


def test_the_digest_of_a_layer_is_of_its_attention(model):
    before = unit_digest(model, (0, OTHERS))
    write_attention(model, 0, read_attention(model, 0) + 1e-3)
    assert unit_digest(model, (0, OTHERS)) != before


def test_one_bit_changes_a_digest():
    vector = torch.zeros(7)
    assert vector_digest(vector) == vector_digest(torch.zeros(7)) != vector_digest(-vector)
    assert len(vector_digest(vector)) == 32


def test_the_routing_of_a_layer_in_order(model):
    layer = model.expert_layers()[0]
    vector = routing_vector(layer)
    assert vector.numel() == 4 * 32 + 2 * 16 + 4
    assert torch.equal(vector[:128].view(4, 32), layer.router.weight) and torch.equal(
        vector[-4:], layer.output_gain
    )
