"""Ranks of experts by saliency, comparable between texts and metrics, unlike raw sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from experts.saliency.measures import Saliency, check_same_model


def rank_sums(saliencies: Sequence[Saliency], metric: str, *, model_wide: bool) -> np.ndarray:
    """Sum of ranks over several saliencies, ``[L, E]``; rank 1 is the best, ties share their mean, NaN where absent.

    Experts are ranked within their layer, or, ``model_wide``, among all experts of the model by score over the mean
    score of their layer: norms grow with depth, so that raw scores would remove the experts of early layers.

    Raises:
        UserError: no files, files of different models, an unknown metric.
    """
    check_same_model(saliencies)
    return np.sum([_ranks(saliency.scores(metric), model_wide) for saliency in saliencies], axis=0)


def _ranks(scores: np.ndarray, model_wide: bool) -> np.ndarray:
    if model_wide:
        return rankdata(-over_layer_mean(scores), axis=None, nan_policy="omit").reshape(scores.shape)
    return rankdata(-scores, axis=1, nan_policy="omit")


def over_layer_mean(scores: np.ndarray) -> np.ndarray:
    """Scores ``[L, E]`` divided by the mean magnitude of their layer; a layer of zeros stays zero."""
    means = np.nanmean(np.abs(scores), axis=1, keepdims=True)
    return scores / np.where(means == 0, 1.0, means)
