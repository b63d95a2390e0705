"""Scanning for experts that stand out on one kind of prompts, by how often and how strongly they answer them.

Differential routing frequency tells safety-critical experts apart in SAFEx (Lai et al. 2025, arXiv:2506.17368);
differential activation adds experts that are visited alike but say more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from experts.saliency.expert_map import ExpertMap, flag_experts
from experts.saliency.measures import Saliency, check_same_model


@dataclass(frozen=True, eq=False)
class ExpertScan:
    """How the experts of a model treat two sets of prompts. All arrays are float64 ``[L, E]``, NaN for no expert.

    Attributes:
        frequency: share of the tokens that visit the expert, on the prompts of interest less on the others.
        activation: mean of gate times output norm over its visits, on the prompts of interest less on the others, over
            their sum: -1 to 1, 0 where it is never visited.
        scores: both, each in standard deviations over its layer, weighted.
    """

    frequency: np.ndarray
    activation: np.ndarray
    scores: np.ndarray


def scan_experts(prompts: Saliency, others: Saliency, *, frequency_weight: float = 0.5) -> ExpertScan:
    """Compare what experts do on prompts of interest with what they do on others.

    Args:
        prompts: saliency of the model on the prompts of interest.
        others: of the same model on the prompts that they are compared with.
        frequency_weight: of the frequency in the score, 0 to 1; the activation has the rest.

    Raises:
        UserError: saliency of different models, or a weight outside 0 to 1.
    """
    check_same_model([prompts, others])
    check_scan_options(frequency_weight=frequency_weight)
    frequency = _visit_share(prompts) - _visit_share(others)
    one, other = prompts.scores("reap"), others.scores("reap")
    total = one + other
    activation = (one - other) / np.where(total == 0, 1.0, total)
    scores = frequency_weight * _standardized(frequency) + (1 - frequency_weight) * _standardized(activation)
    return ExpertScan(frequency, activation, scores)


def map_of_scan(scan: ExpertScan, kind: str, *, quantile: float, provenance: dict) -> ExpertMap:
    """Flag, in each layer, the experts whose score lies in its top share and above the layer's mean.

    Args:
        scan: of ``scan_experts``.
        kind: ``safety`` or ``domain``.
        quantile: of a layer's scores, from which an expert is flagged, 0 to below 1.
        provenance: where the scan comes from.

    Raises:
        UserError: an unknown kind, or a quantile out of range.
    """
    check_scan_options(quantile=quantile)
    # Scores are centered on their layer: at 0 an expert treats both sets as the layer does.
    thresholds = np.maximum(np.nanquantile(scan.scores, quantile, axis=1), np.finfo(np.float64).tiny)
    return ExpertMap(kind, scan.scores, thresholds, flag_experts(scan.scores, thresholds), provenance)


def check_scan_options(*, quantile: float = 0.0, frequency_weight: float = 0.0) -> None:
    """Refuse a quantile outside 0 to below 1, and a weight outside 0 to 1."""
    if not 0 <= quantile < 1:
        raise UserError(f"expected a quantile of at least 0 and below 1, got {quantile}")
    if not 0 <= frequency_weight <= 1:
        raise UserError(f"expected a frequency weight between 0 and 1, got {frequency_weight}")


def _visit_share(saliency: Saliency) -> np.ndarray:
    """Share of a layer's tokens that visit each expert."""
    tokens = saliency.provenance.get("tokens")
    if not tokens:
        raise UserError("expected saliency that tells its number of tokens, got none; collect it again")
    return saliency.freq / tokens


def _standardized(values: np.ndarray) -> np.ndarray:
    """In standard deviations from the mean of the layer; 0 where all experts of a layer are alike."""
    spread = np.nanstd(values, axis=1, keepdims=True)
    return (values - np.nanmean(values, axis=1, keepdims=True)) / np.where(spread < 1e-12, 1.0, spread)
