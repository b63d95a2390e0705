from __future__ import annotations

import time

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from configs.errors import UserError
from federated.protocol.messages import NEEDS_RECIPE, RESEND, Reply, message_bytes, read_reply, write_reply
from server.flower.in_process_grid import Drop, InProcessGrid, Late
from server.rounds.exchange import Answer, Patience, exchange, wait_for_nodes
from server.rounds.reply_spool import ReplySpool

NODES = [{"partition-id": number} for number in range(3)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("server.rounds.exchange.POLL_SECONDS", 0.01)


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
    answers = exchange(grid, contents, "train", group="g", patience=Patience(timeout))
    return {grid.node_ids.index(node): answer for node, answer in answers.items()}


def numbers(answers: dict[int, Answer]) -> dict[int, object]:
    return {i: a.content["c"]["x"] if a.content else a.error for i, a in sorted(answers.items())}


def test_each_node_answers_its_own_content():
    answers = ask(grid_with())
    assert numbers(answers) == {0: 20, 1: 22, 2: 24}
    assert all(answer.error == "" and answer.held_version is None for answer in answers.values())
    for index, answer in answers.items():
        sent, received = (RecordDict({"c": ConfigRecord({"x": x})}) for x in (10 + index, 20 + 2 * index))
        # The envelope of the message counts, too.
        assert 0 < answer.bytes_down - message_bytes(sent) < 300
        assert 0 < answer.bytes_up - message_bytes(received) < 300


def test_bytes_are_those_that_the_grid_sees_errors_included():
    grid = grid_with(_1=Error(code=2, reason="x" * 500))
    answers = ask(grid)
    assert sum(answer.bytes_down for answer in answers.values()) == grid.bytes_down
    assert sum(answer.bytes_up for answer in answers.values()) == grid.bytes_up
    assert answers[1].bytes_up > 500


def test_packed_updates_go_to_disk_and_the_rest_stays(tmp_path):
    with ReplySpool(tmp_path) as spool:
        answers = exchange(
            *_reply_arguments(update=b"u" * 1000), group="g", patience=Patience(1), spool=spool
        )
        (answer,) = answers.values()
        assert answer.update.read() == b"u" * 1000
        reply = read_reply(answer.content, [4])
        assert (reply.update, reply.usage, reply.name) == (b"", b"v", "a")
    (plain,) = exchange(*_reply_arguments(update=b"u" * 1000), group="g", patience=Patience(1)).values()
    assert plain.update is None and read_reply(plain.content, [4]).update == b"u" * 1000
    assert plain.bytes_up == answer.bytes_up


def test_a_reply_with_much_beside_its_update_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("server.rounds.exchange.LARGEST_REST", 5000)
    for usage, refused in ((b"v" * 100, False), (b"v" * 5000, True)):
        with ReplySpool(tmp_path) as spool:
            arguments = _reply_arguments(update=b"u" * 9000, usage=usage)
            (answer,) = exchange(*arguments, group="g", patience=Patience(1), spool=spool).values()
        assert (answer.content is None) == refused
        assert answer.error.startswith("expected at most 5000 bytes apart from the update") == refused


def test_a_reply_that_stays_in_memory_is_bounded_as_a_whole(monkeypatch):
    monkeypatch.setattr("server.rounds.exchange.LARGEST_REST", 5000)
    for update, refused in ((b"u" * 100, False), (b"u" * 5000, True)):
        (answer,) = exchange(*_reply_arguments(update=update), group="g", patience=Patience(1)).values()
        assert (answer.content is None) == refused


def test_the_reason_of_an_error_is_one_short_plain_line():
    hostile = "\x1b[2J red\nnext\x00 " + "x" * 10**6
    answers = ask(grid_with(_0=Error(code=2, reason=hostile), _1=Error(code=2, reason="\x07 ")))
    assert answers[0].error.startswith("[2J red next xx") and len(answers[0].error) == 500
    assert answers[1].error == "Flower error 2"


def test_a_reply_from_another_node_than_asked_is_ignored():
    def forged(reply: Message) -> Message:
        reply.metadata.__dict__["_src_node_id"] = 4711
        return reply

    answers = ask(grid_with(_1=forged))
    assert numbers(answers) == {0: 20, 1: "no answer within 0 s", 2: 24}


def _reply_arguments(**arrays):
    app = ClientApp()

    @app.train()
    def train(message, context):
        reply = Reply("a", 0, 0, 0, "", {}, **({"usage": b"v"} | arrays))
        return Message(write_reply(reply), reply_to=message)

    grid = InProcessGrid(app, NODES[:1], {})
    return grid, {grid.node_ids[0]: RecordDict({})}, "train"


def test_replies_are_pulled_a_few_at_a_time():
    asked = []

    class Counting(InProcessGrid):
        def pull_messages(self, message_ids):
            asked.append(len(message_ids))
            return super().pull_messages(message_ids)

    grid = Counting(doubling_app(), [{"partition-id": number} for number in range(7)], {})
    assert len(ask(grid)) == 7
    assert max(asked) == 2


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
    assert numbers(answers) == {0: "café", 1: "no answer: Flower error 5", 2: 24}
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


@pytest.mark.parametrize(("code", "needs"), [(NEEDS_RECIPE, True), (RESEND, False), (2, False)])
def test_a_node_may_ask_for_the_recipe(code, needs):
    answer = ask(grid_with(_1=Error(code=code, reason="3")))[1]
    assert answer.needs_recipe == needs and answer.error == "3" and answer.content is None


def test_replies_to_messages_of_others_are_passed_over():
    class Haunted(InProcessGrid):
        """Returns every reply twice, and replies to unknown messages."""

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
    assert exchange(grid_with(), {}, "train", group="g", patience=Patience(1)) == {}


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


def patient(grid: InProcessGrid, patience: Patience) -> dict[int, Answer]:
    contents = {node: RecordDict({"c": ConfigRecord({"x": 1})}) for node in grid.node_ids}
    answers = exchange(grid, contents, "train", group="g", patience=patience)
    return {grid.node_ids.index(node): answer for node, answer in answers.items()}


def test_the_exchange_ends_with_enough_replies_and_errors_are_none():
    faults = {"_0": Error(code=2, reason="x"), "_2": Late(10**6)}
    answers = patient(grid_with(**faults), Patience(60, enough=1))
    assert answers[1].content is not None and not answers[1].surplus
    assert answers[0].error == "x" and not answers[0].silent and not answers[0].surplus
    assert answers[2].surplus and not answers[2].silent and answers[2].bytes_down > 0
    assert answers[2].error == "1 other clients answered first"


def test_after_the_deadline_a_quorum_is_enough_and_without_one_the_timeout_counts():
    answers = patient(grid_with(_2=Late(10**6)), Patience(60, deadline=0.1, quorum=2))
    assert answers[2].silent and "no answer within 0 s" in answers[2].error
    start = time.monotonic()
    answers = patient(grid_with(_2=Late(10**6)), Patience(0.4, deadline=0.1, quorum=3))
    assert time.monotonic() - start >= 0.4 and answers[2].silent


@pytest.mark.parametrize(
    "patience, replies, seconds, ends",
    [
        (Patience(10), 5, 9.9, False),
        (Patience(10), 0, 10, True),
        (Patience(10, enough=2), 1, 1, False),
        (Patience(10, enough=2), 2, 0, True),
        (Patience(10, deadline=3, quorum=2), 1, 5, False),
        (Patience(10, deadline=3, quorum=2), 2, 2.9, False),
        (Patience(10, deadline=3, quorum=2), 2, 3, True),
    ],
)
def test_patience_ends_with_replies_deadline_or_timeout(patience, replies, seconds, ends):
    assert patience.ends(replies, seconds) == ends
