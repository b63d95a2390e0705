from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from federated.protocol.messages import Reply
from server.state.run_history import ClientFigures, NodeRecord, RunHistory


def reply_of(partition: int, **changes) -> Reply:
    return replace(Reply(f"client-{partition}", partition, 2, 0, "ab", {}), **changes)


@pytest.fixture
def history() -> RunHistory:
    """Node 5 is client 1 and was refused once, node 9 client 0, node 3 sent no valid reply."""
    history = RunHistory(rounds=2, edits=4, drift_rounds=[2], epsilon=2.5, delta=1e-5)
    history.traffic["bytes_up"] = 7
    for node, partition in ((5, 1), (9, 0)):
        history.client(node, reply_of(partition), num_experts=8)
        history.accepted(node)
    history.refused(5, "late")
    history.refused(3, "disk full")
    history.clients[0].perplexity_before = 9.5
    history.clients[1].drift_rounds = [1, 2]
    return history


def test_the_history_survives_json(history):
    again = RunHistory.from_json(json.loads(json.dumps(history.to_json(), allow_nan=False)))
    assert again == history
    again.clients[0].perplexity_after = math.inf
    stored = RunHistory.from_json(json.loads(json.dumps(again.to_json(), allow_nan=False)))
    assert stored.clients[0].perplexity_after is None


def test_a_client_keeps_its_figures_whichever_node_answers_for_it(history):
    figures = history.client(77, reply_of(1, name="other", budget=3), num_experts=8)
    assert figures is history.clients[1] and (figures.name, figures.budget) == ("client-1", 2)
    assert history.client(4, reply_of(2, budget=0), num_experts=8) == ClientFigures(
        "client-2", budget=8, graph_hash="ab"
    )
    assert history.nodes[77] == NodeRecord("other", 1)


def test_nodes_are_named_and_sorted_by_their_clients(history):
    assert [history.name_of(node) for node in (5, 9, 3, 4)] == ["client-1", "client-0", "node-3", "node-4"]
    assert history.in_order([4, 3, 5, 9]) == [9, 5, 3, 4]


def test_refused_is_the_last_reason_where_no_update_was_used(history):
    found = history.client_summaries()
    assert [(each["name"], each["refused"]) for each in found] == [
        ("client-0", None), ("client-1", None), ("node-3", "disk full"),
    ]  # fmt: skip
    history.client(3, reply_of(2), num_experts=8)
    history.refused(3, "away")
    assert [(each["name"], each["refused"]) for each in history.client_summaries()][2] == ("client-2", "away")
    # The client came back from another node, whose update was used.
    history.client(77, reply_of(2), num_experts=8)
    history.accepted(77)
    assert history.client_summaries()[2]["refused"] is None


def test_the_first_format_of_saved_runs_is_read(history):
    """A mapping for each attribute of a node, written before the history was a class."""
    first = {
        "_clients": {str(index): asdict(each) for index, each in history.clients.items()},
        "_names": {"5": "client-1", "9": "client-0"},
        "_partitions": {"5": 1, "9": 0},
        "_unused": {"3": "disk full"},
        "_bytes": history.traffic,
        "_edits": 4,
        "_rounds": 2,
        "_used": [5, 9],
    }
    for client in first["_clients"].values():
        del client["drift_rounds"]
    read = RunHistory.from_json(json.loads(json.dumps(first)))
    history.drift_rounds, history.clients[1].drift_rounds = [], []
    history.epsilon = history.delta = None
    history.nodes[5].refused = None  # the first format kept no reason of a node whose update was used
    assert read == history
