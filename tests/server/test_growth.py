"""Federations whose graph grows: real apps, one client of a smaller budget, a run that is killed and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from server import app as server_app
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID
from server.state.drift import Drift
from tests.support.tiny_federation import TinyGrid, all_equal, save_tiny_graph, tiny_config, tiny_federation

ROUNDS = 4


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_graph(
        tmp_path_factory.mktemp("growth") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )


@pytest.fixture(autouse=True)
def drifting(monkeypatch):
    """Drift in round 1, with the routing of layer 1 moved most."""
    add = Drift.add

    def drift_first(self, observations, server_round, keys):
        add(self, observations, server_round, keys)
        self.overall, self.layers = server_round == 1, [0.1, 0.3]

    monkeypatch.setattr(Drift, "add", drift_first)


def config_in(graph: Path, folder: Path, **changes):
    own = {"local_steps": 2, "num_rounds": ROUNDS, "out": str(folder / "out"), "max_spawned": 1, "rho_max": 1}
    return tiny_config(graph, folder, **own, **changes)


@pytest.mark.parametrize(("budgets", "lora_rank"), [("", 0), ("4,3", 0), ("", 2)])
def test_clients_train_and_use_a_spawned_expert_from_the_next_round_on(graph, tmp_path, budgets, lora_rank):
    config = config_in(graph, tmp_path, budgets=budgets, lora_rank=lora_rank)
    federation = tiny_federation(TinyGrid(config), config)
    loads = []
    combine = federation.strategy.combine_usage

    def combine_usage(accepted, global_model):
        loads.append([each.usage for each in accepted])
        return combine(accepted, global_model)

    federation.strategy.combine_usage = combine_usage
    federation.run()
    merge = json.loads((tmp_path / "logs" / "merge_round1.json").read_text())
    ((op, layer, parent, expert),) = [
        tuple(edit[key] for key in ("op", "layer", "p", "q")) for edit in merge["edits"]
    ]
    assert (op, layer, expert) == ("spawn-expert", 1, 4)
    records = [json.loads(line) for line in (tmp_path / "logs" / "rounds.jsonl").read_text().splitlines()]
    assert all(client["refused"] is None for record in records for client in record["clients"])
    assert records[0]["attached"] == []
    attached = [each for record in records[1:] for each in record["attached"]]
    assert [each["layer"] for each in attached] == [1] * (ROUNDS - 1)
    assert all(each["visits_over_mean"] > 0 for each in attached)  # from the first round on
    assert loads[0][0][1].shape == (4, 4) and all(client[1][parent, 4] > 0 for client in loads[1])
    model = federation.global_model.model
    assert read_graph(model).num_experts == [4, 5]
    assert model.expert_layers()[1].read_expert(4)[1].abs().sum() > 0


def test_a_grown_model_opens_again_and_a_killed_run_ends_with_the_same_one(graph, tmp_path, monkeypatch):
    config = config_in(graph, tmp_path / "whole", budgets="4,3")
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    expected = load_graph(config.out)
    assert expected.config.num_experts == [4, 5] and expected.config.attached_experts == [[], [4]]
    ids = torch.arange(24)[None]
    assert torch.isfinite(expected(input_ids=ids).logits).all()

    monkeypatch.setattr(server_app, "save_interrupted", lambda federation, error: None)
    killed = config_in(graph, tmp_path / "killed", budgets="4,3")
    grid = TinyGrid(killed)

    def die(server_round, node):
        if server_round == 3:
            raise KeyboardInterrupt

    grid.before = die
    with pytest.raises(KeyboardInterrupt):
        run_federation(grid, killed, run_id=RUN_ID)
    resumed = killed.model_copy(update={"resume": True})
    run_federation(TinyGrid(resumed), resumed, run_id=RUN_ID)
    assert all_equal(load_graph(killed.out), expected)
