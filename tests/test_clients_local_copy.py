from __future__ import annotations

import pytest
import torch

from clients.local_copy import VersionMismatch, bring_to_version, client_folder
from clients.store import ClientStore
from configs.schema import load_run_config
from federated.steps import apply_step
from federated.update import RefusedUpdate
from models.llama_loader import load_graph
from models.mapped_experts import open_mapped
from tests.tiny_federation import all_equal, next_step, node_context, request_at, run_values, save_tiny_graph


@pytest.fixture
def graph(tmp_path, tiny_tokenizer):
    return save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=8, visits=4)


@pytest.fixture
def model(graph):
    return load_graph(str(graph), dtype=torch.float32)


@pytest.fixture
def config_of(graph, tmp_path):
    return lambda **changes: load_run_config(run_values(graph, tmp_path, **{"local_steps": 2, **changes}))


def test_files_lie_in_the_nodes_cache_else_with_the_logs_else_in_the_users_cache(
    config_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    config = config_of()
    assert client_folder(config, node_context(cache_dir="/x")) == type(tmp_path)("/x/run-1")
    assert client_folder(config, node_context()) == tmp_path / "logs" / "clients" / "run-1"
    assert (
        client_folder(config_of(log_dir=""), node_context()) == tmp_path / "cache" / "runs" / "1" / "clients"
    )


def steps_of(model, count: int) -> list:
    steps = []
    for version in range(1, count + 1):
        steps.append(next_step(model, version))
        apply_step(model, steps[-1])
    return steps


def test_missing_steps_are_applied_and_kept(graph, model, tmp_path):
    store, steps = ClientStore(tmp_path / "client"), steps_of(model, 3)
    for held, version in ((0, 1), (1, 3), (3, 3)):
        copy = open_mapped(str(graph), store.copy)
        sent = [step for step in steps[:version] if step.version > held]
        bring_to_version(copy, store, request_at(graph, model, version, steps=sent))
        assert store.copy.load(open_mapped(str(graph), store.copy)) == version
    assert all_equal(copy, model)


def test_steps_that_are_held_already_are_passed_over(graph, model, tmp_path):
    store, steps = ClientStore(tmp_path / "client"), steps_of(model, 2)
    for _ in range(2):
        copy = open_mapped(str(graph), store.copy)
        bring_to_version(copy, store, request_at(graph, model, 2, steps=steps))
        assert all_equal(copy, model)


def test_a_gap_names_the_version_held(graph, model, tmp_path):
    store, steps = ClientStore(tmp_path / "client"), steps_of(model, 3)
    copy = open_mapped(str(graph), store.copy)
    with pytest.raises(VersionMismatch, match="holds version 0") as caught:
        bring_to_version(copy, store, request_at(graph, model, 3, steps=steps[1:]))
    assert caught.value.version == 0
    assert not store.folder.exists()


def test_a_refused_step_keeps_the_version_before_on_disk(graph, model, tmp_path):
    store, steps = ClientStore(tmp_path / "client"), steps_of(model, 2)
    early = open_mapped(str(graph), store.copy)
    bring_to_version(early, store, request_at(graph, model, 1, steps=steps[:1]))
    with pytest.raises(RefusedUpdate):
        bad = type(steps[1])(2, steps[1].packed[:-1])
        bring_to_version(open_mapped(str(graph), store.copy), store, request_at(graph, model, 2, steps=[bad]))
    assert store.copy.load(open_mapped(str(graph), store.copy)) == 1
