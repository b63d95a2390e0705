from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.schema import RunConfig
from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply
from federated.selection.shared_entries import SharedEntries
from federated.updates.update import RefusedUpdate
from models.graph.unit_vectors import trained_spans, unit_sizes
from server.model.global_model import GlobalModel
from server.privacy.noise import NoiseSource
from server.rounds.reply_spool import HeldBytes
from server.state.federation_state import FederationState
from server.state.node_session import NodeSession
from server.strategies.private import PrivateAggregation
from server.strategies.sam_v2 import sam_v2
from server.strategies.strategy import Accepted
from tests.support.tiny_federation import packed_change, random_change, save_tiny_graph

PRIVATE = {
    "dp_clip_norm": 0.5,
    "entry_score": "shared",
    "density_scope": "expert",
    "combine": "mean",
    "client_weight": "uniform",
    "clip_norm_multiple": 0.0,
    "keep_best": False,
    "drift_loss": 0.0,
    "drift_routing": 0.0,
    "rho_max": 0,
    "num_clients": 8,
    "density": 0.25,
    "server_learning_rate": 3.0,
}


@pytest.fixture(scope="module")
def global_model(tmp_path_factory, tiny_tokenizer) -> GlobalModel:
    folder = tmp_path_factory.mktemp("private") / "graph"
    return GlobalModel(str(save_tiny_graph(folder, tiny_tokenizer, num_experts=4, visits=2)))


def private(*, key: bytes = bytes(32), **changes) -> tuple[PrivateAggregation, RunConfig]:
    config = RunConfig(**{**PRIVATE, **changes})
    return PrivateAggregation(sam_v2(config), config, NoiseSource(key)), config


def positions(global_model: GlobalModel, config: RunConfig) -> dict:
    spans = trained_spans(global_model.model, config.train)
    draw = SharedEntries(config.seed, global_model.version + 1, spans)
    return {unit: draw.positions(unit, config.density) for unit in spans}


def accepted(
    strategy: PrivateAggregation, config: RunConfig, global_model: GlobalModel, partition: int, **options
) -> Accepted:
    """A client that holds all experts and ships random values at the shared positions of ``units``."""
    units, scale = options.get("units"), options.get("scale", 0.001 * 10**partition)
    change = random_change(global_model.model, units, seed=partition, scale=scale)
    shared = positions(global_model, config)
    for unit, vector in change.items():
        kept = torch.zeros_like(vector)
        kept[shared[unit]] = vector[shared[unit]]
        change[unit] = kept
    reply = Reply(
        name="a",
        partition=partition,
        budget=4,
        version=global_model.version,
        graph_hash=global_model.graph.digest(),
        numbers={},
        update=options.get("update", packed_change(global_model.model, change, value_bits=8)),
        usage=options.get("usage", b""),
        residents=[np.ones(4, dtype=bool)] * 2,
    )
    return strategy.accept(partition, reply, HeldBytes(reply.update), global_model)


def flat(change) -> np.ndarray:
    return np.concatenate([change[unit].numpy() for unit in sorted(change)]).astype(np.float64)


def test_leaving_out_any_client_moves_the_model_by_at_most_its_share(global_model):
    strategy, config = private()
    clients = [accepted(strategy, config, global_model, partition) for partition in range(4)]
    norms = [each.contribution.summarized().norm for each in clients]
    assert min(norms) < config.dp_clip_norm < max(norms)
    whole = flat(strategy.combine(clients, global_model))
    share = config.server_learning_rate * config.dp_clip_norm / config.num_clients
    moved = [
        np.linalg.norm(whole - flat(strategy.combine(clients[:out] + clients[out + 1 :], global_model)))
        for out in range(4)
    ]
    assert max(moved) <= share * (1 + 1e-5)
    assert [each > 0.99 * share for each in moved] == [norm > config.dp_clip_norm for norm in norms]


def test_the_mean_is_over_the_planned_clients_without_weights(global_model):
    strategy, config = private(dp_clip_norm=1e6, fraction_train=0.5)
    clients = [accepted(strategy, config, global_model, partition) for partition in range(2)]
    change = strategy.combine(clients, global_model)
    first, second = (each.contribution.unpack() for each in clients)
    for unit, vector in change.items():
        total = first.vectors[unit].to_dense() + second.vectors[unit].to_dense()
        assert np.allclose(vector.numpy(), 3.0 * total / 4, rtol=1e-5)


def test_noise_has_the_documented_deviation_at_the_shared_positions_and_is_zero_elsewhere(global_model):
    strategy, config = private(dp_noise_multiplier=2.0, density=1.0)
    clients = [accepted(strategy, config, global_model, partition) for partition in range(2)]
    plain, _ = private(density=1.0)
    noise = flat(strategy.combine(clients, global_model)) - flat(plain.combine(clients, global_model))
    expected = 3.0 * 2.0 * 0.5 / 8
    assert noise.size > 10_000
    assert noise.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 5 * expected / np.sqrt(noise.size)
    sparse, config = private(dp_noise_multiplier=2.0)
    clients = [accepted(sparse, config, global_model, 0)]
    for unit, vector in sparse.combine(clients, global_model).items():
        assert np.flatnonzero(vector.numpy()).tolist() == positions(global_model, config)[unit].tolist()


def test_what_is_released_does_not_depend_on_what_was_shipped(global_model):
    """Units and entries without any update are released with noise like all others."""
    strategy, config = private(dp_noise_multiplier=1.0)
    one = accepted(strategy, config, global_model, 0, units=[(0, 2)])
    other = accepted(strategy, config, global_model, 1, units=[(1, 0), (1, 3)])
    released = [strategy.combine(each, global_model) for each in ([one], [other], [one, other])]
    entries = [{unit: torch.nonzero(v).ravel().tolist() for unit, v in each.items()} for each in released]
    assert entries[0] == entries[1] == entries[2]
    assert entries[0].keys() == unit_sizes(global_model.model).keys()


def test_the_noise_repeats_for_the_same_replies_only(global_model):
    strategy, config = private(dp_noise_multiplier=1.0)
    clients = [accepted(strategy, config, global_model, partition) for partition in range(3)]
    again = flat(strategy.combine(clients, global_model))
    assert np.array_equal(again, flat(strategy.combine(clients, global_model)))
    plain = flat(private()[0].combine(clients, global_model))
    for other, others in (
        (strategy, clients[:2]),
        (private(key=bytes(31) + b"x", dp_noise_multiplier=1.0)[0], clients),
    ):
        noise = flat(other.combine(others, global_model)) - flat(private()[0].combine(others, global_model))
        drawn = noise != 0
        assert abs(np.corrcoef(noise[drawn], (again - plain)[drawn])[0, 1]) < 0.1


def test_entries_outside_of_the_draw_are_refused(global_model):
    strategy, config = private()
    stray = packed_change(global_model.model, random_change(global_model.model, [(0, 0)]))
    with pytest.raises(RefusedUpdate, match="shared draw only"):
        accepted(strategy, config, global_model, 0, update=stray)


def test_matrices_alone_get_noise_where_only_they_train(global_model):
    strategy, config = private(train="experts", dp_noise_multiplier=1.0, density=1.0)
    for unit, vector in strategy.combine([], global_model).items():
        span = trained_spans(global_model.model, "experts")[unit]
        assert torch.nonzero(vector).ravel().tolist() == list(range(span.start, span.stop))


def test_usage_counts_alike_and_has_noise(global_model):
    counts = np.triu(np.arange(16, dtype=np.int64).reshape(4, 4))
    usage = pack_usage([counts, 3 * counts])
    keys = {"dp_usage_noise": 0.01, "dp_noise_multiplier": 1.0, "rho_max": 2}
    strategy, config = private(**keys)
    clients = [accepted(strategy, config, global_model, partition, usage=usage) for partition in range(2)]
    combined = strategy.combine_usage(clients, global_model)
    norm = np.linalg.norm(counts) * np.sqrt(10)
    for found, exact in zip(combined, (counts, 3 * counts), strict=True):
        assert np.allclose(found, 1000 * 2 * exact / norm, atol=6 * 0.01 * 1000)
        assert not np.allclose(found, 1000 * 2 * exact / norm) and found.min() >= 0
        assert np.array_equal(found, np.triu(found))
    assert private()[0].combine_usage([replace(each, usage=[]) for each in clients], global_model) == []


def test_requests_and_edits_are_those_of_the_method(global_model):
    strategy, config = private(num_rounds=2)
    plain = sam_v2(config)
    assert strategy.configure(global_model, NodeSession(), 2) == plain.configure(
        global_model, NodeSession(), 2
    )
    assert strategy.after_round(global_model, FederationState(server_round=1)) is None
