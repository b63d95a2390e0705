"""Greedy removal of experts one at a time, by the measured perplexity after each candidate.

Every step measures two candidates: pruning the least salient expert of the model (after REAP, arXiv:2510.13999), and
merging the most similar pair of a layer (after REAM, arXiv:2604.04356); it takes the one of lower perplexity. A
rejected pair yields to the next most similar one, so that a similar but costly pair is not measured in every step
(see ``RemovalCandidates.to_merge``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from configs.choices import Alignment, Metric, check_choice
from configs.errors import UserError
from experts.merging.similarity import PairLikeness, weight_cosine, weight_cosines
from experts.saliency.measures import Saliency
from experts.saliency.ranks import rank_sums
from experts.selection.compression_trace import Averaging, CompressionTrace, Removal, Step
from experts.selection.removal_candidates import RemovalCandidates
from experts.selection.rules import SelectionRules, free_experts, select_experts
from models.moe.expert_overlap import collect_overlap
from models.moe.layers import MoELayer
from models.moe.remove import set_counts
from models.moe.replay import execute_removal
from models.moe.saliency_collection import Batch
from models.moe.views import moe_layers, replace_block

Measure = Callable[[PreTrainedModel], float]
OnStep = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class PlanOptions:
    """Options of ``plan_compression``.

    Attributes:
        selection: number of experts to remove in the whole model, the minimum per layer, ignored and protected experts.
        metric: saliency metric of the ranks.
        alignment: alignment of neurons, for weight cosines and averages (see ``experts.merging.alignment``).
        max_group_size: largest number of experts merged into one.
    """

    selection: SelectionRules
    metric: str = "reap"
    alignment: str = "centroid"
    max_group_size: int = 4

    def __post_init__(self) -> None:
        check_choice("`metric`", self.metric, Metric)
        check_choice("`alignment`", self.alignment, Alignment)
        if not self.selection.model_wide or self.selection.action != "prune":
            raise UserError("expected a selection that prunes over the whole model, got another")
        if self.max_group_size < 1:
            raise UserError(f"expected a largest group size of at least 1, got {self.max_group_size}")


@torch.no_grad()
def plan_compression(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    measure: Measure,
    options: PlanOptions,
    *,
    provenance: dict | None = None,
    on_step: OnStep = lambda stage, done, total: None,
) -> CompressionTrace:
    """Remove experts of a model one after another, in place, and record the perplexity after each step.

    Saliency and routed tokens are collected once, on the given model; weight cosines are updated after merges. A merged
    expert is the average of its members, weighted by saliency summed over tokens, with the router row of the most
    salient one. ``models.moe.replay`` executes the recorded steps on another copy of the model.

    Args:
        model: any with experts (see ``models.moe.views``), in memory. Afterwards layers may differ in their number of
            experts, also where the format on disk holds one number.
        batches: calibration text, ``(input_ids [B, S], token_mask [B, S] bool)``.
        measure: function from a model to its perplexity on held-out text.
        options: number of removals, ranks and merging.
        provenance: provenance of the saliency, such as ``model_fingerprint``, which expert maps are compared with.
        on_step: called with a stage, its steps done and their total (None: unknown).

    Raises:
        UserError: more removals than the rules allow, maps of another model, no text, a model without experts.
    """
    model.eval()
    _check(moe_layers(model), options, provenance)
    if getattr(model.config, "output_router_logits", False):
        # The load-balancing loss that this key enables needs equally many experts in every layer.
        model.config.output_router_logits = False
    saliency, visits = collect_overlap(
        model, batches, on_batch=lambda done: on_step("collecting saliency and visits, batches", done, None)
    )
    before = measure(model)
    if not math.isfinite(before):
        raise UserError(f"expected a finite perplexity on held-out text, got {before}; check model and data")
    ranks = rank_sums([saliency], options.metric, model_wide=True)
    total, steps = options.selection.n_prune, list[Step]()
    if total:
        likeness = _likeness(moe_layers(model), visits, options.alignment, on_step)
        planner = _Planner(model, saliency, ranks, likeness, measure, options)
        while len(steps) < total:
            steps.append(planner.step(steps[-1].perplexity if steps else before))
            on_step("planning steps", len(steps), total)
    set_counts(model)
    return CompressionTrace(steps, ranks, before)


class _Planner:
    """State of the greedy removal: the shrinking model, candidates, averaging weights and similarities."""

    def __init__(
        self,
        model: PreTrainedModel,
        saliency: Saliency,
        ranks: np.ndarray,
        likeness: list[PairLikeness],
        measure: Measure,
        options: PlanOptions,
    ) -> None:
        self._model, self._ranks, self._measure, self._options = model, ranks, measure, options
        self._shares, self._likeness = saliency.reap_sum.copy(), likeness
        self._last_loss = -math.inf
        self._candidates = RemovalCandidates(
            ranks,
            free_experts(ranks, saliency.routed, options.selection),
            saliency.routed,
            min_experts_per_layer=options.selection.min_experts_per_layer,
            max_group_size=options.max_group_size,
        )

    def step(self, before: float) -> Step:
        """Measure both candidates and execute the one of lower perplexity; pruning on ties."""
        offered = [
            self._candidates.to_prune(),
            self._candidates.to_merge([each.likeness_EE for each in self._likeness], self._last_loss),
        ]
        tried = [(removal, *self._try(removal)) for removal in offered if removal is not None]
        taken, *rest = sorted(tried, key=lambda trial: math.inf if math.isnan(trial[1]) else trial[1])
        removal, perplexity, block = taken
        other, other_perplexity = rest[0][:2] if rest else (None, None)
        result = Step(
            removal,
            self._layer(removal.layer).decoder,
            *self._pair(removal),
            saliency_rank=float(self._ranks[removal.layer, removal.expert]),
            perplexity=perplexity,
            perplexity_loss=perplexity - before,
            other=other,
            other_perplexity=other_perplexity,
            averaging=self._averaging(removal),
        )
        self._last_loss = result.perplexity_loss
        self._take(removal, block)
        for refused, refused_perplexity, _ in rest:
            self._candidates.refuse(refused, refused_perplexity - before)
        return result

    def _try(self, removal: Removal) -> tuple[float, nn.Module]:
        """Perplexity after a removal, and the block after it; the model stays unchanged."""
        block = self._layer(removal.layer).block
        replace_block(self._model, self._layer(removal.layer), copy.deepcopy(block))
        try:
            layer, left = self._layer(removal.layer), self._left(removal.layer)
            execute_removal(layer, left, removal, self._averaging(removal))
            return self._measure(self._model), self._layer(removal.layer).block
        finally:
            replace_block(self._model, self._layer(removal.layer), block)

    def _averaging(self, removal: Removal) -> Averaging | None:
        if removal.into is None:
            return None
        shares = self._shares[removal.layer]
        return Averaging(float(shares[removal.into]), float(shares[removal.expert]), self._options.alignment)

    def _take(self, removal: Removal, block: nn.Module) -> None:
        replace_block(self._model, self._layer(removal.layer), block)
        self._candidates.take(removal)
        if removal.into is not None:
            shares = self._shares[removal.layer]
            shares[removal.into] += shares[removal.expert]
            cosines = self._cosines(removal.layer, removal.into)
            self._likeness[removal.layer].merge(removal.into, removal.expert, cosines)

    def _cosines(self, ordinal: int, expert: int) -> dict[int, float]:
        """Weight cosine of an expert with each other one left, by original number."""
        layer, left = self._layer(ordinal), self._left(ordinal)
        merged = layer.read_numpy(left.index(expert))
        return {
            other: weight_cosine(layer.read_numpy(row), merged, self._options.alignment)
            for row, other in enumerate(left)
            if other != expert
        }

    def _pair(self, removal: Removal) -> tuple[float | None, float | None]:
        """Weight cosine and Jaccard index of a merged pair; None for pruning."""
        if removal.into is None:
            return None, None
        likeness, place = self._likeness[removal.layer], (removal.expert, removal.into)
        return float(likeness.cosine_EE[place]), float(likeness.jaccard_EE[place])

    def _left(self, ordinal: int) -> list[int]:
        """Original numbers of the experts that a layer has left, ascending."""
        return np.flatnonzero(self._candidates.left_LE[ordinal]).tolist()

    def _layer(self, ordinal: int) -> MoELayer:
        return moe_layers(self._model)[ordinal]


def _likeness(
    layers: list[MoELayer], visits: list[np.ndarray], alignment: str, on_step: OnStep
) -> list[PairLikeness]:
    found = []
    for layer, visits_EB in zip(layers, visits, strict=True):
        experts = [layer.read_numpy(expert) for expert in range(layer.num_experts)]
        found.append(PairLikeness(weight_cosines(experts, alignment), visits_EB))
        on_step("comparing experts, layers", len(found), len(layers))
    return found


def _check(layers: list[MoELayer], options: PlanOptions, provenance: dict | None) -> None:
    """Refuse options that do not fit the model, before any text is read."""
    counts = [layer.num_experts for layer in layers]
    blank = np.full((len(counts), max(counts)), np.nan)
    for row, number in zip(blank, counts, strict=True):
        row[:number] = 0
    decoders = [layer.decoder for layer in layers]
    shared = tuple(layer.num_shared for layer in layers)
    saliency = Saliency(blank, blank, blank, blank, blank, decoders, provenance or {}, shared)
    select_experts([saliency], options.metric, options.selection)
