from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import Message, RecordDict

from clients import client_app
from experts.graph.edits import RemoveEdge
from federated.protocol.messages import (
    BAD_INPUT,
    NEEDS_RECIPE,
    REFUSED,
    RESEND,
    Request,
    read_reply,
    write_request,
)
from federated.protocol.steps import ServerStep, apply_step
from models.bootstrap.recipe import read_recipe_file
from models.checkpoints.load import load_graph, load_tokenizer
from models.graph.graph_state import read_graph
from server.flower.in_process_grid import InProcessGrid
from tests.support.tiny_federation import next_step, request_at, run_values, save_tiny_graph


@pytest.fixture
def graph(tmp_path, tiny_tokenizer):
    return save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)


@pytest.fixture
def values(graph, tmp_path):
    return run_values(graph, tmp_path, local_steps=1)


def request_for(graph, **changes) -> Request:
    """A request at version 0, with ``changes``."""
    model = load_graph(str(graph), dtype=torch.float32)
    return request_at(graph, model, **changes)


def answer(values, content: RecordDict | Request, kind: str = "train", **node) -> Message:
    """The reply of a client to one message; ``node`` is its node configuration."""
    node = {"partition-id": 0, "num-partitions": 2} | {
        key.replace("_", "-"): value for key, value in node.items()
    }
    grid = InProcessGrid(client_app.app, [node], values)
    records = write_request(content) if isinstance(content, Request) else content
    (reply,) = grid.send_and_receive([Message(records, grid.node_ids[0], kind, group_id="1")])
    return reply


def assert_refused(reply: Message, *words: str, code: int = REFUSED) -> None:
    assert reply.has_error() and reply.error.code == code
    assert reply.error.reason and "\n" not in reply.error.reason
    for word in words:
        assert word in reply.error.reason


def assert_bad_input(reply: Message, *words: str) -> None:
    """The reason is the plain message of a UserError."""
    assert_refused(reply, *words, code=BAD_INPUT)
    assert not reply.error.reason.startswith("UserError")


def test_training_is_answered_with_an_update(graph, values):
    reply = read_reply(answer(values, request_for(graph)).content, [4, 4])
    assert (reply.name, reply.partition, reply.version) == ("letters", 0, 0)
    assert reply.update and reply.usage and len(reply.residents) == 2


def test_an_evaluation_is_answered_with_numbers_alone(graph, values):
    reply = read_reply(answer(values, request_for(graph), "evaluate", partition_id=1).content, [4, 4])
    assert (reply.name, sorted(reply.numbers)) == ("digits", ["valid-nll", "valid-tokens"])
    assert (reply.update, reply.usage, reply.residents) == (b"", b"", [])


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_bad_input_is_an_error_reply_that_names_it(graph, values, tmp_path, kind):
    request = request_for(graph)
    other = save_tiny_graph(
        tmp_path / "other", load_tokenizer(str(graph)), num_experts=4, visits=2, features="up"
    )
    fresh = values | {"log-dir": str(tmp_path / "fresh")}  # data once read are not read again
    cases = [
        (answer(values | {"local-step": 3}, request, kind), ("unknown", "local-steps")),
        (answer(values | {"local-steps": 0}, request, kind), ("expected local-steps",)),
        (answer(values | {"graph": str(tmp_path / "none")}, request, kind), ("none")),
        (answer(values, request, kind, graph=str(tmp_path / "none")), ("none")),
        (answer(values, request, kind, graph=str(other)), ("other weights", str(other))),
        (answer(values, request_for(graph, base_fingerprint="x"), kind), ("other weights")),
        (
            answer(values, request, kind, expert_budget=5),
            ("from 1 to the graph's 4 experts", "letters"),
        ),
        (answer(values, request, kind, partition_id=2), ("partition-id from 0 to 1")),
        (answer(fresh, request, kind, data_dir=str(tmp_path / "none")), ("none")),
        (
            answer(values | {"log-dir": str(tmp_path / "x"), "block-size": 129}, request, kind),
            ("block-size"),
        ),
    ]
    for reply, words in cases:
        assert_bad_input(reply, *words)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_misspelt_node_key_is_an_error_reply_that_names_the_nearest(graph, values, tmp_path, kind):
    reply = answer(values, request_for(graph), kind, expert_buget=2)
    assert_bad_input(reply, "unknown node-config key 'expert-buget'", "'expert-budget'", "client 0")
    reply = answer(values, request_for(graph), kind, density=2.0)
    assert_bad_input(reply, "expected density to be a value less than or equal to 1", "client 0")
    assert not (tmp_path / "logs").exists()


def test_a_node_without_a_partition_is_an_error_reply(graph, values):
    grid = InProcessGrid(client_app.app, [{}], values)
    content = write_request(request_for(graph))
    (reply,) = grid.send_and_receive([Message(content, grid.node_ids[0], "train", group_id="1")])
    assert_bad_input(reply, "partition-id")


def test_a_message_that_cannot_be_read_is_an_error_reply(values):
    assert_refused(answer(values, RecordDict({})), "RefusedUpdate", "a request cannot be read")


def test_a_client_with_the_dense_base_alone_asks_for_the_recipe(
    tiny_graph_dir, tiny_llama_dir, values, tmp_path
):
    request, own = request_for(tiny_graph_dir), {
        "base": str(tiny_llama_dir),
        "cache_dir": str(tmp_path / "own"),
    }
    reply = answer(values, request, **own)
    assert reply.error.code == NEEDS_RECIPE and reply.error.reason.startswith("expected a recipe")
    recipe = read_recipe_file(str(tiny_graph_dir))
    assert not answer(values, replace(request, recipe=recipe), **own).has_error()
    assert not answer(values, request, "evaluate", **own).has_error()
    assert_bad_input(answer(values, replace(request, recipe=recipe[:-1]), base="none"), "recipe")
    assert_bad_input(answer(values, replace(request, recipe=recipe), base="none"), "got none")


def test_damaged_steps_and_other_graphs_are_refused_and_nothing_is_kept(graph, values, tmp_path):
    model = load_graph(str(graph), dtype=torch.float32)
    step = next_step(model, 1)
    apply_step(model, step)
    after = {"version": 1, "graph_hash": read_graph(model).digest()}
    broken = [
        ServerStep(1, step.packed[:-1]),
        ServerStep(1, b""),
        ServerStep(1, step.packed, [RemoveEdge(7, 0, 1)]),
    ]
    for each in broken:
        assert_refused(answer(values, request_for(graph, steps=[each], **after)), "RefusedUpdate")
    edited = request_for(graph, steps=[step], version=1, graph_hash="00" * 32)
    assert_refused(answer(values, edited), "RefusedUpdate", "expected the graph 000000000000")
    assert not list(tmp_path.rglob("global.safetensors"))
    assert not answer(values, request_for(graph, steps=[step], **after)).has_error()
    assert len(list(tmp_path.rglob("global.safetensors"))) == 1


def test_a_gap_in_the_steps_is_answered_with_the_version_held(graph, values):
    model = load_graph(str(graph), dtype=torch.float32)
    steps = []
    for version in (1, 2):
        steps.append(next_step(model, version))
        apply_step(model, steps[-1])
    for sent, version in ((steps[1:], 2), ([], 2), ([], 1), (steps[:1], 2), (steps, 3), ([], 2**62)):
        reply = answer(values, request_for(graph, steps=sent, version=version))
        assert (reply.error.code, reply.error.reason) == (RESEND, "0")
    assert not answer(values, request_for(graph, steps=steps[:1], version=1)).has_error()
    assert answer(values, request_for(graph, steps=[], version=2)).error.reason == "1"
    assert not answer(values, request_for(graph, steps=steps, version=2)).has_error()
    # A server that is behind starts over: only the base is common ground.
    assert answer(values, request_for(graph, steps=steps[:1], version=1)).error.reason == "0"
    assert not answer(values, request_for(graph, steps=steps[:1], version=1)).has_error()


def test_any_failure_on_the_way_is_an_error_reply(graph, values, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no memory\nat all")

    monkeypatch.setattr("clients.participant.train_locally", fail)
    assert_refused(answer(values, request_for(graph)), "MemoryError: no memory at all")


def test_a_learning_rate_out_of_bounds_is_the_users_affair(graph, values):
    values |= {"learning-rate": 1e30, "local-steps": 5}
    assert_bad_input(answer(values, request_for(graph)), "lower learning-rate")
