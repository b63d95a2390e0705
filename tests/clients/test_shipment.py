from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.shipment import (
    carried_over,
    choose_shipment,
    drawn_with,
    limits,
    shipped_in,
    with_own_limits,
)
from clients.state.residual import Kept, ResidualStore, ShippedUpdate
from clients.state.store import ClientStore
from configs.errors import UserError
from configs.schema import RunConfig
from experts.graph.edit_plan import apply_plan
from experts.graph.edits import RetireExpert, SpawnExpert
from experts.graph.expert_graph import ExpertGraph
from federated.protocol.messages import Request, read_reply, read_request
from federated.selection.entries import gradient_score
from federated.selection.error_feedback import Limits, PreparedUpdate, choose_update
from federated.updates.lazy_vectors import LazyVectors
from federated.updates.update import SparseUpdate, SparseVector
from federated.wire.codec import pack_update, unpack_update
from federated.wire.quantize import quantize_update
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import unit_sizes
from server.flower.in_process_grid import Late
from tests.support.tiny_federation import (
    TinyGrid,
    client_folder_of,
    node_of,
    save_tiny_graph,
    tiny_config,
    tiny_federation,
)
from tests.support.tiny_graphs import graph_of

SIZES = {(0, 0): 40, (0, 1): 40, (1, 0): 50, (1, 1): 50}
PLAIN = ExpertGraph((np.eye(2, dtype=bool),) * 2)
GRAPH = {"graph_version": 0, "graph_hash": "0" * 64}


def request_of(server_round: int, accepted_round: int = 0) -> Request:
    return Request(server_round, 0, "", "", accepted_round=accepted_round)


def kept_of(residual, values, server_round: int = 3) -> Kept:
    """A residual, and an update that was shipped in a round."""
    vectors = {unit: SparseVector.from_dense(v.numpy(), v.numpy() != 0) for unit, v in values.items()}
    update = quantize_update(SparseUpdate(0, "", vectors), 16)
    shipped = ShippedUpdate(
        server_round, pack_update(update, value_bits=16), {u: v.size for u, v in vectors.items()}
    )
    return Kept(residual, {unit: vector.numel() for unit, vector in residual.items()}, shipped, 0)


RESIDUAL = {(0, 0): torch.tensor([1.0, 0.0, 2.0]), (1, 0): torch.tensor([5.0])}
VALUES = {(0, 0): torch.tensor([0.0, 4.0, 8.0]), (0, 1): torch.tensor([16.0, 0.0])}
PRESENT = {(0, 0): 3, (0, 1): 2, (1, 0): 1}


@pytest.mark.parametrize(
    ("server_round", "accepted_round", "refused"),
    [(4, 3, False), (9, 3, False), (4, 2, True), (4, 0, True), (3, 2, True), (3, 3, True), (9, 8, True)],
)
def test_an_update_is_added_again_unless_it_was_accepted(server_round, accepted_round, refused):
    carried = dict(
        carried_over(kept_of(RESIDUAL, VALUES), request_of(server_round, accepted_round), PRESENT, PLAIN)
    )
    expected = {(0, 0): [1.0, 4.0, 10.0], (0, 1): [16.0, 0.0], (1, 0): [5.0]} if refused else RESIDUAL
    assert {unit: vector.tolist() for unit, vector in carried.items()} == {
        unit: torch.as_tensor(vector).tolist() for unit, vector in expected.items()
    }
    assert RESIDUAL[0, 0].tolist() == [1, 0, 2]


def test_units_that_are_gone_or_have_another_size_are_dropped_from_both():
    kept = kept_of(RESIDUAL, VALUES)
    carried = carried_over(kept, request_of(4), {(0, 0): 3, (0, 1): 7, (1, 1): 1}, PLAIN)
    assert {unit: vector.tolist() for unit, vector in carried.items()} == {(0, 0): [1.0, 4.0, 10.0]}
    assert dict(carried_over(kept, request_of(4), {}, PLAIN)) == {}


def test_nothing_is_carried_into_the_first_round():
    assert dict(carried_over(Kept(), request_of(1), PRESENT, PLAIN)) == {}


@pytest.mark.parametrize(
    ("node", "density", "budget"),
    [
        ({}, 0.05, 0.5),
        ({"density": 0.5}, 0.5, 0.0),
        ({"density": 1}, 1.0, 0.0),
        ({"upload-budget-mb": 2}, 0.05, 2.0),
        ({"upload-budget-mb": 0.25, "density": 0.5}, 0.5, 0.25),
        ({"upload-budget-mb": 0}, 0.05, 0.0),
    ],
)
def test_a_nodes_own_limits_count_before_the_runs(node, density, budget):
    config = with_own_limits(RunConfig(density=0.05, upload_budget_mb=0.5, seed=3), node_of(node), "a")
    assert (config.density, config.upload_budget_mb, config.seed) == (density, budget, 3)
    assert limits(config.upload).max_bytes == budget * 1e6
    assert limits(config.upload).density == density


@pytest.mark.parametrize(
    "node", [{"density": 0.0}, {"density": 2}, {"upload-budget-mb": -1}, {"density": "x"}]
)
def test_own_limits_out_of_range_are_the_users_affair(node):
    with pytest.raises(
        UserError, match=r"^expected (density|upload-budget-mb) .* in the node-config of client 0$"
    ):
        with_own_limits(RunConfig(), node_of(node), "b")


def test_a_client_ships_no_more_than_the_shared_entries():
    config = RunConfig(density=0.2, entry_score="shared", density_scope="expert")
    assert with_own_limits(config, node_of({"density": 0.2}), "a").density == 0.2
    assert with_own_limits(config, node_of({"density": 0.1}), "a").density == 0.1
    with pytest.raises(
        UserError, match=r"density of at most the run's 0.2 .*got 0.3 in the node-config of client a"
    ):
        with_own_limits(config, node_of({"density": 0.3}), "a")
    with pytest.raises(UserError, match="upload-budget-mb=0 with entry-score=shared, got 1"):
        with_own_limits(config, node_of({"upload-budget-mb": 1.0}), "a")


def test_limits_are_those_of_the_run():
    config = RunConfig(ship_experts=3, density=0.25, density_scope="all", upload_budget_mb=0.001)
    assert limits(config.upload) == Limits(3, 0.25, "all", 1000)


EVENTS = st.lists(st.sampled_from(["accepted", "refused", "repeated", "killed"]), min_size=1, max_size=8)
LIMITS = st.sampled_from(
    [Limits(density=0.1), Limits(1, 0.3, "all"), Limits(max_bytes=640), Limits(density=1.0)]
)


@settings(max_examples=30, deadline=None)
@given(EVENTS, LIMITS, st.sampled_from([2, 4, 16]), st.sampled_from(["top", "sample"]), st.integers(0, 99))
def test_what_was_accepted_and_what_is_kept_are_all_that_changed(
    tmp_path_factory, events, limits, bits, selection, seed
):
    """Whatever is refused, repeated or killed on the way."""
    path = tmp_path_factory.mktemp("client") / "residual.safetensors"
    generator = torch.Generator().manual_seed(seed)
    trained = {unit: torch.zeros(size) for unit, size in SIZES.items()}
    accepted: dict[int, dict] = {}  # by server round
    server_round = 0
    for event in [*events, "accepted"]:
        if event == "repeated":  # by a server that came back as it was before this round
            accepted.pop(server_round, None)
        server_round += event != "repeated" or server_round == 0
        accepted_round = max(accepted, default=0)
        request = request_of(server_round, accepted_round)
        units = [unit for unit in SIZES if torch.rand((), generator=generator) < 0.7] or [(0, 0)]
        deltas = {unit: torch.randn(SIZES[unit], generator=generator) * 1e-3 for unit in units}
        store = ResidualStore(path)
        prepared = choose_update(
            deltas,
            carried_over(store.load(), request, SIZES, PLAIN),
            limits,
            selection=selection,
            value_bits=bits,
            generator=generator,
            **GRAPH,
        )
        packed = pack_update(prepared.update, value_bits=bits)
        if event == "killed":
            with pytest.raises(InterruptedError):
                store.save(
                    LazyVectors(prepared.residual, _interrupt),
                    PLAIN,
                    shipped_in(request, prepared.update, packed),
                )
            continue
        store.save(prepared.residual, PLAIN, shipped_in(request, prepared.update, packed))
        for unit, delta in deltas.items():
            trained[unit] += delta
        if event == "accepted":
            accepted[server_round] = unpack_update(packed, sizes=SIZES).vectors
    kept = dict(
        carried_over(ResidualStore(path).load(), request_of(server_round + 1, server_round), SIZES, PLAIN)
    )
    for unit, total in trained.items():
        arrived = [torch.from_numpy(each[unit].to_dense()) for each in accepted.values() if unit in each]
        found = sum(arrived) + kept.get(unit, torch.zeros(SIZES[unit]))
        torch.testing.assert_close(found, total, rtol=0, atol=2e-8)  # a few units in the last place of 1e-2


def _interrupt(unit):
    raise InterruptedError("killed")


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer):
    return save_tiny_graph(
        tmp_path_factory.mktemp("shipment") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )


@pytest.mark.parametrize(("steep", "shipped"), [(3, [3]), (None, [5])])
def test_a_shipment_holds_what_the_slopes_make_worth_most(steep, shipped):
    model = graph_of()
    size = unit_sizes(model)[0, 0]
    delta, slopes = torch.zeros(size), {}
    delta[3], delta[5] = 1.0, 2.0
    if steep is not None:
        slope = torch.ones(size)
        slope[steep] = 100.0
        slopes = {(0, 0): slope}
    config = RunConfig(density=1 / size, value_bits=16)
    generator = torch.Generator().manual_seed(0)
    score = gradient_score(slopes)
    prepared = choose_shipment(model, {(0, 0): delta}, score, {}, config.upload, generator=generator)
    assert prepared.update.vectors[0, 0].indices.tolist() == shipped
    assert prepared.update.graph_hash == read_graph(model).digest()
    assert drawn_with(prepared) == {}


def test_only_experts_that_were_drawn_by_chance_bear_a_probability():
    update = SparseUpdate(0, "", {})
    assert drawn_with(PreparedUpdate(update, {}, {(0, 1): 0.25, (2, 3): 1.0})) == {"0.1": 0.25}


def refused(reply: Message) -> Message:
    """The reply as if it belonged to another version of the model."""
    reply.content.config_records["info"]["version"] = 99
    return reply


@pytest.mark.parametrize("fault", [refused, Late(10**6)])
def test_a_change_that_the_server_did_not_take_arrives_in_the_next_round(graph, tmp_path, monkeypatch, fault):
    config = tiny_config(
        graph,
        tmp_path,
        local_steps=1,
        density=1.0,
        value_bits=16,
        residual_decay=1.0,
        rho_max=0,
        reply_timeout=0.3,
    )
    grid = TinyGrid(config, faults={(0, "2"): fault})
    federation = tiny_federation(grid, config)
    trained = {0: [], 1: []}
    choose = choose_update

    def recording(deltas, *arguments, **options):
        trained[grid.present].append({unit: deltas[unit] for unit in deltas})
        return choose(deltas, *arguments, **options)

    monkeypatch.setattr("clients.shipment.choose_update", recording)
    grid.before = lambda server_round, node: setattr(grid, "present", node)
    federation.run()
    sizes = unit_sizes(federation.global_model.model)
    told = {0: [], 1: []}
    sent = {0: {}, 1: {}}
    for server_round, node, request, reply in grid.sent:
        told[node].append(read_request(request.content).accepted_round)
        if server_round <= 3 and reply is not None and not reply.has_error():
            packed = read_reply(reply.content, [4, 4]).update
            sent[node][server_round] = unpack_update(packed, sizes=sizes).vectors
    assert told == {0: [0, 1, 1, 3], 1: [0, 1, 2, 3]}
    for unit in sizes:
        # 16 bits: what a round leaves in the residual is a thousandth of it.
        for node, rounds in ((0, [2, 3]), (1, [3])):
            expected = sum(trained[node][number - 1][unit] for number in rounds)
            found = torch.from_numpy(sent[node][3][unit].to_dense())
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)
    kept = ClientStore(client_folder_of(config, 0)).load_residual(4)
    assert kept.shipped is not None and kept.shipped.server_round == 3


def test_clients_of_one_run_ship_as_much_as_each_of_them_may(graph, tmp_path):
    options = {"value_bits": 4, "entry_score": "magnitude", "rho_max": 0}
    config = tiny_config(graph, tmp_path, num_rounds=2, local_steps=2, **options)
    grid = TinyGrid(config)
    own = [{"density": 0.01}, {"upload-budget-mb": 0.004}]
    for context, limit in zip(grid.contexts.values(), own, strict=True):
        context.node_config.update(limit)
    federation = tiny_federation(grid, config)
    federation.run()
    for server_round, node, _, reply in grid.sent:
        if server_round > 2:
            continue
        read = read_reply(reply.content, [4, 4])
        if node == 0:
            assert read.numbers["density"] == pytest.approx(0.01, rel=0.05)
        else:
            assert 3900 <= len(read.update) <= 4000


def test_a_residual_finds_its_experts_after_edits(tmp_path):
    before = ExpertGraph((np.eye(3, dtype=bool),), 1)
    after = apply_plan(apply_plan(before, [SpawnExpert(0, 2, 3)]).graph, [RetireExpert(0, 0)]).graph
    # Three experts: 1, 2 and the spawned one. One weight, then a gain and an affinity from each expert.
    vectors = {(0, e): torch.tensor([10.0 + e, 1, 2, 3, -1, -2, -3]) for e in range(3)}
    update = SparseUpdate(1, "", {(0, 1): SparseVector.from_dense(np.eye(7)[0] * 4, np.eye(7)[0] != 0)})
    packed = pack_update(quantize_update(update, 16), value_bits=16)
    store = ResidualStore(tmp_path / "residual.safetensors")
    store.save(vectors, before, ShippedUpdate(3, packed, {(0, 1): 7}))
    sizes = {(0, e): 7 for e in range(3)}
    carried = dict(carried_over(store.load(), request_of(4, 3), sizes, after))
    assert {unit: vector.tolist() for unit, vector in carried.items()} == {
        (0, 0): [11.0, 2, 3, 0, -2, -3, 0],
        (0, 1): [12.0, 2, 3, 0, -2, -3, 0],
    }
    refused = carried_over(store.load(), request_of(4, 2), sizes, after)
    assert refused[0, 0].tolist() == [15.0, 2, 3, 0, -2, -3, 0]
