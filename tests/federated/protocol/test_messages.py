from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from configs.errors import UserError
from experts.graph.edits import AddEdge
from federated.protocol.messages import (
    BAD_INPUT,
    NEEDS_RECIPE,
    REFUSED,
    RESEND,
    Reply,
    Request,
    detach_update,
    message_bytes,
    raise_bad_input,
    read_reply,
    read_request,
    write_reply,
    write_request,
)
from federated.protocol.steps import ServerStep
from federated.updates.update import RefusedUpdate
from server.flower.in_process_grid import InProcessGrid, over_the_wire

EXPERTS = [4, 9]
REQUEST = Request(
    server_round=3,
    version=12,
    graph_hash="ab12",
    base_fingerprint="cd34",
    steps=[
        ServerStep(9, b"\x00\x01\xff", [AddEdge(0, 1, 2, "é")]),
        ServerStep(10, b""),
        ServerStep(11, b"x"),
    ],
    last=True,
    accepted_round=2,
    copy_hash="ef56",
    snapshot=b"\x00snapshot",
)
REPLY = Reply(
    name="client é",
    partition=1,
    budget=2,
    version=12,
    graph_hash="ab12",
    numbers={"valid-nll": 1.25, "examples": 3.0},
    update=b"\x00update",
    usage=b"usage",
    residents=[np.array([1, 0, 1, 0], dtype=bool), np.array([0, 1, 1, 0, 0, 0, 0, 0, 1], dtype=bool)],
    inclusion={"0.2": 0.1},
)
HOSTILE: list[Any] = [
    "",
    "x",
    "-1",
    "9" * 5000,
    -1,
    2**62,
    1.5,
    float("inf"),
    float("nan"),
    b"\xff",
    True,
    [],
    [1, 2],
    ["a"],
]


@pytest.fixture(autouse=True)
def _within_a_run():
    InProcessGrid(ClientApp(), [], {})  # Flower builds messages within a run only


def crossed(content: RecordDict) -> RecordDict:
    """The content after it was serialized and restored as Flower does."""
    return over_the_wire(Message(content, dst_node_id=1, message_type="train"))[0].content


def same(one: Reply, other: Reply) -> bool:
    held = [np.array_equal(left, right) for left, right in zip(one.residents, other.residents, strict=True)]
    fields = "name partition budget version graph_hash numbers update usage".split()
    return all(held) and all(getattr(one, field) == getattr(other, field) for field in fields)


def test_a_request_survives_the_wire():
    assert read_request(crossed(write_request(REQUEST))) == REQUEST
    plain = Request(server_round=1, version=0, graph_hash="", base_fingerprint="")
    assert read_request(crossed(write_request(plain))) == Request(1, 0, "", "", steps=[], last=False)


def test_a_snapshot_costs_no_byte_where_none_is_sent():
    assert "snapshot" not in write_request(Request(1, 0, "", ""))
    assert read_request(crossed(write_request(Request(1, 0, "", "", snapshot=b"s")))).snapshot == b"s"


def test_a_recipe_costs_no_byte_where_none_is_sent():
    plain = Request(1, 0, "", "")
    asked = Request(1, 0, "", "", recipe=bytes(1000))
    assert "recipe" not in write_request(plain)
    assert read_request(crossed(write_request(asked))).recipe == bytes(1000)
    extra = message_bytes(write_request(asked)) - message_bytes(write_request(plain))
    assert 1000 < extra < 1500


def test_a_continued_run_tells_each_client_its_last_accepted_round():
    request = Request(5, 0, "", "", accepted_round=3, run_id=2**64 - 1, accepted_rounds={0: 4, 7: 2})
    assert read_request(crossed(write_request(request))) == Request(
        5, 0, "", "", steps=[], accepted_round=3, run_id=2**64 - 1, accepted_rounds={0: 4, 7: 2}
    )
    assert [request.of_partition(client).accepted_round for client in (0, 7, 1)] == [4, 2, 3]
    plain = write_request(Request(5, 0, "", ""))["config"]
    assert not {"run-id", "accepted-rounds"} & set(plain)


def test_steps_come_in_order_of_their_versions():
    shuffled = Request(1, 11, "", "", steps=REQUEST.steps[::-1])
    assert [step.version for step in read_request(write_request(shuffled)).steps] == [9, 10, 11]


def test_a_reply_survives_the_wire():
    reply = read_reply(crossed(write_reply(REPLY)), EXPERTS)
    assert same(reply, REPLY) and reply.inclusion == REPLY.inclusion
    assert [held.dtype for held in reply.residents] == [np.dtype(bool)] * 2


def test_a_reply_to_an_evaluation_holds_numbers_only():
    plain = Reply("a", 0, 0, 0, "", {"valid-nll": 2.0})
    reply = read_reply(crossed(write_reply(plain)), EXPERTS)
    assert same(reply, plain) and (reply.residents, reply.inclusion) == ([], {})


@pytest.mark.parametrize("experts", [1, 7, 8, 9, 64, 65])
def test_residents_of_any_number_of_experts_come_back(experts):
    held = [np.arange(experts) % 3 == 0]
    reply = read_reply(write_reply(Reply("a", 0, 0, 0, "", {}, residents=held)), [experts])
    assert np.array_equal(reply.residents[0], held[0])


@pytest.mark.parametrize("experts", [[12, 9], [4, 8], [4, 17], [17, 9]])
def test_residents_of_another_graph_are_refused(experts):
    with pytest.raises(RefusedUpdate, match="residency bits"):
        read_reply(write_reply(REPLY), experts)


def test_a_message_weighs_what_flower_serializes_without_its_envelope():
    for content in (write_request(REQUEST), write_reply(REPLY)):
        message = Message(content, dst_node_id=1, message_type="train")
        _, whole = over_the_wire(message)
        assert message_bytes(content) == whole - len(message.deflate())
        assert message_bytes(message) == whole


def test_a_reply_is_told_apart_from_its_update():
    content = crossed(write_reply(REPLY))
    rest, update = detach_update(content)
    assert update == b"\x00update"
    assert same(read_reply(rest, EXPERTS), replace(REPLY, update=b""))
    assert read_reply(content, EXPERTS).update == update  # the reply itself stays whole
    for other in (RecordDict({}), RecordDict({"arrays": ConfigRecord({"update": 1})})):
        assert detach_update(other) == (other, b"")


def test_the_weight_grows_with_the_array():
    def weight(size: int) -> int:
        random = np.random.default_rng(size).bytes(size)
        return message_bytes(write_reply(Reply("a", 0, 0, 0, "", {}, update=random)))

    small, large = weight(1000), weight(101_000)
    assert small > 1000
    assert 100_000 <= large - small < 100_100


@pytest.mark.parametrize("code", [BAD_INPUT, NEEDS_RECIPE])
@pytest.mark.parametrize("reason", ["expected a: b, got c", "x", "UserError: x"])
def test_a_user_error_of_a_client_is_raised_again(code, reason):
    with pytest.raises(UserError) as caught:
        raise_bad_input(code, reason)
    assert str(caught.value) == reason


@pytest.mark.parametrize("code", [0, 2, REFUSED, RESEND, BAD_INPUT + 1])
@pytest.mark.parametrize("reason", ["", "KeyError: UserError: x", "no answer", "UserError: x", "UserError"])
def test_other_codes_raise_nothing(code, reason):
    raise_bad_input(code, reason)


def broken_copies(content: RecordDict):
    """Every way in which one record or one field of a message can be missing or of another kind."""
    kinds: tuple[Any, ...] = (ArrayRecord, MetricRecord, ConfigRecord)
    for name, record in content.items():
        yield without(content, name), f"no {name}"
        keys, make = list(record), type(record)  # type: Any, Any
        values: dict[Any, dict] = {
            ArrayRecord: {key: Array("float32", (3,), "x", b"\x00\x01") for key in keys},
            MetricRecord: dict.fromkeys(keys, 1.5),
            ConfigRecord: dict.fromkeys(keys, "x"),
        }
        for kind in kinds:
            yield with_record(content, name, kind()), f"empty {kind.__name__} as {name}"
            yield with_record(content, name, kind(values[kind])), f"{kind.__name__} as {name}"
        for key in keys:
            yield with_record(content, name, make({k: record[k] for k in keys if k != key})), f"no {key}"
            for value in hostile_values(record):
                changed = make({k: value if k == key else record[k] for k in keys})
                yield with_record(content, name, changed), f"{key}: {value!r}"


def hostile_values(record) -> list[Any]:
    if isinstance(record, ArrayRecord):
        return [Array("uint8", (len(data),), "x", data) for data in (b"", b"\x00" * 99, b"\xff")]
    if isinstance(record, MetricRecord):
        return [-1, 2**62, float("inf"), float("nan"), [], [1.0, 2.0]]
    return HOSTILE


def without(content: RecordDict, name: str) -> RecordDict:
    return RecordDict({key: record for key, record in content.items() if key != name})


def with_record(content: RecordDict, name: str, record) -> RecordDict:
    return RecordDict({**content, name: record})


@pytest.mark.parametrize("kind", ["request", "reply"])
def test_a_malformed_message_is_refused_or_read_and_nothing_else(kind):
    content = write_request(REQUEST) if kind == "request" else write_reply(REPLY)
    before = copy.deepcopy(content)
    read = read_request if kind == "request" else (lambda records: read_reply(records, EXPERTS))
    refused = set()
    for broken, label in broken_copies(content):
        try:
            result = read(broken)
        except RefusedUpdate as error:
            assert error.reason.strip() and "\n" not in error.reason[:100]
            refused.add(label)
        else:
            assert isinstance(result, Request | Reply)
    assert content == before
    must = {"no config", "no steps", "no version", "no edits-10"}
    if kind == "reply":
        must = {"no arrays", "no info", "no numbers", "no update", "no partition"}
    assert must <= refused
    assert {label for label in refused if label.startswith("version: ")} >= {
        "version: ''",
        "version: 'x'",
        "version: inf",
        "version: nan",
        "version: []",
    }
