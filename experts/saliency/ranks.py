"""Ranks of experts by saliency, comparable between texts and metrics, unlike raw sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from experts.saliency.measures import Saliency, check_same_model


def rank_sums(saliencies: Sequence[Saliency], metric: str, *, model_wide: bool) -> np.ndarray:
    """Sum of ranks over several saliencies, ``[L, E]``; rank 1 is the best, ties share their mean, NaN where absent.

    Experts are ranked within their layer, or, ``model_wide``, among all experts of the model by score over the mean
    score of the routed experts of their layer: norms grow with depth, so that raw scores would remove the experts of
    early layers. Shared experts have ranks, too, but no rule removes them.

    Raises:
        UserError: no files, files of different models, an unknown metric.
    """
    check_same_model(saliencies)
    return np.sum([_ranks(saliency, metric, model_wide) for saliency in saliencies], axis=0)


def _ranks(saliency: Saliency, metric: str, model_wide: bool) -> np.ndarray:
    scores = saliency.scores(metric)
    if model_wide:
        relative = over_layer_mean(scores, saliency.routed)
        return rankdata(-relative, axis=None, nan_policy="omit").reshape(scores.shape)
    return rankdata(-scores, axis=1, nan_policy="omit")


def over_layer_mean(scores: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Scores ``[L, E]`` divided by the mean magnitude of those ``among`` (bool ``[L, E]``) in their layer.

    A layer whose mean is zero, or that has none among them, stays as it is.
    """
    sizes = np.where(among, np.abs(scores), 0.0).sum(axis=1, keepdims=True)
    means = sizes / np.maximum(among.sum(axis=1, keepdims=True), 1)
    return scores / np.where(means == 0, 1.0, means)
