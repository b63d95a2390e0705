"""Federations whose clients come and go, answer late, or are drawn anew in each round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from configs.schema import RunConfig
from server.flower.in_process_grid import Drop, Late
from tests.support.tiny_federation import (
    TinyGrid,
    all_equal,
    client_folder_of,
    save_tiny_graph,
    tiny_config,
    tiny_federation,
)

NAMES = ("letters", "digits")


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_graph(
        tmp_path_factory.mktemp("rounds") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )


def config_in(graph: Path, folder: Path, **changes) -> RunConfig:
    return tiny_config(graph, folder, **{"local_steps": 1, "num_rounds": 4, "rho_max": 0, **changes})


def trained(grid: TinyGrid, rounds: int) -> list[list[int]]:
    """Nodes that were asked to train in each round."""
    return [
        sorted({node for each, node, *_ in grid.sent if each == number}) for number in range(1, rounds + 1)
    ]


def rows(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(config.log_dir) / "rounds.jsonl").read_text().splitlines()]


def test_half_of_the_clients_train_in_a_round_and_catch_up_when_they_are_drawn_again(graph, tmp_path):
    config = config_in(graph, tmp_path, fraction_train=0.5, num_rounds=6, seed=3)
    grid = TinyGrid(config)
    federation = tiny_federation(grid, config)
    federation.run()
    asked = trained(grid, 6)
    assert all(len(each) == 1 for each in asked) and {node for (node,) in asked} == {0, 1}
    assert all(reply is not None and not reply.has_error() for *_, reply in grid.sent)
    summary = federation.observer.close(out="")
    assert [client["refused"] for client in summary["clients"]] == [None, None]
    assert federation.state.server_round == 6


def test_a_round_goes_on_with_the_first_replies_of_those_asked(graph, tmp_path):
    late = {(0, "2"): Late(10**6)}
    config = config_in(graph, tmp_path, fraction_train=0.5, over_provision=2.0, reply_timeout=60.0)
    grid = TinyGrid(config, faults=late)
    federation = tiny_federation(grid, config)
    federation.run()
    assert trained(grid, 4) == [[0, 1]] * 4
    used = [[client["name"] for client in row["clients"] if not client["refused"]] for row in rows(config)]
    assert len(used[1]) == 1
    refused = [client["refused"] for client in rows(config)[1]["clients"] if client["refused"]]
    assert refused == ["1 other clients answered first"]


def test_a_late_client_is_not_waited_for_beyond_the_deadline(graph, tmp_path):
    config = config_in(graph, tmp_path, round_deadline=0.1, reply_timeout=60.0, min_clients=1)
    grid = TinyGrid(config, faults={(1, "2"): Late(10**6)})
    federation = tiny_federation(grid, config)
    federation.run()
    assert federation.state.server_round == 4
    assert sum(client["refused"] is not None for client in rows(config)[1]["clients"]) == 1
    # What it had shipped is in its residual, and reaches the model in the next round.
    assert [session.accepted_round for session in federation.state.sessions.values()] == [4, 4]


def test_without_a_quorum_the_round_is_repeated_and_then_the_run_ends(graph, tmp_path):
    config = config_in(graph, tmp_path, min_clients=2, reply_timeout=0.2)
    grid = TinyGrid(config, faults={(1, "2"): Drop()})
    federation = tiny_federation(grid, config)
    with pytest.raises(RuntimeError, match="usable updates of at least 2 clients, got 1: no answer within"):
        federation.run()
    assert [node for each, node, *_ in grid.sent if each == 2] == [0, 1, 0, 1]
    assert federation.state.server_round == 1


def test_a_dead_node_is_asked_ever_less_often(graph, tmp_path):
    dead = {(1, str(number)): Drop() for number in range(2, 12)}
    config = config_in(graph, tmp_path, num_rounds=10, reply_timeout=0.1)
    grid = TinyGrid(config, faults=dead)
    tiny_federation(grid, config).run()
    assert [number for number, nodes in enumerate(trained(grid, 10), start=1) if 1 in nodes] == [
        1,
        2,
        3,
        5,
        9,
    ]


def test_a_restarted_node_goes_on_as_the_client_it_was(graph, tmp_path):
    config = config_in(graph, tmp_path)
    grid = TinyGrid(config)

    def restart(server_round: int, node: int) -> None:
        if (server_round, node) == (2, 1):
            grid.contexts[77] = grid.contexts.pop(grid.node_ids[1])
            grid.node_ids[1] = 77

    grid.after = restart
    federation = tiny_federation(grid, config)
    federation.run()
    assert trained(grid, 4) == [[0, 1]] * 4
    sessions = federation.state.sessions
    assert sessions[77].partition == 1 and sessions[77].accepted_round == 4
    assert federation.state.departed == {}


def test_a_node_that_joins_late_takes_part(graph, tmp_path):
    config = config_in(graph, tmp_path)
    grid = TinyGrid(config)
    late = grid.node_ids[1]
    connected = [grid.node_ids[0]]
    grid.get_node_ids = lambda: sorted(connected)  # type: ignore[method-assign]
    grid.after = lambda server_round, node: connected.append(late) if server_round == 2 else None
    federation = tiny_federation(grid, config.model_copy(update={"num_clients": 1}))
    federation.run()
    assert trained(grid, 4) == [[0], [0], [0, 1], [0, 1]]
    assert federation.state.sessions[late].accepted_round == 4


def test_a_reply_after_the_end_of_its_round_is_not_folded_into_a_later_one(graph, tmp_path):
    """The client's residual brings its content: the run with a late reply equals that with a lost one."""
    models = {}
    for name, fault in (("late", Late(1)), ("lost", Late(10**6)), ("in time", Late(0))):
        config = config_in(graph, tmp_path / name, round_deadline=0.05, reply_timeout=60.0, num_rounds=3)
        grid = TinyGrid(config, faults={(1, "2"): fault})
        federation = tiny_federation(grid, config)
        federation.run()
        models[name] = federation.global_model.model
        refused = [client["refused"] for client in rows(config)[1]["clients"] if client["refused"]]
        assert refused == ([] if name == "in time" else ["no answer within 0 s"])
    assert all_equal(models["late"], models["lost"]) and not all_equal(models["late"], models["in time"])


@pytest.mark.parametrize("weights", ["examples", "staleness"])
def test_a_run_with_weighted_draws_asks_weighs_and_continues_alike(graph, tmp_path, weights):
    config = config_in(graph, tmp_path, fraction_train=0.5, sampling_weights=weights, seed=3)
    grid = TinyGrid(config)
    federation = tiny_federation(grid, config)
    federation.run()
    asked, sessions = trained(grid, 4), federation.state.sessions
    assert [len(each) for each in asked] == [1] * 4 and {node for (node,) in asked} == {0, 1}
    last = {index: max(r for r in range(1, 5) if index in asked[r - 1]) for index in (0, 1)}
    assert [sessions[node].asked_round for node in grid.node_ids] == [last[0], last[1]]
    examples = {sessions[node].examples for node in grid.node_ids}
    weight = {client["weight"] for row in rows(config) for client in row["clients"]}
    if weights == "staleness":
        assert weight == examples
    else:  # half of the clients are asked, and both have as many examples
        assert weight == {2 * each for each in examples} and len(examples) == 1


def test_a_client_that_lost_its_files_takes_part_again(graph, tmp_path):
    config = config_in(graph, tmp_path)
    grid = TinyGrid(config)
    folder = client_folder_of(config, 1)
    grid.after = lambda server_round, node: shutil.rmtree(folder) if (server_round, node) == (2, 1) else None
    federation = tiny_federation(grid, config)
    federation.run()
    assert {session.accepted_round for session in federation.state.sessions.values()} == {4}
    assert (folder / "global.safetensors").exists()
    assert not any(client["refused"] for row in rows(config) for client in row["clients"])
