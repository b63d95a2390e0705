from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.choices import Metric
from configs.errors import UserError
from experts.saliency.measures import add_saliency
from experts.saliency.ranks import over_layer_mean, rank_sums
from tests.support.saliency_samples import padded, random_saliency, saliency_of_scores


def test_the_best_of_a_layer_has_rank_1_and_ties_share_theirs():
    saliency = saliency_of_scores([[5.0, 1.0, 3.0, 3.0], [2.0, 7.0]])
    np.testing.assert_array_equal(
        rank_sums([saliency], "reap", model_wide=False), padded([[1, 4, 2.5, 2.5], [2, 1]])
    )


def test_the_ranks_of_several_files_are_summed():
    files = [saliency_of_scores([[3.0, 2.0, 1.0]]), saliency_of_scores([[100.0, 1.0, 900.0]])]
    assert rank_sums(files, "ean", model_wide=False).tolist() == [[3, 5, 4]]
    assert rank_sums(files[::-1], "ean", model_wide=False).tolist() == [[3, 5, 4]]


@settings(max_examples=50, deadline=None)
@given(
    experts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    files=st.integers(1, 3),
    metric=st.sampled_from(list(Metric)),
    model_wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ranks_are_shared_out_whole(experts, files, metric, model_wide, seed):
    saliencies = [random_saliency(experts, seed + 100 * number) for number in range(files)]
    ranks = rank_sums(saliencies, metric, model_wide=model_wide)
    np.testing.assert_array_equal(np.isnan(ranks), ~saliencies[0].present)
    total = [number * (number + 1) / 2 for number in ([sum(experts)] if model_wide else experts)]
    assert np.nansum(ranks) == pytest.approx(files * sum(total))
    assert np.nanmin(ranks) >= files


def test_a_layer_of_large_norms_does_not_dominate_model_wide():
    scores = [[1.0, 2.0, 3.0, 10.0], [100.0, 200.0, 300.0, 1000.0]]
    ranks = rank_sums([saliency_of_scores(scores)], "ean", model_wide=True)
    np.testing.assert_array_equal(ranks[0], ranks[1])
    assert sorted(ranks[0].tolist()) == [1.5, 3.5, 5.5, 7.5]


def test_a_layer_of_zeros_is_the_worst_model_wide():
    ranks = rank_sums([saliency_of_scores([[0.0, 0.0], [1.0, 2.0]])], "freq", model_wide=True)
    assert ranks.tolist() == [[3.5, 3.5], [2, 1]]


def test_dividing_by_the_layer_keeps_signs_and_absences():
    scores = padded([[2.0, -2.0, 4.0], [0.0]])
    divided = over_layer_mean(scores, ~np.isnan(scores))
    np.testing.assert_allclose(divided, padded([[0.75, -0.75, 1.5], [0.0]]))
    among = over_layer_mean(scores, np.array([[False, True, True], [False, False, False]]))
    np.testing.assert_allclose(among, padded([[2 / 3, -2 / 3, 4 / 3], [0.0]]))


def test_a_rank_merge_is_never_stored_as_frequency():
    # Expert 0 is used most in both texts: it has the smallest rank sum and the largest frequency.
    files = [saliency_of_scores([[90.0, 9.0, 1.0]]), saliency_of_scores([[50.0, 30.0, 20.0]])]
    ranks = rank_sums(files, "freq", model_wide=False)
    assert ranks.tolist() == [[2, 4, 6]]
    merged = add_saliency(files)
    assert merged.scores("freq").tolist() == [[140.0, 39.0, 21.0]]
    np.testing.assert_array_equal(
        np.argsort(rank_sums([merged], "freq", model_wide=False)), np.argsort(ranks)
    )


def test_files_of_different_models_have_no_common_ranks():
    with pytest.raises(UserError, match="one model"):
        rank_sums([random_saliency([3]), random_saliency([4])], "reap", model_wide=False)
    with pytest.raises(UserError, match="at least one"):
        rank_sums([], "reap", model_wide=False)


def test_shared_experts_do_not_count_in_the_mean_of_their_layer():
    shared = replace(saliency_of_scores([[90.0, 1.0, 3.0], [5.0, 2.0, 8.0]]), num_shared=(1, 0))
    # Over the means 2 (of the routed ones) and 5: 45, 0.5, 1.5 and 1, 0.4, 1.6.
    ranks = rank_sums([shared], "ean", model_wide=True)
    assert ranks.tolist() == [[1, 5, 3], [4, 6, 2]]
