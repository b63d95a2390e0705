"""The in-process Grid behaves as Flower's does, where tests rely on it."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from server.flower.in_process_grid import Drop, InProcessGrid, Late

NODES = [{"partition-id": i, "num-partitions": 3} for i in range(3)]


def counting_app() -> ClientApp:
    """Answers with its partition, how often it was called, and the array it got, doubled."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        calls = context.state.get("calls", ConfigRecord({"n": 0}))["n"] + 1
        context.state["calls"] = ConfigRecord({"n": calls})
        if context.run_config.get("fail") == context.node_config["partition-id"]:
            raise ValueError("no data")
        doubled = message.content["a"]["x"].numpy() * 2
        facts = ConfigRecord({"partition": context.node_config["partition-id"], "calls": calls})
        return Message(RecordDict({"f": facts, "a": ArrayRecord({"x": Array(doubled)})}), reply_to=message)

    return app


def exchange(grid: InProcessGrid, group: str = "1", timeout: float | None = None) -> dict[int, Message]:
    """One message to every node; replies by partition."""
    content = RecordDict({"a": ArrayRecord({"x": Array(np.arange(4.0))})})
    messages = [Message(content, node, "train", group_id=group) for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=timeout)
    return {grid.node_ids.index(reply.metadata.src_node_id): reply for reply in replies}


@pytest.mark.parametrize("wire", [True, False])
def test_every_node_answers_and_keeps_its_state(wire):
    grid = InProcessGrid(counting_app(), NODES, {}, wire=wire)
    for round_number in (1, 2):
        replies = exchange(grid, str(round_number))
        assert sorted(replies) == [0, 1, 2]
        for partition, reply in replies.items():
            assert dict(reply.content["f"]) == {"partition": partition, "calls": round_number}
            np.testing.assert_array_equal(reply.content["a"]["x"].numpy(), [0, 2, 4, 6])


def test_node_ids_do_not_follow_the_partitions():
    grid = InProcessGrid(counting_app(), NODES, {})
    assert grid.get_node_ids() != grid.node_ids


def test_wire_counts_at_least_the_array_bytes_each_way():
    grid = InProcessGrid(counting_app(), NODES[:1], {})
    exchange(grid)
    assert 4 * 8 < grid.bytes_down < 4000
    assert 4 * 8 < grid.bytes_up < 4000


@pytest.mark.parametrize("wire", [True, False])
def test_only_the_wire_hands_over_copies(wire):
    seen = []
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen.append(message.content["a"])
        return Message(RecordDict(), reply_to=message)

    record = ArrayRecord({"x": Array(np.arange(3.0))})
    grid = InProcessGrid(app, NODES[:1], {}, wire=wire)
    grid.send_and_receive([Message(RecordDict({"a": record}), grid.node_ids[0], "train", group_id="1")])
    assert (seen[0] is record) is not wire
    np.testing.assert_array_equal(seen[0]["x"].numpy(), [0, 1, 2])


def test_exception_in_the_app_becomes_an_error_reply():
    replies = exchange(InProcessGrid(counting_app(), NODES, {"fail": 1}))
    assert replies[1].has_error()
    assert replies[1].error.code == 2
    assert "no data" in replies[1].error.reason
    assert not replies[0].has_error()


def test_error_fault_replaces_the_reply_of_one_round():
    grid = InProcessGrid(counting_app(), NODES, {}, faults={(2, "1"): Error(code=8, reason="killed")})
    assert exchange(grid, "1")[2].error.code == 8
    assert exchange(grid, "2")[2].content["f"]["calls"] == 1


def test_dropped_reply_is_left_out_or_waited_for_in_vain():
    faults = {(0, "1"): Drop(), (0, "2"): Drop()}
    grid = InProcessGrid(counting_app(), NODES, {}, faults=faults)
    assert sorted(exchange(grid, "1", timeout=1.0)) == [1, 2]
    with pytest.raises(TimeoutError):
        exchange(grid, "2")


def test_late_reply_arrives_at_a_later_pull():
    grid = InProcessGrid(counting_app(), NODES[:1], {}, faults={(0, "1"): Late(pulls=2)})
    content = RecordDict({"a": ArrayRecord({"x": Array(np.ones(1))})})
    ids = grid.push_messages([Message(content, grid.node_ids[0], "train", group_id="1")])
    assert [len(grid.pull_messages(ids)) for _ in range(4)] == [0, 0, 1, 0]
    assert len(exchange(InProcessGrid(counting_app(), NODES, {}, faults={(0, "1"): Late(3)}))) == 3


def test_function_fault_changes_the_reply():
    def tamper(reply: Message) -> Message:
        reply.content["f"] = ConfigRecord({"calls": -1})
        return reply

    replies = exchange(InProcessGrid(counting_app(), NODES, {}, faults={(1, "1"): tamper}))
    assert replies[1].content["f"]["calls"] == -1


def test_a_reply_that_is_no_message_fails_the_test():
    app = ClientApp()
    app.train()(lambda message, context: "nonsense")
    with pytest.raises(AssertionError, match="not a Message"):
        exchange(InProcessGrid(app, NODES[:1], {}))
