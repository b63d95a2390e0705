"""Scan for experts specific to one kind of prompts, by differential routing frequency and activation.

Differential routing frequency identifies safety-critical experts in SAFEx (Lai et al. 2025, arXiv:2506.17368);
differential activation adds experts of equal frequency but larger output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from experts.saliency.expert_map import ExpertMap, flag_experts
from experts.saliency.measures import Saliency, check_same_model


@dataclass(frozen=True, eq=False)
class ExpertScan:
    """Differences of the experts between two sets of prompts. All arrays are float64 ``[L, E]``, NaN for no expert.

    Attributes:
        frequency: share of the tokens routed to the expert, prompts of interest minus others.
        activation: mean gate times output norm over routed tokens, prompts of interest minus others, divided by their
            sum: -1 to 1; 0 for an expert that no token is routed to.
        scores: weighted sum of both, each standardized over the routed experts of its layer.
        routed: bool ``[L, E]``, all but the shared experts, which every token visits.
    """

    frequency: np.ndarray
    activation: np.ndarray
    scores: np.ndarray
    routed: np.ndarray


def scan_experts(prompts: Saliency, others: Saliency, *, frequency_weight: float = 0.5) -> ExpertScan:
    """Compare routing frequency and activation of experts on prompts of interest and on others.

    Args:
        prompts: saliency of the model on the prompts of interest.
        others: saliency of the same model on the prompts to compare with.
        frequency_weight: weight of the frequency in the score, 0 to 1; the activation has the rest.

    Raises:
        UserError: saliency of different models, or a weight outside 0 to 1.
    """
    check_same_model([prompts, others])
    check_scan_options(frequency_weight=frequency_weight)
    frequency = _visit_share(prompts) - _visit_share(others)
    one, other = prompts.scores("reap"), others.scores("reap")
    total = one + other
    activation = (one - other) / np.where(total == 0, 1.0, total)
    parts = [_standardized(values, prompts.routed) for values in (frequency, activation)]
    scores = frequency_weight * parts[0] + (1 - frequency_weight) * parts[1]
    return ExpertScan(frequency, activation, scores, prompts.routed)


def map_of_scan(scan: ExpertScan, kind: str, *, quantile: float, provenance: dict) -> ExpertMap:
    """Flag the routed experts of each layer whose score reaches a quantile of the layer and exceeds its mean.

    Args:
        scan: result of ``scan_experts``.
        kind: ``safety`` or ``domain``.
        quantile: quantile of a layer's scores, at least 0 and below 1.
        provenance: model and data of the scan.

    Raises:
        UserError: an unknown kind, or a quantile out of range.
    """
    check_scan_options(quantile=quantile)
    routed = np.where(scan.routed, scan.scores, np.nan)
    # Scores are centered within their layer: 0 is the layer's mean.
    least = np.finfo(np.float64).tiny
    thresholds = np.array(
        [
            max(np.quantile(row[among], quantile), least) if among.any() else least
            for row, among in zip(scan.scores, scan.routed, strict=True)
        ]
    )
    return ExpertMap(kind, scan.scores, thresholds, flag_experts(routed, thresholds), provenance)


def check_scan_options(*, quantile: float = 0.0, frequency_weight: float = 0.0) -> None:
    """Refuse a quantile below 0 or not below 1, and a weight outside 0 to 1."""
    if not 0 <= quantile < 1:
        raise UserError(f"expected a quantile of at least 0 and below 1, got {quantile}")
    if not 0 <= frequency_weight <= 1:
        raise UserError(f"expected a frequency weight between 0 and 1, got {frequency_weight}")


def _visit_share(saliency: Saliency) -> np.ndarray:
    """Share of the tokens routed to each expert, ``[L, E]``."""
    tokens = saliency.provenance.get("tokens")
    if not tokens:
        raise UserError("expected saliency with its number of tokens, got none; collect it again")
    return saliency.freq / tokens


def _standardized(values: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """Values standardized over the routed experts of their layer; 0 where these have no spread."""
    count = np.maximum(routed.sum(axis=1, keepdims=True), 1)
    centered = values - np.where(routed, values, 0.0).sum(axis=1, keepdims=True) / count
    spread = np.sqrt(np.where(routed, np.square(centered), 0.0).sum(axis=1, keepdims=True) / count)
    return centered / np.where(spread < 1e-12, 1.0, spread)
