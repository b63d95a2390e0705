"""Metrics of a server round, computed from its validated replies and the bytes of all answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experts.graph.expert_graph import ExpertGraph
from federated.wire.packed_stats import PackedStats
from server.reporting.run_log import ClientRecord, RoundRecord
from server.rounds.exchange import Answer
from server.rounds.validation import RoundReplies, held_out_loss, reply_loss
from server.state.drift import Drift
from server.state.run_history import RunHistory


def round_record(
    server_round: int,
    replies: RoundReplies,
    answers: Mapping[int, Answer],
    *,
    graph: ExpertGraph,
    history: RunHistory,
    step: PackedStats | None,
    dense_bytes: int,
    seconds: float,
    drift: Drift | None = None,
    stopped: str | None = None,
) -> RoundRecord:
    """Compute the metrics of a round.

    Args:
        server_round: number of the round, from 1.
        replies: validated answers.
        answers: all answers, by node.
        graph: graph that the clients trained on.
        history: record of the run, which names the clients.
        step: sizes of the server's packed step; None: it made none.
        dense_bytes: bytes that dense FedAvg sends per client and direction.
        seconds: wall time.
        drift: detection of drift after the round; None: as before the first.
        stopped: reason why this is the last round although more were planned.
    """
    drift = drift or Drift()
    return RoundRecord(
        round=server_round,
        seconds=seconds,
        bytes_up=sum(answer.bytes_up for answer in answers.values()),
        bytes_down=sum(answer.bytes_down for answer in answers.values()),
        bytes_up_dense=dense_bytes * len(answers),
        bytes_down_dense=dense_bytes * len(answers),
        density=_mean([accepted.stats.density for accepted in replies.accepted]),
        edges=graph.edges_per_layer(),
        graph_version=graph.version,
        graph_hash=graph.digest(),
        clients=[
            _client_record(history.name_of(node), node, replies, answers[node], max(graph.num_experts), drift)
            for node in history.in_order(answers)
        ],
        perplexity=held_out_loss(replies).perplexity,
        stopped=stopped,
        drifted=drift.overall,
        drift_layers=list(drift.layers),
        step_bytes=step.packed_bytes if step else None,
        step_floor_bytes=step.entropy_floor_bytes if step else None,
    )


def _client_record(
    name: str, node: int, replies: RoundReplies, answer: Answer, num_experts: int, drift: Drift
) -> ClientRecord:
    accepted = next((each for each in replies.accepted if each.node == node), None)
    reply = accepted.reply if accepted else None
    numbers = reply.numbers if reply else {}
    detector = drift.clients.get(reply.partition) if reply else None
    return ClientRecord(
        name=name,
        budget=(reply.budget or num_experts) if reply else 0,
        weight=accepted.contribution.weight if accepted else 0.0,
        train_loss=numbers.get("train-loss"),
        perplexity=reply_loss(reply, "valid").perplexity if reply else None,
        bytes_up=answer.bytes_up,
        bytes_down=answer.bytes_down,
        density=accepted.stats.density if accepted else None,
        refused=replies.refused.get(node),
        update_bytes=accepted.stats.packed_bytes if accepted else None,
        update_floor_bytes=accepted.stats.entropy_floor_bytes if accepted else None,
        drift_loss=detector.excess if detector else None,
        drift_routing=detector.divergence if detector else None,
        drifted=detector.drifted if detector else False,
        start_seconds=numbers.get("start-seconds"),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
