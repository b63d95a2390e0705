"""Compression trace: the measured removals of a compression in order, executable and as an expert list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experts.selection.expert_list import ExpertList


@dataclass(frozen=True)
class Removal:
    """Removal of one expert; numbers are those of the model before the first step.

    Attributes:
        layer: MoE-layer ordinal.
        expert: removed expert.
        into: expert of the layer that it is merged into; None where it is pruned.
    """

    layer: int
    expert: int
    into: int | None = None

    @property
    def action(self) -> str:
        """``merge`` or ``prune``."""
        return "prune" if self.into is None else "merge"

    def __str__(self) -> str:
        target = "" if self.into is None else f" into {self.into}"
        return f"{self.action} {self.layer}:{self.expert}{target}"


@dataclass(frozen=True)
class Averaging:
    """Weighted average of a merged pair.

    Attributes:
        weight_into: weight of the expert that stays, not normalized.
        weight_expert: weight of the removed expert.
        alignment: of the removed expert's neurons (see ``experts.merging.alignment.align_neurons``).
    """

    weight_into: float
    weight_expert: float
    alignment: str


@dataclass(frozen=True)
class Step:
    """Executed removal and its measurements.

    Attributes:
        removal: the removal.
        decoder_layer: index of the decoder layer.
        weight_cosine: cosine of the two experts of a merge at that step; None for a pruned expert.
        jaccard: Jaccard index of the tokens routed to the two, likewise.
        saliency_rank: rank of the removed expert among all experts of the model; 1 is the best.
        perplexity: on held-out text after the step.
        perplexity_loss: increase of the perplexity by the step.
        other: removal that was measured at this step and had the higher perplexity; None without one.
        other_perplexity: perplexity after ``other`` instead; None without one.
        averaging: of a merge; None for a pruned expert.
    """

    removal: Removal
    decoder_layer: int
    weight_cosine: float | None
    jaccard: float | None
    saliency_rank: float
    perplexity: float
    perplexity_loss: float
    other: Removal | None = None
    other_perplexity: float | None = None
    averaging: Averaging | None = None

    def row(self, number: int) -> dict[str, Any]:
        """Plain values of the step by column of the trace file."""
        average = self.averaging
        return {
            "step": number,
            "layer": self.removal.layer,
            "decoder_layer": self.decoder_layer,
            "action": self.removal.action,
            "expert": self.removal.expert,
            "into": self.removal.into,
            "weight_cosine": self.weight_cosine,
            "jaccard": self.jaccard,
            "saliency_rank": self.saliency_rank,
            "perplexity": self.perplexity,
            "perplexity_loss": self.perplexity_loss,
            "other": None if self.other is None else str(self.other),
            "other_perplexity": self.other_perplexity,
            "weight_into": None if average is None else average.weight_into,
            "weight_expert": None if average is None else average.weight_expert,
            "alignment": None if average is None else average.alignment,
        }


@dataclass(frozen=True, eq=False)
class CompressionTrace:
    """Measured steps in order.

    Attributes:
        steps: one per removed expert.
        ranks: float64 ``[L, E]``, saliency ranks among all experts of the model, NaN where absent; 1 is the best.
        perplexity_before: on held-out text.
    """

    steps: Sequence[Step]
    ranks: np.ndarray
    perplexity_before: float

    @property
    def perplexity_after(self) -> float:
        """Perplexity on held-out text after all steps."""
        return self.steps[-1].perplexity if self.steps else self.perplexity_before

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Plain values of the steps, numbered from 1."""
        return [step.row(number) for number, step in enumerate(self.steps, start=1)]

    def expert_list(self, source: dict[str, Any]) -> ExpertList:
        """Expert list with the action of every step, and ``keep`` for the other experts."""
        actions = np.where(np.isnan(self.ranks), "", "keep").astype("<U5")
        for step in self.steps:
            actions[step.removal.layer, step.removal.expert] = step.removal.action
        filters = {"min_rank": None, "max_rank": None, "n_prune": len(self.steps)}
        return ExpertList(self.ranks, actions, source, filters)
