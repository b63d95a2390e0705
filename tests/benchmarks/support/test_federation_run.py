from __future__ import annotations

import json

import pytest

from benchmarks.support.averaging import Averaging
from benchmarks.support.federated_methods import Schedule
from benchmarks.support.federation_run import FederationSettings, check_all_used, federate, run_in_process
from benchmarks.support.quality.runs import packed_clients
from clients.client_app import app
from clients.state.store import ClientStore
from clients.training.trainer import LocalTraining
from models.checkpoints.load import load_graph
from tests.support.tiny_federation import client_folder_of, save_tiny_graph, tiny_config, write_texts

NAMES = ("letters", "digits")


@pytest.fixture
def federation(tmp_path, tiny_tokenizer):
    """Configuration and data folders of a federation whose clients ship every entry in 16 bits."""
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)
    exact = {"density": 1.0, "value_bits": 16, "combine": "mean", "server_learning_rate": 1.0, "rho_max": 0}
    config = tiny_config(graph, tmp_path, num_rounds=2, learning_rate=2e-3, seed=3, **exact)
    folders = {name: tmp_path / "private" / name for name in NAMES}
    for name, folder in folders.items():
        write_texts(folder, [name])
    return config, folders


def test_a_federation_that_ships_everything_equals_averaging(federation, tmp_path):
    config, folders = federation
    result = run_in_process(config, NAMES, list(folders.values()))
    graph = load_graph(config.graph).float()
    clients = list(packed_clients(config, folders, config.graph))
    training = LocalTraining.of(config.training, autocast=False)
    layers = enumerate(graph.expert_layers())
    experts = {f"{i}.{name}": each for i, layer in layers for name, each in layer.named_parameters()}
    schedule = Schedule(training, config.num_rounds, config.batch_size, config.seed)
    method = Averaging(graph, experts, clients, schedule)
    assert result.trajectory[0]["losses"] == pytest.approx(
        {name: loss.mean for name, loss in method.losses().items()}, abs=1e-5
    )
    for server_round, entry in enumerate(result.trajectory[1:], start=1):
        method.train_round(server_round)
        expected = {name: loss.mean for name, loss in method.losses().items()}
        assert entry["losses"] == pytest.approx(expected, abs=5e-4)
        # The model moves in each round by more than the tolerance.
        before = result.trajectory[server_round - 1]["losses"]
        assert all(before[name] - entry["losses"][name] > 0.01 for name in NAMES)


def test_bytes_are_those_of_the_log_and_a_step_counts_with_the_request_that_brings_it(federation, tmp_path):
    config, folders = federation
    result = run_in_process(config, NAMES, list(folders.values()))
    logs = tmp_path / "logs"
    first, second = [json.loads(line) for line in (logs / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((logs / "summary.json").read_text())
    start, one, two = result.trajectory
    assert (start["up"], start["down"], start["updates"]) == (0, 0, 0)
    assert one["up"] == first["bytes_up"] and two["up"] == first["bytes_up"] + second["bytes_up"]
    assert one["down"] == first["bytes_down"] + second["bytes_down"]
    assert two["down"] == summary["bytes_down"]
    assert 0 < one["updates"] < one["up"]
    assert [entry["round"] for entry in result.trajectory] == [0, 1, 2]


def test_the_baselines_have_the_blocks_that_the_client_packs(federation):
    config, folders = federation
    run_in_process(config, NAMES, list(folders.values()))
    for client in packed_clients(config, folders, config.graph):
        store = ClientStore(client_folder_of(config, client.partition))
        name, train, valid = store.blocks(lambda: pytest.fail("the client has not packed its blocks"))
        assert name == f"client-{client.partition}"
        assert train.input_ids.equal(client.train.input_ids) and train.labels.equal(client.train.labels)
        assert valid.input_ids[: config.eval_blocks].equal(client.valid.input_ids)


def test_a_refused_reply_is_an_error(federation, tmp_path):
    config, folders = federation
    missing = [folders["letters"], tmp_path / "absent"]
    with pytest.raises(RuntimeError, match="expected a reply of every client"):
        run_in_process(config, NAMES, missing)


def test_settings_name_the_keys_of_a_run(tmp_path):
    settings = FederationSettings(
        num_clients=3,
        experts=4,
        rounds=2,
        train_blocks=8,
        valid_blocks=5,
        block_size=32,
        batch_size=2,
        local_steps=6,
        learning_rate=0.25,
        seeds=(0,),
        calibration_tokens=64,
    )
    config = settings.config(graph=tmp_path, log_dir=tmp_path / "logs", seed=7, rho_max=0)
    assert (config.num_clients, config.num_rounds, config.eval_blocks, config.local_steps) == (3, 2, 5, 6)
    assert (config.learning_rate, config.seed, config.rho_max) == (0.25, 7, 0)
    graph = settings.graph(tmp_path / "work", 0, quick=True)
    assert load_graph(str(graph)).config.num_experts[0] == 4
    assert (
        settings.graph(tmp_path / "work", 0, quick=True)
        == graph
        != settings.graph(tmp_path / "work", 1, quick=True)
    )


def test_each_client_reads_its_own_folder(federation):
    config, folders = federation
    asked = []

    def client_app(message, context):
        asked.append((context.node_config["partition-id"], context.node_config["data-dir"]))
        return app(message, context)

    assert federate(config, list(folders.values()), client_app)["rounds"] == config.num_rounds
    assert set(asked) == {(index, str(folder)) for index, folder in enumerate(folders.values())}


def test_a_refused_update_is_an_error():
    used = {"clients": [{"refused": None}]}
    check_all_used([used])
    with pytest.raises(RuntimeError, match="every client in every round, got too late"):
        check_all_used([used, {"clients": [{"refused": None}, {"refused": "too late"}]}])
