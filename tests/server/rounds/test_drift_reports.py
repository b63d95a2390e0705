from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experts.graph.expert_graph import ExpertGraph
from federated.aggregation.contribution import Contribution
from federated.protocol.messages import Reply
from federated.updates.update import SparseUpdate
from federated.wire.packed_stats import PackedStats
from models.runtime.perplexity import LossSum
from server.rounds.drift_reports import drift_reports, routed_visits
from server.rounds.validation import RoundReplies
from server.strategies.strategy import Accepted
from tests.support.documents import write_documents
from tests.support.tiny_federation import (
    TinyGrid,
    client_folder_of,
    save_tiny_graph,
    tiny_config,
    tiny_federation,
)

MASK = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
COUNTS = np.array([[5, 2, 90], [0, 3, 80], [0, 0, 7]])
ALL = np.ones(3, dtype=bool)


def test_visits_are_entries_and_traversals_without_demand():
    graph = ExpertGraph((MASK,))
    assert routed_visits([COUNTS], graph, [ALL])[0].tolist() == [5.0, 5.0, 7.0]
    assert routed_visits([], graph, []) == []


def test_shared_experts_are_left_out_and_those_not_held_unknown():
    graph = ExpertGraph((MASK, MASK), num_shared=(1, 0))
    held = np.array([True, True, False])
    first, second = routed_visits([COUNTS, COUNTS], graph, [held, held])
    assert first.tolist() == [5.0, pytest.approx(np.nan, nan_ok=True)]
    assert second[:2].tolist() == [5.0, 5.0] and np.isnan(second[2])


def test_each_accepted_client_gives_one_report():
    reply = Reply("a", 3, 0, 0, "ab", {"valid-nll": 20.0, "valid-tokens": 10.0}, residents=[ALL])
    stats = PackedStats(400, 40, 30, 10, 0.25, 20, 20)
    accepted = Accepted(9, reply, Contribution(3.0, SparseUpdate, {}, set()), [COUNTS], stats)
    silent = replace(accepted, reply=replace(reply, partition=4, numbers={}))
    first, second = drift_reports(RoundReplies([accepted, silent]), ExpertGraph((MASK,)))
    assert (first.partition, first.loss) == (3, LossSum(20.0, 10)) and first.visits[0].tolist() == [5, 5, 7]
    assert (second.partition, second.loss.tokens) == (4, 0)


@pytest.mark.parametrize(("moved", "overall"), [((0,), False), ((0, 1), True)])
def test_clients_whose_text_changes_are_found(tmp_path, tiny_tokenizer, moved, overall):
    """Two clients repeat a text for four rounds; then some of them repeat a text that none had."""
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)
    keys = {"num_rounds": 5, "local_steps": 8, "rho_max": 0}
    config = tiny_config(graph, tmp_path, reply_timeout=60.0, **keys)
    grid = TinyGrid(config)
    write_documents(tmp_path / "changed.jsonl", ["GUV QXW; ZKJ ?! YBP: " * 6] * 20)

    def change(server_round: int, node: int) -> None:
        if server_round == 5 and node in moved:
            (client_folder_of(config, node) / "blocks.safetensors").unlink(missing_ok=True)
            context = grid.contexts[grid.node_ids[node]]
            context.node_config["data-dir"] = str(tmp_path / "changed.jsonl")

    grid.before = change
    federation = tiny_federation(grid, config)
    federation.run()
    rows = [json.loads(line) for line in (Path(config.log_dir) / "rounds.jsonl").read_text().splitlines()]
    assert [row["drifted"] for row in rows] == [False] * 4 + [overall]
    assert all(not client["drifted"] for row in rows[:4] for client in row["clients"])
    drift = federation.state.drift
    assert drift.drifted == list(moved) and drift.overall == overall
    assert all(drift.clients[each].excess > 1.0 for each in moved)
    summary = federation.observer.close(out="")
    assert summary["drift_rounds"] == ([5] if overall else [])
