from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from federated.aggregation.combine import aggregate, summarize
from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply, detach_update, write_reply
from federated.updates.update import RefusedUpdate
from federated.wire.codec import packed_stats
from models.graph.graph_state import read_graph
from server.model.global_model import GlobalModel
from server.rounds.exchange import Answer
from server.rounds.reply_spool import ReplySpool, SpooledBytes
from server.rounds.validation import check_evaluations, check_numbers, check_replies
from tests.support.tiny_federation import packed_change, random_change, save_tiny_graph
from tests.support.tiny_graphs import graph_of

HELD = [np.array([True, False, True, False]), np.array([False, False, False, True])]
TRAINED = {(0, 0), (0, 2), (1, 3)}
NUMBERS = {"examples": 12.0, "train-loss": 1.5, "density": 0.5, "valid-nll": 3.0, "valid-tokens": 2.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_tokenizer) -> GlobalModel:
    graph = save_tiny_graph(
        tmp_path_factory.mktemp("round") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )
    return GlobalModel(str(graph))


@pytest.fixture
def reply(server) -> Reply:
    usage = [np.triu(np.arange(16).reshape(4, 4)), np.eye(4, dtype=np.int64)]
    return Reply(
        name="a",
        partition=0,
        budget=2,
        version=0,
        graph_hash=server.graph.digest(),
        numbers=NUMBERS,
        update=packed_change(server.model, random_change(server.model, [(0, 2), (1, 3)])),
        usage=pack_usage(usage),
        residents=HELD,
    )


def answer(reply: Reply) -> Answer:
    return Answer(write_reply(reply), "", None, 100, 200)


def refusal(server, reply: Reply | Answer) -> str:
    """Why a single reply is refused; empty if it is accepted."""
    replies = check_replies({7: reply if isinstance(reply, Answer) else answer(reply)}, server)
    assert len(replies.accepted) + len(replies.refused) == 1
    return replies.refused.get(7, "")


def test_a_good_reply_becomes_a_contribution(server, reply):
    replies = check_replies({7: answer(replace(reply, inclusion={"0.2": 0.25}))}, server)
    (accepted,) = replies.accepted
    assert replies.refused == {} and accepted.node == 7
    contribution = accepted.contribution
    assert contribution.weight == 12.0
    assert contribution.shipped == summarize(contribution.unpacked())
    assert contribution.shipped.units == {(0, 2), (1, 3)}
    assert contribution.trained == TRAINED
    assert contribution.inclusion == {(0, 2): 0.25}
    assert accepted.usage[1].tolist() == np.eye(4).tolist()
    assert accepted.stats == packed_stats(reply.update)


def test_clients_come_in_order_of_their_partitions(server, reply):
    answers = {
        node: answer(replace(reply, partition=partition)) for node, partition in ((1, 2), (2, 0), (3, 1))
    }
    replies = check_replies(answers, server)
    assert [(each.reply.partition, each.node) for each in replies.accepted] == [(0, 2), (1, 3), (2, 1)]


def test_a_second_answer_of_the_same_client_is_refused(server, reply):
    replies = check_replies({9: answer(reply), 4: answer(reply)}, server)
    assert [each.node for each in replies.accepted] == [4]
    assert replies.refused == {9: "client 0 has answered already, from another node"}


def test_a_node_stays_the_client_that_it_was(server, reply):
    known = {4: 1, 9: 0}
    replies = check_replies({4: answer(reply), 9: answer(reply)}, server, partitions=known)
    assert [each.node for each in replies.accepted] == [9]
    assert replies.refused == {4: "client 0 has answered already, from another node"}
    replies = check_replies({4: answer(replace(reply, partition=2))}, server, partitions=known)
    assert replies.refused == {4: "expected an answer of client 1, got one of client 2"}
    fresh = check_replies({5: answer(replace(reply, partition=2))}, server, partitions=known)
    assert [each.node for each in fresh.accepted] == [5]
    assert "number 0 or above" in refusal(server, replace(reply, partition=-1))


def test_clients_weigh_by_examples_or_by_tokens(server, reply):
    spoken = answer(replace(reply, numbers=NUMBERS | {"train-tokens": 640.0}))
    for client_weight, weight in (("examples", 12.0), ("tokens", 640.0)):
        (accepted,) = check_replies({7: spoken}, server, client_weight=client_weight).accepted
        assert accepted.contribution.weight == weight
    silent = check_replies({7: answer(reply)}, server, client_weight="tokens")
    assert silent.refused == {7: "expected the number train-tokens, got none"}


@pytest.mark.parametrize("examples", [0.0, 0.5, 1e13, 1e300])
def test_weights_that_no_client_has_are_refused(server, reply, examples):
    reason = refusal(server, replace(reply, numbers=NUMBERS | {"examples": examples}))
    assert reason == f"expected examples from 1 to {2**40}, got {examples}"


@pytest.mark.parametrize("scale", [1e5, 1e9])
def test_absurd_changes_are_refused_and_the_rest_counts(server, reply, scale):
    update = packed_change(server.model, random_change(server.model, [(0, 2)], scale=scale))
    loud, good = replace(reply, update=update, partition=1), answer(reply)
    replies = check_replies({1: answer(loud), 2: good}, server)
    assert [each.node for each in replies.accepted] == [2]
    assert "expected changes of at most 65504" in replies.refused[1]


@pytest.mark.parametrize("combine", ["entrywise", "hajek", "horvitz-thompson", "mean"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_whatever_is_accepted_gives_a_finite_step(server, reply, combine, clip):
    """The largest changes, weights and the smallest probabilities that pass, beside an ordinary client."""
    loudest = random_change(server.model, [(0, 2)], scale=1.0)
    loudest = {unit: vector.sign() * 65504 for unit, vector in loudest.items()}
    extreme = replace(
        reply,
        partition=1,
        numbers=NUMBERS | {"examples": 2.0**40},
        inclusion={"0.2": 2.0**-20},
        update=packed_change(server.model, loudest, value_bits=16),
    )
    replies = check_replies({1: answer(extreme), 2: answer(reply)}, server)
    assert len(replies.accepted) == 2
    contributions = [each.contribution for each in replies.accepted]
    step = aggregate(contributions, combine=combine, clip_norm_multiple=clip)
    assert all(torch.isfinite(vector).all() for vector in step.values())


def test_updates_on_disk_are_unpacked_anew_and_never_held(server, reply, tmp_path):
    with ReplySpool(tmp_path) as spool:
        content, update = detach_update(write_reply(reply))
        kept = spool.put(update)
        (accepted,) = check_replies({7: Answer(content, "", None, 1, 1, kept)}, server).accepted
        assert accepted.reply.update == b"" and accepted.stats == packed_stats(reply.update)
        first, second = accepted.contribution.unpacked(), accepted.contribution.unpacked()
        assert first is not second and first == second
        (in_memory,) = check_replies({7: answer(reply)}, server).accepted
        assert in_memory.contribution.unpacked() == first
    with pytest.raises(FileNotFoundError):
        accepted.contribution.unpacked()


def test_an_update_larger_than_the_model_is_refused_unread(server, reply, tmp_path):
    content, _ = detach_update(write_reply(reply))
    huge = SpooledBytes(tmp_path / "absent", 10**9)
    replies = check_replies({7: Answer(content, "", None, 1, 1, huge)}, server)
    assert "expected an update of at most" in replies.refused[7]


def test_a_refusal_is_logged(server, reply, caplog):
    with caplog.at_level("WARNING"):
        refusal(server, replace(reply, version=3))
    assert "the reply of node 7 is refused: expected an update of version 0" in caplog.text


def test_a_refused_reply_does_not_take_the_place_of_a_good_one(server, reply):
    replies = check_replies({1: answer(replace(reply, version=9)), 2: answer(reply)}, server)
    assert [each.node for each in replies.accepted] == [2] and list(replies.refused) == [1]


def test_an_error_is_refused_with_its_reason(server):
    assert refusal(server, Answer(None, "no answer within 5 s", None, 0, 1)) == "no answer within 5 s"


@pytest.mark.parametrize("version", [-1, 1, 7])
def test_an_update_of_another_version_is_refused(server, reply, version):
    expected = f"expected an update of version 0, got one of version {version}"
    assert refusal(server, replace(reply, version=version)) == expected


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_cannot_be_are_refused(server, reply, name, value):
    assert f"expected {name} to be a finite number" in refusal(
        server, replace(reply, numbers=NUMBERS | {name: value})
    )


@pytest.mark.parametrize("name", ["examples", "train-loss", "density"])
def test_numbers_that_the_round_needs_must_be_there(server, reply, name):
    numbers = {key: value for key, value in NUMBERS.items() if key != name}
    assert refusal(server, replace(reply, numbers=numbers)) == f"expected the number {name}, got none"


def test_an_update_of_an_expert_that_is_not_held_is_refused(server, reply):
    update = packed_change(server.model, random_change(server.model, [(0, 1), (0, 2)]))
    assert (
        refusal(server, replace(reply, update=update))
        == "expected updates of resident experts only, got (0, 1)"
    )


def test_residents_of_another_number_of_layers_are_refused(server, reply):
    expected = "expected the residents of 2 layers, got 0"
    assert refusal(server, replace(reply, residents=[])) == expected
    assert "residency bits" in refusal(server, replace(reply, residents=HELD[:1]))


def test_residents_of_another_number_of_experts_are_refused(server, reply):
    assert "residency bits" in refusal(server, replace(reply, residents=[np.ones(9, dtype=bool), HELD[1]]))


def test_an_update_of_another_graph_is_refused(server, reply):
    other = graph_of()
    other.expert_layers()[0].edges[0, 3] ^= True
    update = packed_change(other, random_change(other, [(0, 2)]))
    assert "graph hash" in refusal(server, replace(reply, update=update))
    assert "expected the graph" in refusal(server, replace(reply, graph_hash="f" * 64))
    other.config.graph_version = 4
    update = packed_change(other, random_change(other, [(0, 2)]))
    assert "graph version 4, expected 0" in refusal(server, replace(reply, update=update))


def test_any_changed_byte_of_an_update_is_refused(server, reply):
    for position in range(0, len(reply.update), 41):
        damaged = bytearray(reply.update)
        damaged[position] ^= 0x10
        assert refusal(server, replace(reply, update=bytes(damaged))), position
    assert refusal(server, replace(reply, update=reply.update[:-1]))
    assert refusal(server, replace(reply, update=b""))


@pytest.mark.parametrize("usage", [b"", b"\x00", b"\x01" + b"\xff" * 30])
def test_damaged_usage_is_refused(server, reply, usage):
    assert refusal(server, replace(reply, usage=usage))


@pytest.mark.parametrize(
    "inclusion",
    [
        {"0.1": 0.5},
        {"0.2": 0.0},
        {"0.2": 1e-9},
        {"0.2": 1.5},
        {"0": 0.5},
        {"a.b": 0.5},
        {"².²": 0.5},
        {"-1.2": 0.5},
    ],
)
def test_probabilities_that_cannot_be_are_refused(server, reply, inclusion):
    assert "inclusion probability of a resident expert" in refusal(
        server, replace(reply, inclusion=inclusion)
    )


def test_a_content_that_is_no_reply_is_refused(server):
    for content in (RecordDict({}), RecordDict({"info": ConfigRecord({"name": "x"})})):
        assert "a reply cannot be read" in refusal(server, Answer(content, "", None, 1, 1))


def test_checking_leaves_the_model_alone(server, reply):
    before = {name: value.clone() for name, value in server.model.state_dict().items()}
    check_replies({1: answer(reply)}, server)
    assert all(torch.equal(value, before[name]) for name, value in server.model.state_dict().items())
    assert read_graph(server.model).version == 0


def test_zero_is_a_number_and_an_evaluation_needs_none(reply):
    check_numbers(replace(reply, numbers={"valid-nll": 0.0}))
    check_numbers(replace(reply, numbers={}))
    with pytest.raises(RefusedUpdate, match="valid-nll"):
        check_numbers(replace(reply, numbers={"valid-nll": -0.5}))


def test_evaluations_of_another_model_or_client_are_refused(server, reply):
    plain = replace(
        reply, update=b"", usage=b"", residents=[], numbers={"valid-nll": 2.0, "valid-tokens": 1.0}
    )
    answers = {
        1: answer(plain),
        2: answer(replace(plain, partition=1, version=5)),
        3: answer(replace(plain, partition=2, graph_hash="0" * 64)),
        4: answer(plain),
        5: answer(replace(plain, partition=4, numbers={"valid-nll": float("nan")})),
        6: answer(replace(plain, partition=9)),
        7: Answer(None, "away", None, 0, 1),
    }
    checked = check_evaluations(answers, server, {6: 6})
    assert checked[1] is answers[1] and checked[7] is answers[7] and len(checked) == 7
    assert all(checked[node].content is None for node in (2, 3, 4, 5, 6))
    assert [checked[node].error.split(",")[0] for node in (2, 4, 6)] == [
        "expected an update of version 0",
        "client 0 has answered already",
        "expected an answer of client 6",
    ]
    assert checked[2].bytes_up == answers[2].bytes_up
