"""Likeness of pairs of experts, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from configs.choices import Alignment
from configs.errors import UserError
from experts.merging.similarity import (
    PairLikeness,
    jaccard,
    jaccard_row,
    pack_visits,
    weight_cosine,
    weight_cosines,
)


def visits(experts=5, tokens=37, seed=0):
    visited = np.random.default_rng(seed).random((experts, tokens)) < 0.4
    visited[-1] = False
    return visited


def expert(seed, neurons=6, width=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2 * neurons, width)), rng.normal(size=(width, neurons))


def plain_jaccard(visited):
    sets = [{token for token, there in enumerate(row) if there} for row in visited]
    return [[len(a & b) / len(a | b) if a | b else 0.0 for b in sets] for a in sets]


def plain_cosine(one, other):
    a, b = ([float(x) for part in pair for x in part.ravel()] for pair in (one, other))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("tokens", [1, 8, 37, 64])
def test_jaccard_is_that_of_the_sets_of_tokens(tokens):
    visited = visits(tokens=tokens)
    packed = pack_visits(visited)
    assert packed.dtype == np.uint8 and packed.shape == (5, -(-tokens // 8))
    np.testing.assert_allclose(jaccard(packed), plain_jaccard(visited))
    np.testing.assert_allclose(jaccard_row(packed, 2), plain_jaccard(visited)[2])


def test_an_expert_that_nobody_visits_shares_no_token():
    assert (jaccard(pack_visits(visits()))[-1] == 0).all()


def test_batches_that_begin_a_byte_each_change_nothing():
    visited = visits(tokens=21)
    parts = [pack_visits(visited[:, :5]), pack_visits(visited[:, 5:])]
    np.testing.assert_allclose(jaccard(np.concatenate(parts, axis=1)), plain_jaccard(visited))


def test_weight_cosine_is_that_of_all_weights():
    experts = [expert(seed) for seed in range(4)]
    expected = [[plain_cosine(one, other) for other in experts] for one in experts]
    np.testing.assert_allclose(weight_cosines(experts, "none"), expected, atol=1e-12)
    assert weight_cosine(experts[0], experts[1], "none") == pytest.approx(expected[0][1])


@pytest.mark.parametrize("alignment", Alignment)
def test_cosines_of_pairs_are_those_of_the_matrix(alignment):
    experts = [expert(seed) for seed in range(4)]
    matrix = weight_cosines(experts, alignment)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(matrix), 1)
    for one, other in ((0, 3), (2, 1)):
        assert matrix[one, other] == pytest.approx(weight_cosine(experts[one], experts[other], alignment))


def test_alignment_finds_a_twin_with_flipped_neurons_in_another_order():
    gate_up, down = expert(0)
    gate, up = np.split(gate_up, 2)
    order, sign = np.array([3, 1, 0, 5, 2, 4]), np.array([1, -1, 1, 1, -1, -1])
    flipped = np.concatenate([gate, up * sign[:, None]]), down * sign
    twin = np.concatenate([gate[order], (up * sign[:, None])[order]]), (down * sign)[:, order]
    found = [[weight_cosine(other, (gate_up, down), each) for each in Alignment] for other in (flipped, twin)]
    assert found[0][0] < 0.9 and found[0][1:] == pytest.approx([1, 1])
    assert max(found[1][:2]) < 0.9 and found[1][2] == pytest.approx(1)


@pytest.mark.parametrize("alignment", Alignment)
def test_an_expert_of_zeros_is_like_no_other(alignment):
    zero = np.zeros((12, 4)), np.zeros((4, 6))
    assert weight_cosine(zero, expert(0), alignment) == 0 == weight_cosine(expert(0), zero, alignment)


def test_one_expert_is_like_itself():
    assert weight_cosines([expert(0)], "none") == pytest.approx(np.ones((1, 1)))
    assert weight_cosines([expert(0)], "centroid") == pytest.approx(np.ones((1, 1)))


def test_an_unknown_alignment_is_refused():
    with pytest.raises(UserError, match="'up'"):
        weight_cosines([expert(0)], "up")


def test_likeness_is_the_mean_and_follows_a_merge():
    visited, experts = visits(), [expert(seed) for seed in range(5)]
    cosines, packed = weight_cosines(experts, "none"), pack_visits(visited)
    pairs = PairLikeness(cosines, packed)
    np.testing.assert_allclose(pairs.likeness_EE, (cosines + plain_jaccard(visited)) / 2)
    pairs.merge(1, 3, {0: 0.25, 2: -0.5})
    visited[1] |= visited[3]
    np.testing.assert_allclose(pairs.jaccard_EE, plain_jaccard(visited))
    assert pairs.cosine_EE[1, 0] == pairs.cosine_EE[0, 1] == 0.25 and pairs.cosine_EE[2, 1] == -0.5
    assert pairs.cosine_EE[1, 4] == cosines[1, 4]
    # What was given stays as it was.
    assert cosines[1, 0] != 0.25 and (packed == pack_visits(visits())).all()
