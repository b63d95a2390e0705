"""Groups, alignment and averages of experts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from configs.choices import Alignment
from configs.errors import UserError
from experts.merging.alignment import align_neurons, average_experts, group_experts


def gated_ffn(gate_up, down, x):
    gate, up = np.split(x @ gate_up.T, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def expert(rng, neurons=6, width=5):
    return rng.normal(size=(2 * neurons, width)), rng.normal(size=(width, neurons))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_have_the_largest_sum_of_similarities_that_fits(size):
    rng = np.random.default_rng(size)
    similarity, centroids = rng.normal(size=(6, 6)), np.array([1, 4, 5])
    groups = group_experts(similarity, centroids, size)
    assert sorted(sum(groups.values(), [])) == list(range(6))
    assert all(group[0] == centroid and len(group) <= size for centroid, group in groups.items())
    others = [0, 2, 3]
    best = max(
        sum(similarity[other, centroid] for other, centroid in zip(others, choice, strict=True))
        for choice in product(centroids, repeat=3)
        if max(np.bincount(choice)) <= size - 1
    )
    found = sum(similarity[other, centroid] for centroid, group in groups.items() for other in group[1:])
    assert found == pytest.approx(best)


def test_all_kept_and_all_but_one_are_groups_too():
    similarity = np.eye(3)
    assert group_experts(similarity, np.arange(3), 1) == {0: [0], 1: [1], 2: [2]}
    assert group_experts(similarity, np.array([2]), 3) == {2: [2, 0, 1]}


def test_groups_that_are_too_small_are_refused_with_the_size_that_would_do():
    with pytest.raises(UserError, match="allow 3 or keep more"):
        group_experts(np.eye(6), np.array([0, 1]), 2)


@pytest.mark.parametrize("alignment", Alignment)
def test_an_aligned_expert_computes_what_it_did(alignment):
    rng = np.random.default_rng(0)
    one, other, x = expert(rng), expert(rng), rng.normal(size=(20, 5))
    aligned = align_neurons(*one, *other, alignment)
    np.testing.assert_allclose(gated_ffn(*aligned, x), gated_ffn(*one, x), atol=1e-12)


def test_alignment_undoes_flips_and_orders():
    rng = np.random.default_rng(1)
    gate_up, down = expert(rng)
    gate, up = np.split(gate_up, 2)
    sign, order = np.array([1, -1, 1, -1, -1, 1])[:, None], rng.permutation(6)
    flipped = np.concatenate([gate, up * sign]), (down.T * sign).T
    for part, expected in zip(align_neurons(*flipped, gate_up, down, "sign"), (gate_up, down), strict=True):
        np.testing.assert_allclose(part, expected)
    mixed = np.concatenate([gate[order], (up * sign)[order]]), (down.T * sign)[order].T
    for part, expected in zip(align_neurons(*mixed, gate_up, down, "centroid"), (gate_up, down), strict=True):
        np.testing.assert_allclose(part, expected)
    assert align_neurons(*mixed, gate_up, down, "none")[0] is mixed[0]


def test_an_unknown_alignment_is_refused():
    with pytest.raises(UserError, match="'up'"):
        align_neurons(*expert(np.random.default_rng(0)), *expert(np.random.default_rng(0)), "up")


def test_an_average_is_weighted():
    rng = np.random.default_rng(2)
    one, other = expert(rng), expert(rng)
    for found, a, b in zip(average_experts([one, other], [3, 1]), one, other, strict=True):
        np.testing.assert_allclose(found, 0.75 * a + 0.25 * b)
    for found, a, b in zip(average_experts([one, other], [0, 0]), one, other, strict=True):
        np.testing.assert_allclose(found, (a + b) / 2)
    np.testing.assert_allclose(average_experts([one], [0.5])[1], one[1])
    with pytest.raises(UserError, match="at least 0"):
        average_experts([one, other], [1, -1])
