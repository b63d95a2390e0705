"""Reports of a round's clients for the detection of drift: held-out losses and visits per routed expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.graph.expert_graph import ExpertGraph
from server.rounds.validation import RoundReplies, reply_loss
from server.state.client_drift import Observation
from server.strategies.growth import expert_loads


def drift_reports(replies: RoundReplies, graph: ExpertGraph) -> list[Observation]:
    """Loss and visits that each accepted client reports.

    Args:
        replies: validated answers.
        graph: graph that the clients trained on.
    """
    return [
        Observation(
            each.reply.partition,
            reply_loss(each.reply, "valid"),
            routed_visits(each.usage, graph, each.reply.residents),
        )
        for each in replies.accepted
    ]


def routed_visits(
    usage: Sequence[np.ndarray], graph: ExpertGraph, residents: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Visits of each routed expert per layer, float64 ``[E - shared]``; NaN for experts that the client did not hold.

    Args:
        usage: usage counts, per layer ``[E, E]``; empty for a method without any. Demand for absent edges is no visit.
        graph: graph that the counts belong to.
        residents: per layer bool ``[E]``.
    """
    if not usage:
        return []
    layers = zip(expert_loads(graph, usage), residents, graph.shared_per_layer, strict=True)
    return [np.where(held, load, np.nan)[shared:] for load, held, shared in layers]
