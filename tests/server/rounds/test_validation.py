from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from configs.run_views import Combine
from configs.schema import RunConfig
from federated.aggregation.combine import aggregate
from federated.aggregation.contribution import summarize
from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply, detach_update, write_reply
from federated.wire.codec import packed_stats
from models.graph.graph_state import read_graph
from models.runtime.perplexity import LossSum
from server.model.global_model import GlobalModel
from server.rounds.exchange import Answer
from server.rounds.reply_spool import ReplySpool, SpooledBytes
from server.rounds.validation import (
    RoundReplies,
    check_evaluations,
    check_replies,
    held_out_loss,
    total_loss,
)
from server.state.federation_state import FederationState
from server.strategies.sam_v2 import sam_v2
from tests.support.tiny_federation import packed_change, random_change, save_tiny_graph
from tests.support.tiny_graphs import graph_of

HELD = [np.array([True, False, True, False]), np.array([False, False, False, True])]
TRAINED = {(0, 0), (0, 2), (1, 3)}
NUMBERS = {"examples": 12.0, "train-loss": 1.5, "density": 0.5, "valid-nll": 3.0, "valid-tokens": 2.0}


@pytest.fixture(scope="module")
def global_model(tmp_path_factory, tiny_tokenizer) -> GlobalModel:
    graph = save_tiny_graph(
        tmp_path_factory.mktemp("round") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )
    return GlobalModel(str(graph))


@pytest.fixture
def reply(global_model) -> Reply:
    usage = [np.triu(np.arange(16).reshape(4, 4)), np.eye(4, dtype=np.int64)]
    return Reply(
        name="a",
        partition=0,
        budget=2,
        version=0,
        graph_hash=global_model.graph.digest(),
        numbers=NUMBERS,
        update=packed_change(global_model.model, random_change(global_model.model, [(0, 2), (1, 3)])),
        usage=pack_usage(usage),
        residents=HELD,
    )


def answer(reply: Reply) -> Answer:
    return Answer(write_reply(reply), "", None, 100, 200)


def checked(answers, global_model, *, partitions=None, **config) -> RoundReplies:
    """The answers after validation with a strategy of this configuration."""
    strategy = sam_v2(RunConfig(**config))
    return check_replies(answers, global_model, strategy, partitions=partitions)


def refusal(global_model, reply: Reply | Answer) -> str:
    """Why a single reply is refused; empty if it is accepted."""
    replies = checked({7: reply if isinstance(reply, Answer) else answer(reply)}, global_model)
    assert len(replies.accepted) + len(replies.refused) == 1
    return replies.refused.get(7, "")


def test_a_good_reply_becomes_a_contribution(global_model, reply):
    replies = checked({7: answer(replace(reply, inclusion={"0.2": 0.25}))}, global_model)
    (accepted,) = replies.accepted
    assert replies.refused == {} and accepted.node == 7
    contribution = accepted.contribution
    assert contribution.weight == 12.0
    assert contribution.summary == summarize(contribution.unpack())
    assert contribution.summary.keys() == {(0, 2), (1, 3)}
    assert contribution.trained == TRAINED
    assert contribution.inclusion == {(0, 2): 0.25}
    assert accepted.usage[1].tolist() == np.eye(4).tolist()
    assert accepted.stats == packed_stats(reply.update)


def test_clients_come_in_order_of_their_partitions(global_model, reply):
    answers = {
        node: answer(replace(reply, partition=partition)) for node, partition in ((1, 2), (2, 0), (3, 1))
    }
    replies = checked(answers, global_model)
    assert [(each.reply.partition, each.node) for each in replies.accepted] == [(0, 2), (1, 3), (2, 1)]


def test_a_second_answer_of_the_same_client_is_refused(global_model, reply):
    replies = checked({9: answer(reply), 4: answer(reply)}, global_model)
    assert [each.node for each in replies.accepted] == [4]
    assert replies.refused == {9: "client 0 has answered already, from another node"}


def test_a_node_stays_the_client_that_it_was(global_model, reply):
    known = {4: 1, 9: 0}
    replies = checked({4: answer(reply), 9: answer(reply)}, global_model, partitions=known)
    assert [each.node for each in replies.accepted] == [9]
    assert replies.refused == {4: "client 0 has answered already, from another node"}
    replies = checked({4: answer(replace(reply, partition=2))}, global_model, partitions=known)
    assert replies.refused == {4: "expected an answer of client 1, got one of client 2"}
    fresh = checked({5: answer(replace(reply, partition=2))}, global_model, partitions=known)
    assert [each.node for each in fresh.accepted] == [5]
    assert "expected partition to be a whole number from 0" in refusal(
        global_model, replace(reply, partition=-1)
    )


def test_a_client_stays_with_its_node_in_a_run_that_is_continued(global_model, reply):
    """Until that node is gone: a restarted node has another id."""
    state = FederationState()
    state.connect([4, 9])
    state.accept(9, 0)
    restored = FederationState.from_bytes(state.to_bytes())
    restored.connect([4, 9])
    theft = {4: answer(reply)}
    replies = checked(theft, global_model, partitions=restored.partitions())
    assert replies.refused == {4: "client 0 has answered already, from another node"}
    evaluations = check_evaluations(theft, global_model, restored.partitions())
    assert evaluations.refused == replies.refused
    both = checked({4: answer(reply), 9: answer(reply)}, global_model, partitions=restored.partitions())
    assert [each.node for each in both.accepted] == [9]
    restored.connect([4, 12])
    replies = checked({12: answer(reply)}, global_model, partitions=restored.partitions())
    assert [each.node for each in replies.accepted] == [12]


def test_clients_weigh_by_examples_or_by_tokens(global_model, reply):
    spoken = answer(replace(reply, numbers=NUMBERS | {"train-tokens": 640.0}))
    for client_weight, weight in (("examples", 12.0), ("tokens", 640.0)):
        (accepted,) = checked({7: spoken}, global_model, client_weight=client_weight).accepted
        assert accepted.contribution.weight == weight
    silent = checked({7: answer(reply)}, global_model, client_weight="tokens")
    assert silent.refused == {7: "expected the number train-tokens, got none"}


@pytest.mark.parametrize("examples", [0.0, 0.5, 2.5, 1e13, 1e300])
def test_weights_that_no_client_has_are_refused(global_model, reply, examples):
    reason = refusal(global_model, replace(reply, numbers=NUMBERS | {"examples": examples}))
    assert reason == f"expected examples to be a whole number from 1 to {2**40}, got {examples}"


def test_a_claimed_weight_is_capped_against_the_median_of_the_round(global_model, reply):
    """A claim of 2**40 examples outweighed all other clients."""
    claims = {1: 10.0, 2: 2.0**40, 3: 12.0, 4: 30.0}
    answers = {
        node: answer(replace(reply, partition=node, numbers=NUMBERS | {"examples": claim}))
        for node, claim in claims.items()
    }
    for cap, expected in ((2.0, [10, 24, 12, 24]), (0.0, [10, 2**40, 12, 30])):
        strategy = sam_v2(RunConfig())
        replies = check_replies(answers, global_model, strategy, weight_cap=cap)
        assert [each.contribution.weight for each in replies.accepted] == expected
    pair = check_replies({node: answers[node] for node in (1, 2)}, global_model, strategy, weight_cap=2.0)
    assert [each.contribution.weight for each in pair.accepted] == [10, 20]


def test_weights_are_divided_by_the_probability_to_be_asked_and_bounded_again(global_model, reply):
    """Claims may have changed since the draw."""
    claims, drawn = {1: 10.0, 2: 20.0, 3: 10.0}, {1: 0.25, 2: 0.5}
    answers = {
        node: answer(replace(reply, partition=node, numbers=NUMBERS | {"examples": claim}))
        for node, claim in claims.items()
    }
    for inclusion, cap, expected in (
        (drawn, 2.0, [40, 40, 10]),
        (drawn | {2: 0.01}, 2.0, [40, 80, 10]),
        (drawn | {2: 0.01}, 0.0, [40, 2000, 10]),
    ):
        strategy = sam_v2(RunConfig())
        replies = check_replies(answers, global_model, strategy, weight_cap=cap, inclusion=inclusion)
        assert [each.contribution.weight for each in replies.accepted] == expected


def test_a_client_without_tokens_has_no_weight(global_model, reply):
    silent = answer(replace(reply, numbers=NUMBERS | {"train-tokens": 0.0}))
    replies = checked({7: silent}, global_model, client_weight="tokens")
    assert replies.refused == {7: "expected train-tokens of at least 1, got 0"}


def test_the_largest_claims_of_all_clients_leave_every_sum_finite(global_model, reply):
    """Two claims of 1.7e308 tokens were an OverflowError of the server."""
    huge = NUMBERS | {"valid-tokens": 1.7e308}
    answers = {node: answer(replace(reply, partition=node, numbers=huge)) for node in (1, 2)}
    assert all("valid-tokens" in reason for reason in checked(answers, global_model).refused.values())
    most = NUMBERS | {"valid-tokens": 2.0**40, "valid-nll": 1e4 * 2.0**40}
    answers = {node: answer(replace(reply, partition=node, numbers=most)) for node in (1, 2, 3)}
    replies = checked(answers, global_model)
    assert len(replies.accepted) == 3
    assert held_out_loss(replies).mean == pytest.approx(1e4) and held_out_loss(replies).tokens == 3 * 2**40


def test_one_client_moves_the_held_out_loss_by_a_bounded_part():
    honest = [LossSum(20.0, 10), LossSum(30.0, 10), LossSum(40.0, 20)]
    assert total_loss(honest) == LossSum(90.0, 40) and total_loss([]) == LossSum()
    for lie in (LossSum(0.0, 2**40), LossSum(1e4 * 2**40, 2**40), LossSum(1e4, 1)):
        total = total_loss([*honest, lie])
        assert total.tokens <= 40 + 40 and 90.0 <= total.nll <= 90.0 + 40 * 8.0
    assert total_loss([LossSum(), LossSum(5.0, 5)]) == LossSum(5.0, 5)


@pytest.mark.parametrize("name", ["", "a b", "[/red]", "a\x1b[2J", "n" * 97, "a\n"])
def test_names_that_no_honest_client_has_are_refused(global_model, reply, name):
    assert "expected a name of 1 to 96" in refusal(global_model, replace(reply, name=name))


def test_an_unexpected_error_in_a_check_refuses_the_reply(global_model, reply, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise OverflowError("int too large")

    monkeypatch.setattr("server.strategies.sam_v2.unpack_usage", fail)
    assert refusal(global_model, reply) == "the reply cannot be checked: OverflowError"
    assert "int too large" in caplog.text


@pytest.mark.parametrize("scale", [1e5, 1e9])
def test_absurd_changes_are_refused_and_the_rest_counts(global_model, reply, scale):
    update = packed_change(global_model.model, random_change(global_model.model, [(0, 2)], scale=scale))
    loud, good = replace(reply, update=update, partition=1), answer(reply)
    replies = checked({1: answer(loud), 2: good}, global_model)
    assert [each.node for each in replies.accepted] == [2]
    assert "expected changes of at most 65504" in replies.refused[1]


@pytest.mark.parametrize("combine", get_args(Combine))
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_whatever_is_accepted_gives_a_finite_step(global_model, reply, combine, clip):
    """One client with the largest accepted change and weight and the smallest probability, and an ordinary one."""
    loudest = random_change(global_model.model, [(0, 2)], scale=1.0)
    loudest = {unit: vector.sign() * 65504 for unit, vector in loudest.items()}
    extreme = replace(
        reply,
        partition=1,
        numbers=NUMBERS | {"examples": 2.0**40},
        inclusion={"0.2": 2.0**-20},
        update=packed_change(global_model.model, loudest, value_bits=16),
    )
    replies = checked({1: answer(extreme), 2: answer(reply)}, global_model)
    assert len(replies.accepted) == 2
    contributions = [each.contribution for each in replies.accepted]
    step = aggregate(contributions, combine=combine, clip_norm_multiple=clip)
    assert all(torch.isfinite(vector).all() for vector in step.values())


def test_updates_on_disk_are_unpacked_anew_and_never_held(global_model, reply, tmp_path):
    with ReplySpool(tmp_path) as spool:
        content, update = detach_update(write_reply(reply))
        kept = spool.put(update)
        (accepted,) = checked({7: Answer(content, "", None, 1, 1, kept)}, global_model).accepted
        assert accepted.reply.update == b"" and accepted.stats == packed_stats(reply.update)
        first, second = accepted.contribution.unpack(), accepted.contribution.unpack()
        assert first is not second and first == second
        (in_memory,) = checked({7: answer(reply)}, global_model).accepted
        assert in_memory.contribution.unpack() == first
    with pytest.raises(FileNotFoundError):
        accepted.contribution.unpack()


def test_an_update_larger_than_the_model_is_refused_unread(global_model, reply, tmp_path):
    content, _ = detach_update(write_reply(reply))
    huge = SpooledBytes(tmp_path / "absent", 10**9)
    replies = checked({7: Answer(content, "", None, 1, 1, huge)}, global_model)
    assert "expected an update of at most" in replies.refused[7]


def test_a_refusal_is_logged(global_model, reply, caplog):
    with caplog.at_level("WARNING"):
        refusal(global_model, replace(reply, version=3))
    assert "the reply of node 7 is refused: expected an update of version 0" in caplog.text


def test_a_refused_reply_does_not_take_the_place_of_a_good_one(global_model, reply):
    replies = checked({1: answer(replace(reply, version=9)), 2: answer(reply)}, global_model)
    assert [each.node for each in replies.accepted] == [2] and list(replies.refused) == [1]


def test_an_error_is_refused_with_its_reason(global_model):
    assert refusal(global_model, Answer(None, "no answer within 5 s", None, 0, 1)) == "no answer within 5 s"


@pytest.mark.parametrize("version", [-1, 1, 7])
def test_an_update_of_another_version_is_refused(global_model, reply, version):
    expected = f"expected an update of version 0, got one of version {version}"
    assert refusal(global_model, replace(reply, version=version)) == expected


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_cannot_be_are_refused(global_model, reply, name, value):
    assert f"expected {name} to be a" in refusal(
        global_model, replace(reply, numbers=NUMBERS | {name: value})
    )


@pytest.mark.parametrize("name", ["examples", "train-loss"])
def test_numbers_that_the_round_needs_must_be_there(global_model, reply, name):
    numbers = {key: value for key, value in NUMBERS.items() if key != name}
    assert refusal(global_model, replace(reply, numbers=numbers)) == f"expected the number {name}, got none"


def test_an_update_of_an_expert_that_is_not_held_is_refused(global_model, reply):
    update = packed_change(global_model.model, random_change(global_model.model, [(0, 1), (0, 2)]))
    assert (
        refusal(global_model, replace(reply, update=update))
        == "expected updates of resident experts only, got (0, 1)"
    )


def test_residents_of_another_number_of_layers_are_refused(global_model, reply):
    expected = "expected the residents of 2 layers, got 0"
    assert refusal(global_model, replace(reply, residents=[])) == expected
    assert "residency bits" in refusal(global_model, replace(reply, residents=HELD[:1]))


def test_residents_of_another_number_of_experts_are_refused(global_model, reply):
    assert "residency bits" in refusal(
        global_model, replace(reply, residents=[np.ones(9, dtype=bool), HELD[1]])
    )


def test_an_update_of_another_graph_is_refused(global_model, reply):
    other = graph_of()
    other.expert_layers()[0].edges[0, 3] ^= True
    update = packed_change(other, random_change(other, [(0, 2)]))
    assert "graph hash" in refusal(global_model, replace(reply, update=update))
    assert "expected the graph" in refusal(global_model, replace(reply, graph_hash="f" * 64))
    other.config.graph_version = 4
    update = packed_change(other, random_change(other, [(0, 2)]))
    assert "graph version 4, expected 0" in refusal(global_model, replace(reply, update=update))


def test_any_changed_byte_of_an_update_is_refused(global_model, reply):
    for position in range(0, len(reply.update), 41):
        damaged = bytearray(reply.update)
        damaged[position] ^= 0x10
        assert refusal(global_model, replace(reply, update=bytes(damaged))), position
    assert refusal(global_model, replace(reply, update=reply.update[:-1]))
    assert refusal(global_model, replace(reply, update=b""))


@pytest.mark.parametrize("usage", [b"", b"\x00", b"\x01" + b"\xff" * 30])
def test_damaged_usage_is_refused(global_model, reply, usage):
    assert refusal(global_model, replace(reply, usage=usage))


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
def test_probabilities_that_cannot_be_are_refused(global_model, reply, inclusion):
    assert "inclusion probability of a resident expert" in refusal(
        global_model, replace(reply, inclusion=inclusion)
    )


def test_a_content_that_is_no_reply_is_refused(global_model):
    for content in (RecordDict({}), RecordDict({"info": ConfigRecord({"name": "x"})})):
        assert "a reply cannot be read" in refusal(global_model, Answer(content, "", None, 1, 1))


def test_checking_leaves_the_model_alone(global_model, reply):
    before = {name: value.clone() for name, value in global_model.model.state_dict().items()}
    checked({1: answer(reply)}, global_model)
    assert all(torch.equal(value, before[name]) for name, value in global_model.model.state_dict().items())
    assert read_graph(global_model.model).version == 0


def test_evaluations_of_another_model_or_client_are_refused(global_model, reply):
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
        8: answer(replace(plain, partition=7, numbers={"valid-nll": 1.0, "valid-tokens": 1.7e308})),
        9: answer(replace(plain, partition=8, name="[/red]")),
    }
    evaluations = check_evaluations(answers, global_model, {6: 6})
    assert [each.node for each in evaluations.accepted] == [1]
    assert evaluations.accepted[0].reply == replace(plain, inclusion={})
    assert evaluations.accepted[0].loss == LossSum(2.0, 1)
    assert sorted(evaluations.refused) == [2, 3, 4, 5, 6, 7, 8, 9] and evaluations.refused[7] == "away"
    assert [evaluations.refused[node].split(",")[0] for node in (2, 4, 6)] == [
        "expected an update of version 0",
        "client 0 has answered already",
        "expected an answer of client 6",
    ]
