"""Result of one run of a federated method: bytes and losses after each round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from benchmarks.support.quality.settings import Rate


@dataclass(frozen=True)
class Run:
    """Result of a job.

    Attributes:
        method: see ``Job``.
        seed: see ``Job``.
        learning_rate: see ``Job``.
        trajectory: ``round``, bytes so far ``up`` and ``down``, and ``losses`` by client, at the start and after each
            round.
        seconds: wall time.
        edits: graph edits of a run of ours.
        keys: see ``Job``.
        peak_bytes: peak resident memory by process: ``server``, with all clients except those of ours in a process of
            their own, and ``client``.
        client_seconds: part of ``seconds`` that clients took, of a run of ours.
    """

    method: str
    seed: int
    learning_rate: Rate
    trajectory: list[dict[str, Any]]
    seconds: float = 0.0
    edits: int = 0
    keys: Mapping[str, Any] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    client_seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean over clients of the final loss, nats per token."""
        return mean_loss(self.trajectory[-1])

    def worst_change(self, target: float) -> float | None:
        """Largest ratio over clients of perplexity to initial perplexity at mean loss ``target``; None if not reached.

        Client losses are interpolated between the rounds before and after: runs cross the target by different amounts,
        and a run that goes further below it would have a better worst client.
        """
        after = self.reached(target)
        if after is None:
            return None
        start, before = self.trajectory[0], self.trajectory[max(self.trajectory.index(after) - 1, 0)]
        passed = mean_loss(before) - mean_loss(after)
        share = (mean_loss(before) - target) / passed if passed > 0 else 0.0
        return max(
            math.exp((1 - share) * before["losses"][name] + share * loss - start["losses"][name])
            for name, loss in after["losses"].items()
        )

    def reached(self, target: float) -> dict[str, Any] | None:
        """First entry of the trajectory with a mean loss of at most ``target``; None if there is none."""
        return next((entry for entry in self.trajectory if mean_loss(entry) <= target), None)


def mean_loss(entry: Mapping[str, Any]) -> float:
    """Mean over clients of the loss in an entry of a trajectory, i.e. the log of the geometric mean perplexity."""
    return fmean(entry["losses"].values())
