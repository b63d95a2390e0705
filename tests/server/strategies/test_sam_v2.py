from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.schema import RunConfig
from federated.aggregation.combine import aggregate
from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply
from federated.updates.update import RefusedUpdate
from federated.wire.codec import packed_stats
from server.model.global_model import GlobalModel
from server.rounds.reply_spool import HeldBytes
from server.state.federation_state import FederationState
from server.state.node_session import NodeSession
from server.strategies.sam_v2 import sam_v2
from server.strategies.strategy import Accepted, Strategy
from tests.support.tiny_federation import packed_change, random_change, save_tiny_graph


@pytest.fixture
def global_model(tmp_path, tiny_tokenizer) -> GlobalModel:
    return GlobalModel(str(save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)))


def accepted(strategy: Strategy, global_model: GlobalModel, partition: int, **changes) -> Accepted:
    """A client that holds experts 0 and 2 of the first layer and 3 of the second, and ships (0, 2)."""
    reply = Reply(
        name="a",
        partition=partition,
        budget=2,
        version=0,
        graph_hash=global_model.graph.digest(),
        numbers={"examples": 3.0 + partition, "train-loss": 1.0, "train-tokens": 50.0},
        update=packed_change(global_model.model, random_change(global_model.model, [(0, 2)], seed=partition)),
        usage=pack_usage([np.eye(4, dtype=np.int64)] * 2),
        residents=[np.array([1, 0, 1, 0], dtype=bool), np.array([0, 0, 0, 1], dtype=bool)],
    )
    reply = replace(reply, **changes)
    return strategy.accept(partition, reply, HeldBytes(reply.update), global_model)


def test_a_request_leads_from_the_held_version_to_the_current_one(global_model):
    for version in (1, 2):
        global_model.advance(random_change(global_model.model, [(0, 0)], seed=version), value_bits=4)
    strategy = sam_v2(RunConfig(num_rounds=3))
    request = strategy.configure(global_model, NodeSession(held_version=1, accepted_round=2), 3)
    assert [step.version for step in request.steps] == [2] and request.snapshot == b""
    assert (request.version, request.accepted_round, request.server_round) == (2, 2, 3)
    assert request.graph_hash == global_model.graph.digest() and request.copy_hash == global_model.copy_hash
    assert request.base_fingerprint == global_model.fingerprint
    last = [strategy.configure(global_model, NodeSession(), number).last for number in (2, 3, 4)]
    assert last == [False, True, False]


@pytest.mark.parametrize(("kind", "weight"), [("examples", 4.0), ("tokens", 50.0), ("uniform", 1.0)])
def test_an_accepted_reply_holds_weight_units_usage_and_sizes(global_model, kind, weight):
    each = accepted(sam_v2(RunConfig(client_weight=kind)), global_model, 1)
    contribution = each.contribution
    assert contribution.weight == weight
    assert contribution.trained == {(0, 0), (0, 2), (1, 3)}
    assert contribution.summary is not None and contribution.summary.keys() == {(0, 2)}
    assert each.usage[1].tolist() == np.eye(4).tolist()
    assert each.stats == packed_stats(each.reply.update)


def test_attention_may_be_shipped_where_it_trains(global_model):
    attention = {(0, -1): torch.ones(4 * 32 * 32)}
    update = packed_change(global_model.model, attention)
    with pytest.raises(RefusedUpdate, match="unknown unit"):
        accepted(sam_v2(RunConfig()), global_model, 0, update=update)
    strategy = sam_v2(RunConfig(lora_rank=2, attention_lora=True))
    sizes = accepted(strategy, global_model, 0).contribution.trained
    assert sizes is not None and {(0, -1), (1, -1)} <= sizes


def test_the_change_is_the_aggregation_with_the_runs_keys(global_model):
    config = RunConfig(combine="hajek", server_learning_rate=0.5, clip_norm_multiple=1.0)
    strategy = sam_v2(config)
    replies = [accepted(strategy, global_model, partition) for partition in (0, 1)]
    contributions = [each.contribution for each in replies]
    change = strategy.combine(replies, global_model)
    expected = aggregate(contributions, combine="hajek", server_learning_rate=0.5, clip_norm_multiple=1.0)
    assert change.keys() == expected.keys() == {(0, 2)}
    assert torch.equal(change[0, 2], expected[0, 2])
    plain = aggregate(contributions)
    assert not torch.equal(change[0, 2], plain[0, 2])


def test_an_update_against_most_others_is_left_out(global_model, caplog):
    change = random_change(global_model.model, [(0, 2)])
    updates = [packed_change(global_model.model, {(0, 2): sign * change[0, 2]}) for sign in (1.0, 1.0, -1.0)]
    strategy = sam_v2(RunConfig(server_learning_rate=1.0, opposition_limit=0.1))
    replies = [accepted(strategy, global_model, node, update=update) for node, update in enumerate(updates)]
    (found,) = strategy.combine(replies, global_model).values()
    assert torch.allclose(found, aggregate([replies[0].contribution])[0, 2])
    assert "the update of node 2 points against most others" in caplog.text
    kept = sam_v2(RunConfig(server_learning_rate=1.0)).combine(replies, global_model)
    assert torch.linalg.norm(kept[0, 2]) < 0.7 * torch.linalg.norm(found)


def test_the_graph_is_edited_every_so_many_rounds(global_model):
    global_model.advance({}, value_bits=4)
    state = FederationState()
    counts = np.triu(np.arange(16).reshape(4, 4) + 1)
    counts[0, 2] = 100
    state.usage.add([counts, counts], decay=0.5)
    strategy = sam_v2(RunConfig(merge_every=2, rho_max=1))
    records = []
    for state.server_round in (1, 2, 3):
        records.append(strategy.after_round(global_model, state))
    assert [record is None for record in records] == [True, False, True]
    assert records[1] is not None and (records[1].round, records[1].rho_max) == (2, 1)
    assert len(records[1].edits) == 1 and global_model.graph.version == 1
    state.server_round = 2
    assert sam_v2(RunConfig(rho_max=0)).after_round(global_model, state) is None


def test_a_uniform_weight_needs_no_numbers_and_usage_is_summed(global_model):
    strategy = sam_v2(RunConfig(client_weight="uniform"))
    replies = [accepted(strategy, global_model, partition, numbers={}) for partition in (0, 1)]
    assert [each.contribution.weight for each in replies] == [1.0, 1.0]
    assert [each.tolist() for each in strategy.combine_usage(replies, global_model)] == [
        (2 * np.eye(4)).tolist()
    ] * 2
