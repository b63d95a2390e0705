"""Experts that stand out on one kind of prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from configs.errors import UserError
from experts.saliency.expert_scan import map_of_scan, scan_experts
from experts.saliency.measures import Saliency


def saliency(freq, norm, tokens=100, layers=None) -> Saliency:
    """Visits and mean gated norms ``[L, E]``, all gates one."""
    freq, norm = np.asarray(freq, float), np.asarray(norm, float)
    layers = layers or list(range(len(freq)))
    return Saliency(freq * norm, freq, freq * norm, freq, freq, layers, {"tokens": tokens})


def test_frequency_and_activation_are_differences_over_tokens_and_visits():
    prompts, others = saliency([[50, 30, 20]], [[2, 3, 1]]), saliency([[40, 100, 60]], [[2, 1, 1]], 200)
    scan = scan_experts(prompts, others)
    np.testing.assert_allclose(scan.frequency, [[0.3, -0.2, -0.1]])
    np.testing.assert_allclose(scan.activation, [[0, 0.5, 0]])
    assert scan_experts(prompts, others, frequency_weight=1).scores.argmax() == 0
    assert scan_experts(prompts, others, frequency_weight=0).scores.argmax() == 1


def test_scores_are_standardized_in_each_layer_so_that_no_layer_dominates():
    prompts = saliency([[60, 20, 20], [40, 31, 29]], [[1] * 3] * 2)
    others = saliency([[33, 33, 34], [33, 33, 34]], [[1] * 3] * 2)
    scores = scan_experts(prompts, others, frequency_weight=1).scores
    np.testing.assert_allclose(scores.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(scores.std(axis=1), 1)


def test_swapping_the_sets_turns_the_scores_round():
    rng = np.random.default_rng(0)
    one, other = (saliency(rng.integers(1, 50, (2, 5)), rng.random((2, 5)) + 0.1) for _ in range(2))
    np.testing.assert_allclose(scan_experts(one, other).scores, -scan_experts(other, one).scores, atol=1e-12)


def test_the_top_share_of_each_layer_is_flagged():
    rng = np.random.default_rng(1)
    one, other = (saliency(rng.integers(1, 50, (3, 20)), rng.random((3, 20)) + 0.1) for _ in range(2))
    scan = scan_experts(one, other)
    found = map_of_scan(scan, "safety", quantile=0.9, provenance={"model": "m"})
    assert found.kind == "safety" and found.provenance == {"model": "m"}
    for layer in range(3):
        assert found.flagged[layer].tolist() == sorted(np.argsort(scan.scores[layer])[-2:].tolist())
        assert found.thresholds[layer] == pytest.approx(np.quantile(scan.scores[layer], 0.9))


def test_equal_sets_flag_nobody():
    one = saliency([[10, 20, 30]], [[1, 2, 3]])
    found = map_of_scan(scan_experts(one, one), "domain", quantile=0.0, provenance={})
    assert found.flagged[0].size == 0 and (found.scores == 0).all()


def test_an_expert_that_is_never_visited_and_one_that_is_absent():
    prompts = saliency([[10, 0, 5], [4, 6, np.nan]], [[1, 1, 1], [1, 2, np.nan]])
    others = saliency([[5, 0, 10], [6, 4, np.nan]], [[1, 1, 1], [1, 1, np.nan]])
    scan = scan_experts(prompts, others)
    assert scan.activation[0, 1] == 0 and np.isnan(scan.scores[1, 2])
    assert np.isfinite(scan.scores[0]).all()
    assert 2 not in map_of_scan(scan, "domain", quantile=0.5, provenance={}).flagged[1]


def test_what_cannot_be_compared_is_refused():
    one = saliency([[10, 20, 30]], [[1, 2, 3]])
    with pytest.raises(UserError, match="one model"):
        scan_experts(one, saliency([[10, 20]], [[1, 2]]))
    with pytest.raises(UserError, match="between 0 and 1"):
        scan_experts(one, one, frequency_weight=1.5)
    with pytest.raises(UserError, match="quantile"):
        map_of_scan(scan_experts(one, one), "domain", quantile=1.0, provenance={})
    with pytest.raises(UserError, match="tokens"):
        scan_experts(one, saliency([[10, 20, 30]], [[1, 2, 3]], tokens=None))


def test_shared_experts_are_never_flagged_and_do_not_change_the_scores_of_others():
    rng = np.random.default_rng(2)
    one, other = (saliency(rng.integers(1, 50, (2, 6)), rng.random((2, 6)) + 0.1) for _ in range(2))
    shared = [replace(each, num_shared=(2, 0)) for each in (one, other)]
    without = [saliency(each.freq[:, 2:], each.scores("reap")[:, 2:]) for each in (one, other)]
    scan, expected = scan_experts(*shared), scan_experts(*without)
    np.testing.assert_allclose(scan.scores[0, 2:], expected.scores[0])
    flagged = map_of_scan(scan, "safety", quantile=0.5, provenance={}).flagged
    wanted = map_of_scan(expected, "safety", quantile=0.5, provenance={}).flagged
    assert flagged[0].tolist() == (wanted[0] + 2).tolist()
    everyone = [replace(each, num_shared=(6, 0)) for each in (one, other)]
    found = map_of_scan(scan_experts(*everyone), "safety", quantile=0.5, provenance={})
    assert not found.flagged[0].size and found.experts_per_layer == [6, 6]
