from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.support.robustness.attacks import (
    ATTACKS,
    AttackedApp,
    Victim,
    flipped,
    lied,
    not_a_number,
    random,
    scaled,
    stolen,
)
from federated.aggregation.usage import pack_usage, unpack_usage
from federated.protocol.messages import Reply, read_reply, write_reply
from federated.protocol.reply_bounds import NUMBERS, check_reply
from federated.updates.update import RefusedUpdate, SparseUpdate, SparseVector
from federated.wire.codec import pack_update, unpack_update
from server.flower.in_process_grid import InProcessGrid
from tests.support.tiny_federation import node_context

VICTIM = Victim([4, 4], {(0, 1): 64, (1, -1): 8}, 10)
VALUES = np.linspace(-1, 1, 32).astype(np.float32)
UPDATE = SparseUpdate(3, "h", {(0, 1): SparseVector(64, range(0, 64, 2), VALUES)})
REPLY = Reply(
    name="client-1",
    partition=1,
    budget=0,
    version=3,
    graph_hash="h",
    numbers={"examples": 12.0, "train-loss": 1.5, "train-tokens": 99.0},
    update=pack_update(UPDATE, value_bits=16),
    usage=pack_usage([np.eye(4, dtype=np.int64)] * 2),
    residents=[np.ones(4, dtype=bool)] * 2,
)


def values(reply: Reply) -> np.ndarray:
    vector = unpack_update(reply.update, sizes=VICTIM.sizes, graph_version=3, graph_hash="h").vectors[0, 1]
    assert vector.indices.tolist() == list(range(0, 64, 2))
    return vector.values


def test_updates_are_scaled_or_flipped():
    assert values(scaled(REPLY, VICTIM)) == pytest.approx(100 * VALUES, abs=1.0)
    assert values(flipped(REPLY, VICTIM)) == pytest.approx(-10 * VALUES, abs=0.1)
    assert values(lied(REPLY, VICTIM)) == pytest.approx(-VALUES, abs=0.01)


def test_random_values_are_ten_times_as_large_and_differ_by_round():
    drawn = values(random(REPLY, VICTIM))
    assert 5 < np.sqrt(np.mean(drawn**2)) / np.sqrt(np.mean(VALUES**2)) < 20
    assert np.array_equal(drawn, values(random(REPLY, VICTIM)))
    later = values(random(replace(REPLY, version=4), VICTIM))
    assert not np.allclose(drawn, later)


def test_lies_are_within_the_bounds_and_nan_is_not():
    lie = lied(REPLY, VICTIM)
    check_reply(lie, num_experts=4)
    assert lie.numbers["examples"] == NUMBERS["examples"].most
    for counts in unpack_usage(lie.usage, [4, 4]):
        assert counts[0, 3] == 2**32 - 1 == counts.sum()
    with pytest.raises(RefusedUpdate, match="got nan"):
        check_reply(not_a_number(REPLY, VICTIM), num_experts=4)


def test_a_thief_answers_as_another_client():
    theft = stolen(REPLY, VICTIM)
    assert theft.partition == 8 and theft.update == flipped(REPLY, VICTIM).update


def test_only_training_replies_of_attackers_are_altered():
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 2:
            return Message(Error(code=100, reason="away"), reply_to=message)
        return Message(write_reply(REPLY), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return Message(write_reply(REPLY), reply_to=message)

    InProcessGrid(app, [], {})  # Flower builds messages within a run only
    attacked = AttackedApp(app, [0, 2], ATTACKS["stolen"], VICTIM)

    def partition(client: int, kind: str) -> int | str:
        answer = attacked(Message(RecordDict({}), 1, kind), node_context(client))
        return answer.error.reason if answer.has_error() else read_reply(answer.content, [4, 4]).partition

    assert [partition(client, "train") for client in (0, 1, 2)] == [8, 1, "away"]
    assert partition(0, "evaluate") == 1
