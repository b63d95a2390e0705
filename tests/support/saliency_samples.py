"""Made-up saliency and expert maps, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experts.saliency.expert_map import ExpertMap, flag_experts
from experts.saliency.measures import Saliency


def saliency_of_scores(scores: Sequence[Sequence[float]], **provenance: Any) -> Saliency:
    """Every metric of an expert is its score; layers may have different numbers of experts."""
    array = padded(scores)
    ones = np.where(np.isnan(array), np.nan, 1.0)
    return Saliency(array, ones, array, array, array, list(range(len(array))), provenance)


def random_saliency(experts_per_layer: Sequence[int], seed: int = 0, **provenance: Any) -> Saliency:
    """Figures as a text leaves them: counts, and sums over that many tokens."""
    rng = np.random.default_rng(seed)
    counts = padded([rng.permutation(99)[:number] + 1 for number in experts_per_layer])
    sums = [counts * rng.uniform(0.1, 2.0, counts.shape) for _ in range(3)]
    layers = [2 * layer + 1 for layer in range(len(counts))]
    return Saliency(sums[0], counts, sums[1], counts, sums[2], layers, provenance)


def map_of(kind: str, experts_per_layer: Sequence[int], flagged: dict[int, list[int]]) -> ExpertMap:
    """A map with a score of 1 where flagged, else 0."""
    scores = padded([np.zeros(number) for number in experts_per_layer])
    for layer, experts in flagged.items():
        scores[layer, experts] = 1.0
    thresholds = np.full(len(scores), 0.5)
    return ExpertMap(kind, scores, thresholds, flag_experts(scores, thresholds))


def padded(rows: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """Rows as float64 ``[L, E]``, short ones ending in NaN."""
    array = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array
