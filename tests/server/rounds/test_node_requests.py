"""Retries of the request protocol, with scripted answers in the place of a grid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from flwr.app import RecordDict

from federated.protocol.messages import NEEDS_RECIPE, Request, read_request
from server.rounds import node_requests
from server.rounds.exchange import Answer, Patience
from server.rounds.node_requests import NodeRequests, add_retries
from server.state.node_session import NodeSession

RECIPE = b"recipe"
REPLY = Answer(RecordDict({}), "", None, 10, 100)


def failed(error: str = "error", **changes) -> Answer:
    return replace(Answer(None, error, None, 1, 100), **changes)


@dataclass
class Model:
    version: int = 5
    recipe_bytes: bytes = RECIPE

    def recipe(self) -> bytes:
        return self.recipe_bytes


class Strategy:
    """Requests that name the version which the node was last known to hold."""

    def configure(self, global_model: Model, session: NodeSession, server_round: int) -> Request:
        return Request(server_round, global_model.version, f"held {session.held_version}", "")


@dataclass
class Script:
    """Answers of each exchange, and the requests that were sent for them."""

    exchanges: list[dict[int, Answer]]
    sent: list[dict[int, Request]] = field(default_factory=list)

    def __call__(self, grid: Any, contents: dict[int, RecordDict], message_type: str, **_: Any):
        self.sent.append({node: read_request(content) for node, content in contents.items()})
        answers = self.exchanges[len(self.sent) - 1]
        assert answers.keys() == contents.keys()
        return answers


@pytest.fixture
def ask(monkeypatch):
    def run(exchanges, sessions, model=None):
        script = Script(exchanges)
        monkeypatch.setattr(node_requests, "exchange", script)
        requests = NodeRequests(None, model or Model(), Strategy())  # type: ignore[arg-type]
        return requests.ask(sessions, "train", 3, Patience(1.0)), script.sent

    return run


def test_a_reply_shows_that_the_node_holds_the_current_version(ask):
    sessions = {1: NodeSession(held_version=4), 2: NodeSession(held_version=3)}
    answers, sent = ask([{1: REPLY, 2: failed()}], sessions)
    assert answers == {1: REPLY, 2: failed()} and len(sent) == 1
    assert [sessions[node].held_version for node in (1, 2)] == [5, 3]
    assert {node: request.graph_hash for node, request in sent[0].items()} == {1: "held 4", 2: "held 3"}
    assert {request.server_round for request in sent[0].values()} == {3}


def test_a_node_at_another_version_is_asked_again_from_there(ask):
    sessions = {1: NodeSession(held_version=4), 2: NodeSession(held_version=4)}
    answers, sent = ask([{1: REPLY, 2: failed(held_version=2)}, {2: REPLY}], sessions)
    assert [list(each) for each in sent] == [[1, 2], [2]]
    assert sent[1][2].graph_hash == "held 2"
    assert answers[2] == replace(REPLY, bytes_up=11, bytes_down=200)
    assert sessions[2].held_version == 5


def test_a_node_that_asks_for_steps_twice_is_given_up(ask):
    sessions = {1: NodeSession()}
    answers, sent = ask([{1: failed(held_version=2)}, {1: failed(held_version=1)}], sessions)
    assert len(sent) == 2
    assert answers[1].error == "holds version 1 after a resend" and sessions[1].held_version == 2


def test_a_node_without_the_graph_receives_the_recipe_and_then_the_steps(ask):
    sessions = {1: NodeSession(held_version=4)}
    exchanges = [{1: failed(error_code=NEEDS_RECIPE)}, {1: failed(held_version=0)}, {1: REPLY}]
    answers, sent = ask(exchanges, sessions)
    assert [each[1].recipe for each in sent] == [b"", RECIPE, b""]
    assert sent[2][1].graph_hash == "held 0"
    assert (answers[1].bytes_up, answers[1].bytes_down) == (12, 300)


def test_without_a_recipe_the_error_stays(ask):
    lacking = failed("no graph", error_code=NEEDS_RECIPE)
    answers, sent = ask([{1: lacking}], {1: NodeSession()}, Model(recipe_bytes=b""))
    assert answers == {1: lacking} and len(sent) == 1


def test_nodes_that_do_not_answer_rest_and_those_that_others_outran_do_not(ask):
    silent, outrun = failed(bytes_up=0), failed(bytes_up=0, surplus=True)
    sessions = {1: NodeSession(silence=1), 2: NodeSession(silence=1), 3: NodeSession(silence=1)}
    ask([{1: silent, 2: outrun, 3: failed()}], sessions)
    assert [sessions[node].silence for node in (1, 2, 3)] == [2, 1, 0]
    assert [sessions[node].rests_until for node in (1, 2, 3)] == [5, 0, 3]


def test_traffic_of_a_retry_adds_up_and_other_answers_stay():
    first = {1: failed(), 2: REPLY}
    assert add_retries(first, {1: REPLY}) == {1: replace(REPLY, bytes_up=11, bytes_down=200), 2: REPLY}
    assert first[1] == failed()
