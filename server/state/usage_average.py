"""Exponential moving average of expert usage over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from experts.graph.edits import AddEdge, Edit, RemoveEdge


@dataclass
class UsageAverage:
    """Usage counts combined over clients and averaged over rounds.

    Attributes:
        counts: per layer float64 ``[E, E]``; empty before the first round.
    """

    counts: list[np.ndarray] = field(default_factory=list)

    def add(self, total: Sequence[np.ndarray], *, decay: float) -> None:
        """Add the counts of a round.

        Args:
            total: combined counts, per layer ``[E, E]``; empty: the average stays as it is.
            decay: weight of earlier rounds, 0 to 1.
        """
        if not total:
            return
        past = self.counts or [np.zeros_like(counts) for counts in total]
        weight = decay if self.counts else 0.0
        self.counts = [weight * old + (1 - weight) * new for old, new in zip(past, total, strict=True)]

    def reset(self, edits: Sequence[Edit]) -> None:
        """Set the count of each pair with an edited edge to the mean over its layer's pairs.

        The traversals of an existing edge and the demand for a missing one are not comparable.
        """
        for edit in edits:
            if isinstance(edit, AddEdge | RemoveEdge):
                counts = self.counts[edit.layer]
                pairs = np.triu_indices(len(counts), 1)
                counts[edit.p, edit.q] = counts[pairs].mean()

    def renumber(self, origins: Sequence[np.ndarray]) -> None:
        """Select and reorder experts after a plan of edits; counts of new ones are zero.

        Args:
            origins: per layer int64 ``[E']``, number of each expert before the plan; -1: a new one.
        """
        if self.counts:
            self.counts = [
                counts[np.ix_(origin, origin)] * np.outer(origin >= 0, origin >= 0)
                for counts, origin in zip(self.counts, origins, strict=True)
            ]
