"""Reports of saliency files: best, worst and idle experts per layer, and rank differences of two files."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import spearmanr

from configs.errors import UserError
from experts.saliency.measures import Saliency
from experts.saliency.ranks import rank_sums


def layer_summaries(saliency: Saliency, metric: str, *, top: int = 4) -> list[dict[str, Any]]:
    """Summary of each layer: ordinal, decoder index, ``top`` best and worst experts, experts without routed tokens.

    ``best`` starts with the best, ``worst`` with the worst, both without the first ``shared`` experts, which every
    token visits; ``scores`` holds all scores by expert.
    """
    scores = saliency.scores(metric)
    summaries = []
    for layer, number in enumerate(saliency.experts_per_layer):
        routed = np.flatnonzero(saliency.routed[layer])
        order = routed[np.argsort(-scores[layer, routed], kind="stable")]
        summaries.append(
            {
                "layer": layer,
                "decoder_layer": int(saliency.decoder_layers[layer]),
                "experts": number,
                "shared": number - len(routed),
                "best": order[:top].tolist(),
                "worst": order[::-1][:top].tolist(),
                "never_routed": np.flatnonzero(saliency.freq[layer, :number] == 0).tolist(),
                "scores": scores[layer, :number].tolist(),
            }
        )
    return summaries


def compare_layers(first: Saliency, second: Saliency, metric: str, *, top: int = 4) -> list[dict[str, Any]]:
    """Compare the ranks of two files layer by layer; their models may differ but for the shape.

    ``spearman`` is the rank correlation (None where a file has equal ranks only), ``bottom_quarter_overlap`` the share
    of the worst quarter (at least one expert) common to both, and ``largest_changes`` lists up to ``top`` experts of
    largest rank change.

    Raises:
        UserError: another number of layers or experts.
    """
    if first.experts_per_layer != second.experts_per_layer:
        raise UserError(
            f"expected two files with the same experts per layer, got {first.experts_per_layer} and "
            f"{second.experts_per_layer}"
        )
    ranks = [rank_sums([saliency], metric, model_wide=False) for saliency in (first, second)]
    return [
        {
            "layer": layer,
            "decoder_layer": int(first.decoder_layers[layer]),
            **_compare(ranks[0][layer, :number], ranks[1][layer, :number], top),
        }
        for layer, number in enumerate(first.experts_per_layer)
    ]


def _compare(first: np.ndarray, second: np.ndarray, top: int) -> dict[str, Any]:
    quarter = max(1, len(first) // 4)
    bottoms = [set(np.argsort(-ranks, kind="stable")[:quarter].tolist()) for ranks in (first, second)]
    moved = np.abs(first - second)
    largest = [expert for expert in np.argsort(-moved, kind="stable")[:top].tolist() if moved[expert] > 0]
    return {
        "spearman": _spearman(first, second),
        "bottom_quarter_overlap": len(bottoms[0] & bottoms[1]) / quarter,
        "largest_changes": [
            {"expert": expert, "rank_before": float(first[expert]), "rank_after": float(second[expert])}
            for expert in largest
        ],
    }


def _spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    if min(np.ptp(first), np.ptp(second)) == 0:
        return None
    return float(spearmanr(first, second).statistic)
