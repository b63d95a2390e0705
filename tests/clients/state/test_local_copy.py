from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients.state.local_copy import VersionMismatch, bring_to_version, client_folder
from clients.state.store import ClientStore
from configs.schema import load_run_config
from experts.graph.edits import RemoveEdge, RetireExpert, SpawnExpert
from federated.protocol.steps import apply_step
from federated.updates.update import RefusedUpdate
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from server.model.global_model import GlobalModel
from tests.support.tiny_federation import (
    all_equal,
    next_step,
    node_of,
    random_change,
    request_at,
    run_values,
    save_tiny_graph,
)


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
    assert client_folder(config, node_of({"cache-dir": "/x"}), run_id=1) == type(tmp_path)("/x/run-1")
    assert client_folder(config, node_of(), run_id=1) == tmp_path / "logs" / "clients" / "run-1"
    # Where the continued run, which names this log directory, finds it.
    default = client_folder(config_of(log_dir=""), node_of(), run_id=1)
    assert default == tmp_path / "cache" / "runs" / "1" / "clients" / "run-1"
    assert default == client_folder(config_of(log_dir=str(tmp_path / "cache/runs/1")), node_of(), run_id=1)


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


def test_a_step_that_does_not_fit_asks_for_all_there_is_and_is_refused_where_nothing_else_can_come(
    graph, model, tmp_path
):
    store, steps = ClientStore(tmp_path / "client"), steps_of(model, 2)
    early = open_mapped(str(graph), store.copy)
    bring_to_version(early, store, request_at(graph, model, 1, steps=steps[:1]))
    bad = type(steps[1])(2, steps[1].packed[:-1])
    with pytest.raises(VersionMismatch, match="holds version 0"):
        bring_to_version(open_mapped(str(graph), store.copy), store, request_at(graph, model, 2, steps=[bad]))
    assert store.copy.load(open_mapped(str(graph), store.copy)) == 0
    with pytest.raises(RefusedUpdate):
        request = request_at(graph, model, 2, steps=[steps[0], bad])
        bring_to_version(open_mapped(str(graph), store.copy), store, request)


@pytest.fixture
def global_model(graph):
    """Three versions on."""
    global_model = GlobalModel(str(graph))
    for version in (1, 2, 3):
        change = random_change(global_model.model, [(0, version), (1, 5)], seed=version)
        global_model.advance(change, value_bits=4)
        if version == 2:
            mask = global_model.graph.masks[0]
            p, q = next((p, q) for q in range(8) for p in range(q) if mask[p, q])
            global_model.edit([RemoveEdge(0, p, q)])
    return global_model


@pytest.fixture
def grown_model(graph):
    """Three versions on, with spawned, moved and retired experts."""
    global_model = GlobalModel(str(graph))
    plans = [
        [SpawnExpert(0, 2, 8), SpawnExpert(1, 3, 8)],
        [RetireExpert(0, 1), SpawnExpert(0, 4, 9)],
        [RetireExpert(0, 7), RetireExpert(1, 8)],
    ]
    for version, plan in enumerate(plans, start=1):
        last = global_model.graph.num_experts[0] - 1
        moved = [(0, version), (0, last), (1, 5)]
        global_model.advance(random_change(global_model.model, moved, seed=version), value_bits=4)
        global_model.edit(plan)
    return global_model


@pytest.mark.parametrize("held", [0, 1, 2])
@pytest.mark.parametrize("sent", ["steps", "snapshot"])
def test_a_copy_follows_spawned_and_retired_experts_bit_for_bit(graph, grown_model, tmp_path, held, sent):
    store = ClientStore(tmp_path / "client")
    for step in grown_model.steps[:held]:
        copy = open_mapped(str(graph), store.copy)
        assert store.copy.load(copy) == step.version - 1
        apply_step(copy, step)
        store.copy.save(copy, step.version)
    parts = {"steps": grown_model.steps} if sent == "steps" else {"snapshot": grown_model.snapshot()}
    copy = open_mapped(str(graph), store.copy)
    bring_to_version(copy, store, from_server(graph, grown_model, **parts))
    reopened = open_mapped(str(graph), store.copy)
    assert store.copy.load(reopened) == 3
    for model in (copy, reopened):
        assert all_equal(model, grown_model.model)
        assert read_graph(model).digest() == grown_model.graph.digest()
    assert grown_model.graph.num_experts == [8, 8]


def test_a_lost_copy_of_a_grown_model_is_fetched_again(graph, grown_model, tmp_path):
    store = ClientStore(tmp_path / "client")
    copy = open_mapped(str(graph), store.copy)
    bring_to_version(copy, store, from_server(graph, grown_model, snapshot=grown_model.snapshot()))
    (file,) = (tmp_path / "client" / "experts").iterdir()
    file.unlink()
    damaged = open_mapped(str(graph), store.copy)
    assert store.copy.load(damaged) == 0 and read_graph(damaged).num_experts == [8, 8]
    again = open_mapped(str(graph), store.copy)
    bring_to_version(again, store, from_server(graph, grown_model, steps=grown_model.steps))
    assert all_equal(again, grown_model.model)


def from_server(graph, global_model, **changes):
    return request_at(
        graph, global_model.model, global_model.version, copy_hash=global_model.copy_hash, **changes
    )


@pytest.mark.parametrize("held", [0, 1, 3])
def test_a_snapshot_takes_the_place_of_whatever_is_held(graph, global_model, tmp_path, held):
    store = ClientStore(tmp_path / "client")
    for step in global_model.steps[:held]:
        copy = open_mapped(str(graph), store.copy)
        assert store.copy.load(copy) == step.version - 1
        apply_step(copy, step)
        store.copy.save(copy, step.version)
    for _ in range(2):  # a second one changes nothing
        copy = open_mapped(str(graph), store.copy)
        bring_to_version(copy, store, from_server(graph, global_model, snapshot=global_model.snapshot()))
        assert all_equal(copy, global_model.model)
    reopened = open_mapped(str(graph), store.copy)
    assert store.copy.load(reopened) == 3 and all_equal(reopened, global_model.model)
    assert store.copy.hash(reopened) == global_model.copy_hash
    # And steps go on from there.
    global_model.advance(random_change(global_model.model, [(1, 1)]), value_bits=4)
    copy = open_mapped(str(graph), store.copy)
    bring_to_version(copy, store, from_server(graph, global_model, steps=global_model.steps[3:]))
    assert all_equal(copy, global_model.model)


def test_a_damaged_snapshot_leaves_what_was_held(graph, global_model, tmp_path):
    store = ClientStore(tmp_path / "client")
    first = request_at(graph, global_model.model, 1, steps=global_model.steps[:1])
    model = load_graph(str(graph), dtype=torch.float32)
    apply_step(model, global_model.steps[0])
    copy = open_mapped(str(graph), store.copy)
    bring_to_version(copy, store, replace(first, graph_hash=read_graph(model).digest()))
    for request in (
        from_server(graph, global_model, snapshot=global_model.snapshot()[:-1]),
        replace(from_server(graph, global_model, snapshot=global_model.snapshot()), copy_hash="f" * 32),
    ):
        with pytest.raises(RefusedUpdate):
            bring_to_version(open_mapped(str(graph), store.copy), store, request)
        again = open_mapped(str(graph), store.copy)
        assert store.copy.load(again) == 1 and all_equal(again, model)


def test_a_copy_that_hashes_to_something_else_is_dropped_and_asked_for(graph, global_model, tmp_path):
    store = ClientStore(tmp_path / "client")
    copy = open_mapped(str(graph), store.copy)
    bring_to_version(copy, store, from_server(graph, global_model, steps=global_model.steps))
    # An expert that is whole, and named in the list with its own digest, but another than the server's.
    copy = open_mapped(str(graph), store.copy)
    store.copy.load(copy)
    store.copy.write((1, 5), store.copy.read((1, 5)) * 1.0001)
    store.copy.save(copy, 3)
    with pytest.raises(VersionMismatch, match="holds version 0"):
        bring_to_version(open_mapped(str(graph), store.copy), store, from_server(graph, global_model))
    assert store.copy.load(open_mapped(str(graph), store.copy)) == 0
