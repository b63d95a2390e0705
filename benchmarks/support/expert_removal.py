"""Perplexity of an MoE without a quarter and a half of its experts: pruned by saliency or at random, or merged.

There is no training after the removal. The experts to keep are chosen on calibration text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from configs.choices import Metric
from experts.saliency.measures import Saliency
from experts.selection.rules import SelectionRules, select_experts
from federated.data.blocks import Blocks
from models.moe.merge import Batch, MergeOptions, merge_experts
from models.moe.remove import keep_experts
from models.moe.saliency_collection import collect_saliency
from models.runtime.perplexity import evaluate_loss

# Merging with the default options and with others, by name of the arm.
PLANS = {
    "merge": MergeOptions(),
    "merge, average similarity": MergeOptions(similarity="average"),
    "merge, REAM": MergeOptions(weights="mean-saliency", refit=False),
    "merge, REAM by all tokens, refitted": MergeOptions(weights="saliency"),
    "merge, plain average": MergeOptions(alignment="none", weights="plain", refit=False),
}
RANDOM_DRAWS = 3


@dataclass(frozen=True)
class Text:
    """Blocks of all domains together.

    Attributes:
        train: training blocks.
        calibration: training blocks for saliency and merging, as batches with token masks.
        valid: held-out blocks.
    """

    train: Blocks
    calibration: list[Batch]
    valid: Blocks


def compare(model: PreTrainedModel, text: Text, seed: int) -> dict[str, Any]:
    """Held-out perplexity with all experts, and by arm without a quarter and a half of them.

    Args:
        model: left unchanged.
        text: calibration and held-out text.
        seed: seed of the random choices; ``random`` is the geometric mean over ``RANDOM_DRAWS`` of them.
    """
    saliency = collect_saliency(model, text.calibration)
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = {"all": perplexity(model, text)}
    for share, name in ((4, "quarter"), (2, "half")):
        kept = {metric: kept_by(saliency, metric, share) for metric in Metric}
        arms = {metric: pruned_perplexity(model, text, keep_map) for metric, keep_map in kept.items()}
        draws = [
            pruned_perplexity(model, text, random_experts(saliency, share, rng)) for _ in range(RANDOM_DRAWS)
        ]
        arms["random"] = math.exp(fmean(map(math.log, draws)))
        for plan_name, plan in PLANS.items():
            merged = copy.deepcopy(model)
            merge_experts(merged, text.calibration, kept["reap"], plan)
            arms[plan_name] = perplexity(merged, text)
        result[name] = arms
    return result


def kept_by(saliency: Saliency, metric: str, share: int) -> dict[int, np.ndarray]:
    """Experts of each layer to keep by saliency, when one in ``share`` is removed."""
    return select_experts([saliency], metric, SelectionRules(n_prune=saliency.num_experts // share)).keep_map


def random_experts(saliency: Saliency, share: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Experts of each layer to keep, drawn uniformly, when one in ``share`` is removed."""
    return {
        layer: np.sort(rng.permutation(count)[: count - count // share])
        for layer, count in enumerate(saliency.experts_per_layer)
    }


def perplexity(model: PreTrainedModel, text: Text) -> float:
    """Token-weighted perplexity on the held-out text."""
    return evaluate_loss(model, text.valid.input_ids, text.valid.labels).perplexity


def pruned_perplexity(model: PreTrainedModel, text: Text, keep_map: Mapping[int, np.ndarray]) -> float:
    """Held-out perplexity with only the experts of ``keep_map``."""
    return perplexity(keep_experts(copy.deepcopy(model), keep_map), text)
