"""A compression plan: experts that go one after another, what each step cost, as a table and as an expert list."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.output import write_bytes
from experts.selection.expert_list import ExpertList

PLAN_FILE = "compression_plan.csv"


@dataclass(frozen=True)
class Removal:
    """One expert that goes; numbers are those of the model before any step.

    Attributes:
        layer: MoE-layer ordinal.
        expert: that goes.
        into: the expert of the layer that it is merged into; None where it is pruned.
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
class Step:
    """A removal that was taken, and what was measured.

    Attributes:
        removal: what goes.
        decoder_layer: index of the decoder layer.
        weight_cosine: between the two experts of a merge as they were then; None for a pruned expert.
        jaccard: of the tokens that visit the two, likewise.
        saliency_rank: of the expert that goes, among all experts of the model; 1 is the best.
        perplexity: on held-out text after the step.
        perplexity_loss: by how much the step raised it.
        other: the removal that was measured, too, and was worse; None where there was none.
        other_perplexity: after that one instead; None where there was none.
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

    def row(self, number: int) -> dict[str, Any]:
        """The step as plain values, by column of the table."""
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
        }


COLUMNS = tuple(Step(Removal(0, 0), 0, None, None, 1, 1, 0).row(1))


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """The steps in order.

    Attributes:
        steps: one per expert that goes.
        ranks: float64 ``[L, E]``, ranks by saliency among all experts of the model, NaN where absent; 1 is the best.
        perplexity_before: on held-out text.
    """

    steps: Sequence[Step]
    ranks: np.ndarray
    perplexity_before: float

    @property
    def perplexity_after(self) -> float:
        """On held-out text, after all steps."""
        return self.steps[-1].perplexity if self.steps else self.perplexity_before

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The steps as plain values; steps count from 1."""
        return [step.row(number) for number, step in enumerate(self.steps, start=1)]

    def expert_list(self, source: dict[str, Any]) -> ExpertList:
        """What happens to every expert: the steps' actions, and ``keep``."""
        actions = np.where(np.isnan(self.ranks), "", "keep").astype("<U5")
        for step in self.steps:
            actions[step.removal.layer, step.removal.expert] = step.removal.action
        filters = {"min_rank": None, "max_rank": None, "n_prune": len(self.steps)}
        return ExpertList(self.ranks, actions, source, filters)


def write_plan(plan: CompressionPlan, path: Path) -> None:
    """Write the steps as CSV, in one step; a cell without a value is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(plan.rows)
    write_bytes(Path(path), text.getvalue().encode())
