from __future__ import annotations

from dataclasses import replace

import pytest
from scipy.stats import spearmanr

from configs.errors import UserError
from experts.saliency.saliency_report import compare_layers, layer_summaries
from tests.support.saliency_samples import random_saliency, saliency_of_scores


def test_best_and_worst_and_idle_experts_are_told():
    saliency = saliency_of_scores([[0.5, 0.0, 2.0, 1.0, 3.0], [0.0, 1.0]])
    first, second = layer_summaries(saliency, "freq", top=2)
    assert (first["layer"], first["decoder_layer"], first["experts"]) == (0, 0, 5)
    assert first["best"] == [4, 2] and first["worst"] == [1, 0] and first["never_routed"] == [1]
    assert first["scores"] == [0.5, 0.0, 2.0, 1.0, 3.0]
    assert (second["best"], second["worst"], second["never_routed"]) == ([1, 0], [0, 1], [0])
    assert second["scores"] == [0.0, 1.0]


def test_the_decoder_layer_stands_beside_the_ordinal():
    assert [one["decoder_layer"] for one in layer_summaries(random_saliency([2, 2]), "reap")] == [1, 3]


@pytest.mark.parametrize("metric", ["reap", "ean", "freq", "weighted_freq"])
def test_correlation_is_that_of_scipy(metric):
    first, second = random_saliency([9, 5], 1), random_saliency([9, 5], 2)
    for layer, compared in enumerate(compare_layers(first, second, metric)):
        number = first.experts_per_layer[layer]
        scores = [one.scores(metric)[layer, :number] for one in (first, second)]
        assert compared["spearman"] == pytest.approx(spearmanr(*scores).statistic)


def test_a_file_agrees_with_itself():
    saliency = random_saliency([8, 3])
    for compared in compare_layers(saliency, saliency, "reap"):
        assert compared["spearman"] == pytest.approx(1.0)
        assert compared["bottom_quarter_overlap"] == 1.0 and compared["largest_changes"] == []


def test_changes_of_rank_come_largest_first():
    before, after = saliency_of_scores([[8, 7, 6, 5, 4, 3, 2, 1]]), saliency_of_scores(
        [[1, 7, 6, 5, 4, 3, 2, 8]]
    )
    (compared,) = compare_layers(before, after, "freq", top=3)
    assert compared["largest_changes"] == [
        {"expert": 0, "rank_before": 1.0, "rank_after": 8.0},
        {"expert": 7, "rank_before": 8.0, "rank_after": 1.0},
    ]
    # The worst two of eight were 7 and 6, and are 0 and 6.
    assert compared["bottom_quarter_overlap"] == 0.5 and compared["spearman"] < 0.2


def test_experts_all_alike_have_no_correlation():
    alike = saliency_of_scores([[1.0, 1.0], [2.0]])
    assert [one["spearman"] for one in compare_layers(alike, alike, "reap")] == [None, None]


def test_models_of_other_shapes_are_not_compared():
    with pytest.raises(UserError, match=r"\[3, 3\] and \[3, 2\]"):
        compare_layers(random_saliency([3, 3]), random_saliency([3, 2]), "reap")


def test_shared_experts_are_counted_and_not_listed():
    saliency = replace(saliency_of_scores([[9.0, 0.1, 2.0, 1.0]]), num_shared=(2,))
    (layer,) = layer_summaries(saliency, "freq")
    assert (layer["shared"], layer["best"], layer["worst"]) == (2, [2, 3], [3, 2])
