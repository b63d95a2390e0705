from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from federated.aggregation.combine import aggregate
from federated.aggregation.contribution import Contribution
from federated.selection.systematic import inclusion_probabilities
from federated.selection.unit_selection import select_sample, select_top, update_energy
from federated.updates.update import SparseUpdate, SparseVector
from federated.wire.codec import pack_update, unpack_update

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


def test_horvitz_thompson_over_the_wire_is_unbiased():
    """Draw, pack, unpack, aggregate: the mean over many draws is the weighted mean of all clients' changes."""
    generator = torch.Generator().manual_seed(1)
    weights, sizes = [1.0, 3.0], {(layer, e): 2 for layer in (0, 1) for e in range(4)}
    # Multiples of 1/64 below 8: exact in 16 bits, so that drawing is the only error.
    clients = [
        {unit: torch.randint(-400, 400, (2,), generator=generator) / 64.0 for unit in sizes} for _ in weights
    ]
    clients[1][(0, 0)] = torch.zeros(2)  # trained and never drawn
    draws = np.array([_drawn_step(clients, weights, sizes, generator) for _ in range(1200)])
    expected = sum(
        weight / sum(weights) * np.concatenate([client[unit] for unit in sizes])
        for weight, client in zip(weights, clients, strict=True)
    )
    error = draws.std(0, ddof=1) / math.sqrt(len(draws))
    deviation = (draws.mean(0) - expected) / np.where(error > 0, error, 1)
    # 16 means: each within 4 of its own standard errors, and together as far as chance goes (chi-squared).
    assert np.abs(deviation).max() < 4
    assert np.square(deviation).sum() < 40
    assert (error > 0).sum() >= 14
    # The test can tell: without the weights 1/pi the same draws are far off.
    plain = np.mean([_drawn_step(clients, weights, sizes, generator, weighted=False) for _ in range(200)], 0)
    assert np.abs((plain - expected) / error.max()).max() > 8


def _drawn_step(clients, weights, sizes, generator, *, weighted=True):
    contributions = []
    for weight, client in zip(weights, clients, strict=True):
        inclusion = select_sample(client, 2, generator=generator)
        vectors = {
            unit: SparseVector.from_dense(client[unit].numpy(), np.ones(2, dtype=bool)) for unit in inclusion
        }
        packed = pack_update(SparseUpdate(0, "", vectors), value_bits=16)
        unpack = partial(unpack_update, packed, sizes=sizes)
        contributions.append(Contribution(weight, unpack, inclusion if weighted else {}, set(sizes)))
    step = aggregate(contributions, combine="horvitz-thompson")
    return np.concatenate([step[unit].numpy() if unit in step else np.zeros(2) for unit in sizes])
