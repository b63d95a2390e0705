"""A merge: the server edits the graph by how clients used it, and takes edits back that cost too much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.graph.edge_edits import Edit, propose_edits
from federated.data.blocks import Blocks
from models.runtime.perplexity import evaluate_loss
from server.model.global_model import GlobalModel
from server.reporting.run_log import MergeRecord


class UsageAverage:
    """Usage summed over clients, averaged over rounds.

    Args:
        decay: weight of the past, 0 to 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.counts: list[np.ndarray] = []

    def add(self, clients: Sequence[Sequence[np.ndarray]]) -> None:
        """Add a round: per client, per layer ``[E, E]``."""
        if not clients:
            return
        total = [np.sum(layer, axis=0).astype(np.float64) for layer in zip(*clients, strict=True)]
        past = self.counts or [np.zeros_like(counts) for counts in total]
        weight = self._decay if self.counts else 0.0
        self.counts = [weight * old + (1 - weight) * new for old, new in zip(past, total, strict=True)]

    def forget(self, edits: Sequence[Edit]) -> None:
        """Give pairs whose edge came or went the layer's mean count: what was counted meant something else."""
        for edit in edits:
            counts = self.counts[edit.layer]
            pairs = np.triu_indices(len(counts), 1)
            counts[edit.p, edit.q] = counts[pairs].mean()


def merge(
    server: GlobalModel,
    usage: UsageAverage,
    *,
    server_round: int,
    rho_max: int,
    validation: Blocks | None,
    max_drift: float,
) -> MergeRecord:
    """Edit the graph of the global model, at most ``rho_max`` edits.

    With validation text the loss is measured before and after; ``gamma_hat`` is the absolute change per edit, and a
    merge that raises the loss by more than ``max_drift`` nats per token is not made.
    """
    margin = max(1.0, server.model.config.experts_per_token / 2)
    edits = propose_edits(server.graph, usage.counts, rho_max, margin=margin) if usage.counts else []
    if not edits or validation is None:
        _make(server, usage, edits)
        return MergeRecord(server_round, rho_max, _as_dicts(edits))
    before = _loss(server, validation)
    with server.trying(edits):
        after = _loss(server, validation)
    gamma = abs(after - before) / len(edits)
    if not after - before <= max_drift:  # a loss that is no number is too much as well
        return MergeRecord(server_round, rho_max, [], before, after, gamma)
    _make(server, usage, edits)
    return MergeRecord(server_round, rho_max, _as_dicts(edits), before, after, gamma)


def _make(server: GlobalModel, usage: UsageAverage, edits: list[Edit]) -> None:
    if edits:
        server.edit(edits)
        usage.forget(edits)


def _loss(server: GlobalModel, validation: Blocks) -> float:
    return evaluate_loss(server.model, validation.input_ids, validation.labels).mean


def _as_dicts(edits: Sequence[Edit]) -> list[dict]:
    return [edit.as_dict() for edit in edits]
