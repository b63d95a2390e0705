from __future__ import annotations

import time

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from configs.errors import UserError
from federated.messages import RESEND, message_bytes
from server.exchange import Answer, exchange, wait_for_nodes
from tests.grid import Drop, InProcessGrid, Late

NODES = [{"partition-id": number} for number in range(3)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("server.exchange.POLL_SECONDS", 0.01)


def doubling_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = message.content["c"]["x"] * 2
        return Message(RecordDict({"c": ConfigRecord({"x": number})}), reply_to=message)

    return app


def grid_with(**faults) -> InProcessGrid:
    """Faults by node index, as ``_0=Drop()``."""
    return InProcessGrid(
        doubling_app(), NODES, {}, faults={(int(name[1:]), "g"): fault for name, fault in faults.items()}
    )


def ask(grid: InProcessGrid, timeout: float = 0.2) -> dict[int, Answer]:
    """Answers by node index; node i is sent ``10 + i``."""
    contents = {
        node: RecordDict({"c": ConfigRecord({"x": 10 + index})}) for index, node in enumerate(grid.node_ids)
    }
    answers = exchange(grid, contents, "train", group="g", timeout=timeout)
    return {grid.node_ids.index(node): answer for node, answer in answers.items()}


def numbers(answers: dict[int, Answer]) -> dict[int, object]:
    return {i: a.content["c"]["x"] if a.content else a.error for i, a in sorted(answers.items())}


def test_each_node_answers_its_own_content():
    answers = ask(grid_with())
    assert numbers(answers) == {0: 20, 1: 22, 2: 24}
    assert all(answer.error == "" and answer.held_version is None for answer in answers.values())
    for index, answer in answers.items():
        sent, received = (RecordDict({"c": ConfigRecord({"x": x})}) for x in (10 + index, 20 + 2 * index))
        assert (answer.bytes_down, answer.bytes_up) == (message_bytes(sent), message_bytes(received))


def test_a_reply_that_is_late_but_in_time_counts():
    assert numbers(ask(grid_with(_1=Late(3)))) == {0: 20, 1: 22, 2: 24}


def test_a_reply_that_never_comes_is_answered_for_after_the_timeout():
    started = time.monotonic()
    answers = ask(grid_with(_1=Drop(), _2=Late(10**6)), timeout=0.3)
    assert 0.3 <= time.monotonic() - started < 5
    assert numbers(answers) == {0: 20, 1: "no answer within 0 s", 2: "no answer within 0 s"}
    assert (answers[1].bytes_up, answers[1].content) == (0, None)
    assert answers[1].bytes_down == answers[2].bytes_down > 0


def test_without_stragglers_nobody_waits():
    started = time.monotonic()
    ask(grid_with(_0=Error(code=2, reason="x")), timeout=60)
    assert time.monotonic() - started < 10


def test_error_replies_become_their_reasons():
    answers = ask(grid_with(_0=Error(code=2, reason="café"), _1=Error(code=5, reason=None)))
    assert numbers(answers) == {0: "café", 1: "Flower error 5", 2: 24}
    assert answers[0].bytes_up == 5
    assert answers[0].held_version is None


@pytest.mark.parametrize(
    ("code", "reason", "held"),
    [
        (RESEND, "0", 0),
        (RESEND, "17", 17),
        (2, "17", None),
        (RESEND, "", None),
        (RESEND, "-1", None),
        (RESEND, "x", None),
        (RESEND, "²", None),
        (RESEND, "9" * 5000, None),
    ],
)
def test_only_a_resend_with_a_version_tells_what_is_held(code, reason, held):
    assert ask(grid_with(_1=Error(code=code, reason=reason)))[1].held_version == held


def test_replies_to_messages_of_others_are_passed_over():
    class Haunted(InProcessGrid):
        """Gives back every reply twice, and replies that nobody asked for."""

        def pull_messages(self, message_ids):
            arrived = super().pull_messages(message_ids)
            for reply in list(arrived):
                content = RecordDict({"c": ConfigRecord({"x": 666})})
                stray = Message(content, reply_to=reply)
                assert stray.metadata.reply_to_message_id not in message_ids
                arrived = [stray, reply, *arrived]
            return arrived

    grid = Haunted(doubling_app(), NODES, {})
    assert numbers(ask(grid)) == {0: 20, 1: 22, 2: 24}


def test_nobody_to_ask_is_no_answer():
    assert exchange(grid_with(), {}, "train", group="g", timeout=1) == {}


def test_the_first_nodes_in_order_are_taken():
    assert wait_for_nodes(grid_with(), 2, timeout=0) == [998, 999]
    assert wait_for_nodes(grid_with(), 3, timeout=0) == [998, 999, 1000]


def test_nodes_that_connect_later_are_waited_for():
    class Slow(InProcessGrid):
        asked = 0

        def get_node_ids(self):
            self.asked += 1
            return super().get_node_ids()[: self.asked]

    assert wait_for_nodes(Slow(doubling_app(), NODES, {}), 3, timeout=10) == [998, 999, 1000]


def test_too_few_nodes_are_the_users_affair():
    started = time.monotonic()
    with pytest.raises(UserError, match="expected 4 connected clients, got 3 within 0 s"):
        wait_for_nodes(grid_with(), 4, timeout=0.1)
    assert time.monotonic() - started < 5
