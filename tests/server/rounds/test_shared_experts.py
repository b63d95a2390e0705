"""A federation over a graph with shared experts and default outputs, with budgets below all experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.state.store import ClientStore
from configs.schema import RunConfig
from federated.protocol.messages import read_reply
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_causal_lm, load_graph
from models.runtime.perplexity import evaluate_loss
from server.rounds.loop import Federation
from tests.support.tiny_federation import (
    TinyGrid,
    all_equal,
    client_folder_of,
    tiny_config,
    tiny_federation,
)

EXPERTS, SHARED, BUDGETS = [8, 8], 2, (4, 7)


def run(config: RunConfig) -> tuple[TinyGrid, Federation, dict[str, Any]]:
    grid = TinyGrid(config)
    federation = tiny_federation(grid, config)
    federation.run()
    return grid, federation, federation.observer.close(out=config.out, stopped=federation.state.stopped)


@pytest.fixture(scope="module")
def finished(shared_graph_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    budgets = ",".join(map(str, BUDGETS))
    return run(tiny_config(shared_graph_dir, folder, budgets=budgets, rho_max=3, out=str(folder / "out")))


def replies_of(grid: TinyGrid):
    """``(round, node, reply)`` of every training message."""
    return [
        (server_round, node, read_reply(up.content, EXPERTS))
        for server_round, node, _, up in grid.sent
        if server_round <= 3
    ]


def test_the_loss_of_every_client_falls(finished):
    for client, budget in zip(finished[2]["clients"], BUDGETS, strict=True):
        assert client["budget"] == budget and client["refused"] is None
        assert client["perplexity_after"] < 0.7 * client["perplexity_before"]


def test_shared_experts_are_resident_and_their_updates_arrive(finished):
    grid, federation, _ = finished
    for _, node, reply in replies_of(grid):
        for held in reply.residents:
            assert held[:SHARED].all() and held.sum() == BUDGETS[node]
    before = load_graph(federation.config.graph, dtype=torch.float32)
    for old, new in zip(before.expert_layers(), federation.global_model.model.expert_layers(), strict=True):
        moved = (old.gate_up_proj != new.gate_up_proj).flatten(1).any(1)
        assert moved[:SHARED].all() and moved.sum() > SHARED


def test_default_outputs_stay_as_the_bootstrap_fitted_them(finished):
    grid, federation, _ = finished
    before = load_graph(federation.config.graph, dtype=torch.float32)
    for old, new in zip(before.expert_layers(), federation.global_model.model.expert_layers(), strict=True):
        assert old.default.up.any()
        for name, value in old.default.named_parameters():
            assert torch.equal(value, getattr(new.default, name))


def test_both_sides_hold_the_same_graph(finished):
    grid, federation, summary = finished
    for node in range(2):
        store = ClientStore(client_folder_of(federation.config, node)).copy
        copy = open_mapped(federation.config.graph, store)
        assert store.load(copy) == federation.global_model.version == 3
        assert all_equal(copy, federation.global_model.model)
    assert {client["graph_hash"] for client in summary["clients"]} == {summary["graph_hash"]}


def test_edits_leave_shared_experts_alone(finished):
    grid, federation, summary = finished
    logs = Path(federation.config.log_dir)
    merges = [json.loads(path.read_text()) for path in logs.glob("merge_round*.json")]
    edits = [edit for merge in merges for edit in merge["edits"]]
    assert len(edits) == summary["edits"] >= 1
    assert all(edit["p"] >= SHARED for edit in edits)
    for mask in federation.global_model.graph.masks:
        np.testing.assert_array_equal(mask[:SHARED], np.eye(len(mask), dtype=bool)[:SHARED])


def test_the_result_opens_with_its_remote_code_and_evaluates_as_the_servers_model(finished, tmp_path):
    grid, federation, _ = finished
    federation.global_model.save(tmp_path / "out", overwrite=False)
    opened = load_causal_lm(str(tmp_path / "out"))
    assert opened.config.num_shared == [SHARED] * 2 and opened.config.default_rank == 3
    store = ClientStore(client_folder_of(federation.config, 0))
    _, _, valid = store.blocks(lambda: pytest.fail("made again"))
    losses = [
        evaluate_loss(model, valid.input_ids, valid.labels).mean
        for model in (opened, federation.global_model.model)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": "3,8", "lora_rank": 4},
        {"budgets": "2,8", "load_balance_weight": 0.01, "gradient_checkpointing": True},
    ],
    ids=["lora", "load balance, a client with shared experts only"],
)
def test_adapters_and_router_losses_train_it_too(shared_graph_dir, tmp_path, changes):
    config = tiny_config(shared_graph_dir, tmp_path, num_rounds=2, **changes)
    _, federation, summary = run(config)
    for client in summary["clients"]:
        assert client["refused"] is None and client["perplexity_after"] < client["perplexity_before"]
    assert federation.global_model.version == 2


def test_clients_build_the_graph_from_the_dense_base(shared_graph_dir, tiny_llama_dir, tmp_path, finished):
    config = finished[1].config.model_copy(
        update={"base": str(tiny_llama_dir), "log_dir": str(tmp_path / "logs"), "out": ""}
    )
    _, federation, _ = run(config)
    assert all_equal(federation.global_model.model, finished[1].global_model.model)
