from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.participant import Participant
from clients.state.residual import ResidualStore
from configs.schema import load_run_config
from federated.aggregation.usage import unpack_usage
from federated.wire.codec import unpack_update
from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import unit_sizes
from models.runtime.perplexity import evaluate_loss
from server.flower.in_process_grid import RUN_ID
from tests.support.tiny_federation import (
    all_equal,
    client_folder_of,
    node_context,
    request_at,
    run_values,
    save_tiny_graph,
)

SIZE = 3 * 8 * 32 + 32 + 1 + 2 * 8


@pytest.fixture
def graph(tmp_path, tiny_tokenizer):
    return save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=8, visits=4)


@pytest.fixture
def model(graph):
    return load_graph(str(graph), dtype=torch.float32)


@pytest.fixture
def request_0(graph, model):
    return request_at(graph, model)


@pytest.fixture
def config_of(graph, tmp_path):
    return lambda **changes: load_run_config(run_values(graph, tmp_path, **{"local_steps": 2, **changes}))


def test_the_first_message_of_a_run_removes_files_of_runs_long_ago(config_of, request_0):
    config = config_of()
    old = Path(config.log_dir) / "clients" / "run-99"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    Participant.open(config, node_context(), request_0)
    assert not old.exists()


def test_a_client_opens_its_data_and_the_global_model(config_of, model, request_0):
    client = Participant.open(config_of(), node_context(1), request_0)
    assert (client.partition, client.budget, client.name) == (1, 0, "digits")
    assert all_equal(client.model, model) and client.model.dtype == torch.float32
    assert client.train.input_ids.shape[1] == 32 and len(client.valid) >= 1
    assert client.store.folder == client_folder_of(client.config, 1)


@pytest.mark.parametrize(
    ("changes", "node", "budget"),
    [
        ({}, {}, 0),
        ({"expert_budget": 3}, {}, 3),
        ({"budgets": "2,5"}, {}, 5),
        ({"budgets": "2,5"}, {"expert_budget": 4}, 4),
        ({"expert_budget": 3}, {"expert_budget": 8}, 8),
    ],
)
def test_the_budget_is_the_nodes_own_or_the_runs(config_of, request_0, changes, node, budget):
    assert Participant.open(config_of(**changes), node_context(1, **node), request_0).budget == budget


def test_a_client_with_private_data_trains_on_all_of_it(config_of, request_0, tmp_path):
    (tmp_path / "site").mkdir()
    rows = [json.dumps({"text": f"record {number}"}) for number in range(20)]
    (tmp_path / "site" / "a.jsonl").write_text("\n".join(rows))
    client = Participant.open(config_of(), node_context(0, data_dir=str(tmp_path / "site")), request_0)
    assert client.name == "client-0"
    # 18 documents of BOS and about nine characters.
    assert 18 * 9 <= client.train.num_tokens <= 18 * 10


def test_a_client_trains_and_evaluates_on_answers_alone(
    config_of, graph, request_0, tmp_path, tiny_tokenizer
):
    rows = [json.dumps({"question": f"what is {number}?", "answer": "this"}) for number in range(20)]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.jsonl").write_text("\n".join(rows))
    node = node_context(0, data_dir=str(tmp_path / "site"))
    with pytest.warns(UserWarning, match="no chat template"):
        every = Participant.open(config_of(log_dir=str(tmp_path / "all")), node, request_0)
        client = Participant.open(config_of(loss_on="answers"), node, request_0)
    decoded = tiny_tokenizer.decode(client.train.labels[client.train.labels != -100])
    assert decoded.replace(" ", "") == "this</s>" * 18 and client.train.num_tokens == 18 * 5
    assert every.train.num_tokens == every.train.labels.ne(-100).sum() > 18 * 25
    predicted = [int((blocks.labels[:, 1:] != -100).sum()) for blocks in (client.train, client.valid)]
    reply = client.train_round(request_0)
    assert reply.numbers["valid-tokens"] == predicted[1] <= 2 * 5
    assert 0 < reply.numbers["train-tokens"] < 2 * 4 * 31 and torch.isfinite(
        torch.tensor(reply.numbers["train-loss"])
    )
    again = Participant.open(config_of(loss_on="answers"), node, request_0)
    assert torch.equal(again.train.labels, client.train.labels), "from the client's disk"


def test_a_round_gives_an_update_of_the_residents_on_the_graph(config_of, model, request_0):
    client = Participant.open(config_of(expert_budget=2), node_context(), request_0)
    reply = client.train_round(request_0)
    assert (reply.version, reply.graph_hash, reply.budget) == (0, read_graph(model).digest(), 2)
    assert [int(held.sum()) for held in reply.residents] == [2, 2]
    update = unpack_update(
        reply.update, sizes=unit_sizes(model), graph_version=0, graph_hash=read_graph(model).digest()
    )
    held = {(layer, int(e)) for layer, bits in enumerate(reply.residents) for e in np.flatnonzero(bits)}
    assert set(update.vectors) == held
    kept = sum(vector.indices.size for vector in update.vectors.values())
    assert reply.numbers["density"] == pytest.approx(kept / (4 * SIZE)) == pytest.approx(0.5, abs=0.01)
    assert set(reply.numbers) == {
        "valid-nll", "valid-tokens", "train-loss", "train-tokens", "examples", "density", "start-seconds",
    }  # fmt: skip
    assert reply.numbers["examples"] == len(client.train)
    assert 0 < reply.numbers["start-seconds"] < 600
    assert reply.inclusion == {}


def test_the_held_out_loss_is_that_of_the_global_model_as_it_came(config_of, model, request_0):
    client = Participant.open(config_of(eval_blocks=3), node_context(), request_0)
    reply = client.train_round(request_0)
    expected = evaluate_loss(model, client.valid.input_ids[:3], client.valid.labels[:3])
    assert (reply.numbers["valid-nll"], reply.numbers["valid-tokens"]) == (expected.nll, expected.tokens)
    everything = Participant.open(config_of(eval_blocks=0), node_context(), request_0).evaluate()
    assert everything.tokens == int((client.valid.labels[:, 1:] != -100).sum()) > expected.tokens


def test_only_the_last_round_measures_the_clients_own_model(config_of, graph, model, request_0):
    client = Participant.open(config_of(), node_context(), request_0)
    reply = client.train_round(request_at(graph, model, last=True))
    # The client's own model, after training, is better on its text than the one that came.
    assert reply.numbers["personal-tokens"] == reply.numbers["valid-tokens"]
    assert reply.numbers["personal-nll"] < reply.numbers["valid-nll"]


def test_every_training_option_of_the_run_reaches_local_training(config_of, graph, model, monkeypatch):
    options = {
        "local_steps": 5, "learning_rate": 0.5, "weight_decay": 0.25, "max_grad_norm": 2.0, "train": "routing",
        "optimizer": "sgd", "momentum": 0.5, "gain_learning_rate": 3.0, "schedule": "cosine", "warmup_steps": 4,
        "accumulation_steps": 2, "gradient_checkpointing": True, "load_balance_weight": 0.125, "z_loss_weight": 0.75,
    }  # fmt: skip
    seen = []

    def stop(model, stream, training):
        seen.append(training)
        raise KeyboardInterrupt

    monkeypatch.setattr("clients.participant.train_locally", stop)
    request = request_at(graph, model, server_round=3)
    client = Participant.open(config_of(num_rounds=4, **options), node_context(), request)
    with pytest.raises(KeyboardInterrupt):
        client.train_round(request)
    expected = {"first_step": 10, "total_steps": 20, "autocast": False}
    expected["keep_moments"] = True  # for the score of entries
    assert dataclasses.asdict(seen[0]) == expected | options


@pytest.mark.parametrize(
    ("changes", "visits"),
    [
        ({}, 4),
        ({"expert_budget": 4}, 2),
        ({"expert_budget": 2}, 1),
        ({"expert_budget": 4, "experts_per_token": 3}, 3),
    ],
)
def test_visits_scale_with_the_budget_unless_told_otherwise(config_of, model, request_0, changes, visits):
    reply = Participant.open(config_of(**changes), node_context(), request_0).train_round(request_0)
    counts = unpack_usage(reply.usage, [8, 8])
    edges = [np.asarray(mask | np.eye(8, dtype=bool)) for mask in read_graph(model).masks]
    tokens = 2 * 4 * 32  # steps, blocks, tokens a block
    assert [int((count * open_).sum()) for count, open_ in zip(counts, edges, strict=True)] == [
        tokens * visits
    ] * 2


def test_clients_that_start_alike_answer_alike_and_others_do_not(config_of, request_0, tmp_path):
    def answer(folder: str, partition: int, **changes):
        config = config_of(log_dir=str(tmp_path / folder), expert_budget=4, **changes)
        reply = Participant.open(config, node_context(partition), request_0).train_round(request_0)
        return reply.update, reply.usage

    assert answer("a", 0) == answer("b", 0)
    assert answer("a", 0) != answer("c", 1)
    assert answer("b", 0) != answer("d", 0, seed=1)


def test_what_is_not_shipped_is_carried_to_the_next_round(config_of, model, request_0):
    config = config_of(ship_experts=1, density=0.1, local_steps=1)
    client = Participant.open(config, node_context(), request_0)
    shipped = unpack_update(client.train_round(request_0).update, sizes=unit_sizes(model))
    assert sorted(layer for layer, _ in shipped.vectors) == [0, 1]
    kept = ResidualStore(client_folder_of(config, 0) / "residual-1.safetensors").load().residual
    assert set(kept) > set(shipped.vectors)
    for unit, vector in shipped.vectors.items():
        # Only quantization error is left of what was shipped.
        left = kept[unit][torch.from_numpy(vector.indices)]
        assert left.abs().max() < np.abs(vector.values).max() / 4


def test_sampled_experts_come_with_their_probabilities(config_of, request_0):
    client = Participant.open(config_of(selection="sample", ship_experts=2), node_context(), request_0)
    reply = client.train_round(request_0)
    assert reply.inclusion and all(0 < pi < 1 for pi in reply.inclusion.values())
    units = unpack_update(reply.update, sizes=unit_sizes(client.model)).vectors
    assert {tuple(map(int, name.split("."))) for name in reply.inclusion} <= set(units)
    assert [sum(layer == each for layer, _ in units) for each in (0, 1)] == [2, 2]


def test_the_assembler_learns_from_round_to_round_on_disk(config_of, request_0):
    config = config_of(expert_budget=3, assembler_steps=2)
    Participant.open(config, node_context(), request_0).train_round(request_0)
    folder = client_folder_of(config, 0)
    first = (folder / "assembler-1.safetensors").read_bytes()
    Participant.open(config, node_context(), request_0).train_round(
        dataclasses.replace(request_0, server_round=2)
    )
    assert (folder / "assembler-2.safetensors").read_bytes() != first
    assert (folder / "assembler-1.safetensors").read_bytes() == first


def test_a_repeated_round_gives_the_same_update_and_a_continued_run_finds_its_files(config_of, request_0):
    config = config_of(expert_budget=3, ship_experts=1, density=0.1)
    rounds = [dataclasses.replace(request_0, server_round=each, accepted_round=each - 1) for each in (1, 2)]
    updates = [Participant.open(config, node_context(), each).train_round(each).update for each in rounds]
    again = dataclasses.replace(rounds[1], accepted_round=0, accepted_rounds={0: 1, 1: 7}, run_id=RUN_ID)
    elsewhere = node_context()
    elsewhere.run_id = 77
    assert Participant.open(config, elsewhere, again).train_round(again).update == updates[1] != updates[0]


def test_with_every_expert_held_there_is_no_assembler(config_of, request_0):
    config = config_of(expert_budget=8)
    reply = Participant.open(config, node_context(), request_0).train_round(request_0)
    assert [bits.tolist() for bits in reply.residents] == [[True] * 8] * 2
    assert not (client_folder_of(config, 0) / "assembler-1.safetensors").exists()


@pytest.mark.parametrize("walk", ["depth-first", "best-first"])
def test_the_walk_of_the_run_is_taken(config_of, request_0, walk):
    client = Participant.open(config_of(walk=walk), node_context(), request_0)
    assert {layer.order for layer in client.model.expert_layers()} == {walk}


def test_bf16_changes_the_losses_but_not_by_much(config_of, request_0):
    exact, rounded = (
        Participant.open(config_of(precision=precision), node_context(), request_0).evaluate()
        for precision in ("fp32", "bf16")
    )
    assert rounded.nll == pytest.approx(exact.nll, rel=0.02) and rounded.nll != exact.nll
