"""The measured apps in one process: what they count and which faults the clients have."""

from __future__ import annotations

import json

from flwr.app import Context, RecordDict

from benchmarks.scale.apps import client_app, server_app
from benchmarks.scale.apps.costs import COSTS_FILE
from configs.schema import RunConfig
from server.flower.in_process_grid import RUN_ID, InProcessGrid
from server.reporting.run_log import read_rounds
from tests.support.tiny_federation import run_values, save_tiny_graph


def test_costs_and_faults_of_a_federation(tmp_path, tiny_tokenizer, monkeypatch):
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4)
    values = run_values(
        graph, tmp_path, num_clients=3, num_rounds=3, partition="iid", min_clients=1, round_deadline=0.01
    )
    config = RunConfig(**values)
    # In one process a late client would wait for a round that waits for it.
    monkeypatch.setattr(client_app, "_wait_for_round", lambda path, server_round: late.append(server_round))
    late: list[int] = []
    nodes = [{"partition-id": index, "num-partitions": 3} for index in range(3)]
    context = Context(RUN_ID, 1, {}, RecordDict(), config.values())
    server_app.main(InProcessGrid(client_app.app, nodes, config.values()), context)
    costs = json.loads((tmp_path / "logs" / COSTS_FILE).read_text())
    assert [row["round"] for row in costs["rounds"]] == [1, 2, 3, 4]  # the last one is the evaluation
    for row in costs["rounds"][:3]:
        assert row.keys() == {"round", "exchange", "check", "aggregate", "pack", "save", "other"}
        assert all(seconds > 0 for seconds in row.values())
    refused = [[client["refused"] for client in row["clients"]] for row in read_rounds(tmp_path / "logs")]
    assert refused[0] == [None] * 3 and late == [2, 3]
    for reasons in refused[1:]:
        assert [bool(reason) for reason in reasons] == [False, True, False]
        assert "RuntimeError" in reasons[1] and "fails in this round" in reasons[1]


def test_a_late_client_waits_for_the_line_of_its_round(tmp_path, monkeypatch):
    path, slept = tmp_path / client_app.ROUNDS, []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        with path.open("a") as file:
            file.write("{}\n")

    monkeypatch.setattr(client_app.time, "sleep", sleep)
    client_app._wait_for_round(path, 3)
    assert len(slept) == 3
