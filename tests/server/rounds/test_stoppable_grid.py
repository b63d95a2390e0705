"""A run whose end is requested: what is exchanged before, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from configs.schema import RunConfig
from models.checkpoints.load import load_graph
from server.app import main, run_federation
from server.flower.in_process_grid import RUN_ID
from server.rounds.stoppable_grid import StoppableGrid
from server.state.stop_request import StopRequested, clear_stop, request_stop, stop_requested
from tests.support.tiny_federation import TinyGrid, tiny_config


@pytest.fixture
def config(tiny_graph_dir, tmp_path) -> RunConfig:
    return tiny_config(tiny_graph_dir, tmp_path, local_steps=1, out=str(tmp_path / "out"))


def test_a_request_ends_every_exchange_and_nothing_before_it(config, tmp_path):
    inner = TinyGrid(config)
    grid = StoppableGrid(inner, tmp_path)
    nodes = list(grid.get_node_ids())
    assert nodes == list(inner.get_node_ids()) and len(nodes) == 2
    assert list(grid.push_messages([])) == list(grid.pull_messages([])) == []
    assert list(grid.send_and_receive([])) == [] and grid.run is inner.run
    request_stop(tmp_path)
    for call in (
        grid.get_node_ids,
        lambda: grid.push_messages([]),
        lambda: grid.pull_messages([]),
        lambda: grid.send_and_receive([]),
    ):
        with pytest.raises(StopRequested, match="^interrupted$"):
            call()
    clear_stop(tmp_path)
    assert list(grid.get_node_ids()) == nodes


@pytest.mark.parametrize("last_round", [1, 2])
def test_an_interrupted_run_saves_the_model_of_its_last_completed_round(config, last_round):
    grid, logs = TinyGrid(config), Path(config.log_dir)

    def interrupt(server_round: int, node: int) -> None:
        if server_round == last_round + 1:
            request_stop(logs)

    grid.before = interrupt
    with pytest.raises(StopRequested):
        run_federation(grid, config, run_id=RUN_ID)
    summary = json.loads((logs / "summary.json").read_text())
    assert (summary["rounds"], summary["stopped"], summary["out"]) == (last_round, "interrupted", config.out)
    load_graph(config.out)
    assert list(logs.glob(".replies.*")) == []


def test_a_request_in_the_first_round_leaves_no_model_and_one_of_an_earlier_run_is_ignored(config):
    grid, logs = TinyGrid(config), Path(config.log_dir)
    logs.mkdir()
    request_stop(logs)
    grid.before = lambda server_round, node: request_stop(logs)
    state = {"state": RecordDict(), "node_config": {}, "run_config": config.values()}
    with pytest.raises(StopRequested):
        main(grid, Context(run_id=RUN_ID, node_id=0, **state))
    assert not stop_requested(logs)
    assert [group for group, *_ in grid.sent] != [], "the request of the earlier run did not count"
    assert not (logs / "summary.json").exists() and not Path(config.out).exists()
