from __future__ import annotations

import math

import numpy as np
import pytest

from experts.graph.expert_graph import ExpertGraph
from federated.aggregation.contribution import Contribution
from federated.protocol.messages import Reply
from federated.updates.update import SparseUpdate
from federated.wire.packed_stats import PackedStats
from server.rounds.exchange import Answer
from server.rounds.round_record import round_record
from server.rounds.validation import RoundReplies
from server.state.client_drift import ClientDrift
from server.state.drift import Drift
from server.state.run_history import RunHistory
from server.strategies.strategy import Accepted

GRAPH = ExpertGraph([np.triu(np.ones((4, 4), dtype=bool)), np.eye(4, dtype=bool)])
STATS = PackedStats(400, 40, 30, 10, 0.25, 20, 20)


def accepted_of(node: int, partition: int, nll: float, budget: int) -> Accepted:
    numbers = {"train-loss": 1.5, "valid-nll": nll, "valid-tokens": 10.0}
    reply = Reply(f"client-{partition}", partition, budget, 0, "ab", numbers)
    return Accepted(node, reply, Contribution(3.0, SparseUpdate, {}, set()), [], STATS)


def test_totals_are_over_all_answers_and_means_over_the_accepted_ones():
    history = RunHistory()
    replies = RoundReplies([accepted_of(9, 0, 20.0, 2), accepted_of(5, 1, 40.0, 0)], {7: "disk full"})
    for each in replies.accepted:
        history.client(each.node, each.reply, num_experts=4)
    answers = {node: Answer(None, "", None, node, 2 * node) for node in (5, 7, 9)}
    record = round_record(
        2,
        replies,
        answers,
        graph=GRAPH,
        history=history,
        step=STATS,
        dense_bytes=100,
        seconds=1.5,
        drift=Drift({1: ClientDrift(2, 4.0, 0.5, 0.125, drifted=True)}, True, [1], [0.25]),
        stopped="why",
    )
    assert (record.round, record.seconds, record.stopped) == (2, 1.5, "why")
    assert (record.bytes_up, record.bytes_down) == (21, 42)
    assert record.bytes_up_dense == record.bytes_down_dense == 300
    assert record.perplexity == pytest.approx(math.exp(3.0)) and record.density == 0.25
    assert (record.edges, record.graph_hash) == (GRAPH.edges_per_layer(), GRAPH.digest())
    assert (record.step_bytes, record.step_floor_bytes) == (40, 30)
    assert [(each.name, each.budget, each.weight, each.refused) for each in record.clients] == [
        ("client-0", 2, 3.0, None), ("client-1", 4, 3.0, None), ("node-7", 0, 0.0, "disk full"),
    ]  # fmt: skip
    first, _, last = record.clients
    assert (first.train_loss, first.perplexity, first.update_bytes) == (1.5, pytest.approx(math.exp(2)), 40)
    assert [(each.drift_loss, each.drift_routing, each.drifted) for each in record.clients] == [
        (None, None, False), (0.5, 0.125, True), (None, None, False),
    ]  # fmt: skip
    assert (record.drifted, record.drift_layers) == (True, [0.25])
    assert (last.train_loss, last.perplexity, last.update_bytes, last.density) == (None,) * 4


def test_a_round_of_refusals_without_a_step_has_no_means():
    answers = {7: Answer(None, "gone", None, 0, 4)}
    replies = RoundReplies([], {7: "gone"})
    record = round_record(
        1, replies, answers, graph=GRAPH, history=RunHistory(), step=None, dense_bytes=1, seconds=0.0
    )
    assert record.density is None and not math.isfinite(record.perplexity)
    assert (record.step_bytes, record.step_floor_bytes) == (None, None)
    assert (record.drifted, record.drift_layers) == (False, [])
