from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from configs.run_views import Rewiring
from experts.graph.edge_edits import propose_edits
from experts.graph.expert_graph import ExpertGraph
from federated.data.blocks import Blocks
from models.graph.graph_state import write_graph
from models.runtime.perplexity import LossSum, evaluate_loss
from server.model.global_model import GlobalModel
from server.state.drift import Drift
from server.state.federation_state import FederationState
from server.state.usage_average import UsageAverage
from server.strategies.rewire import rewire
from tests.support.tiny_federation import all_equal, random_change, save_tiny_graph
from tests.support.tiny_graphs import logit_difference, random_ids, with_random_gains


@pytest.fixture
def global_model(tmp_path, tiny_tokenizer) -> GlobalModel:
    """Edges 0 -> 1 -> 2 -> 3 with gains, after a first step."""
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=3)
    global_model = GlobalModel(str(graph))
    with_random_gains(global_model.model)
    write_graph(global_model.model, ExpertGraph((np.eye(4, dtype=bool) | np.eye(4, k=1, dtype=bool),) * 2))
    global_model.advance(random_change(global_model.model), value_bits=8)
    return global_model


@pytest.fixture
def usage() -> UsageAverage:
    average = UsageAverage()
    counts = np.triu(np.arange(16).reshape(4, 4) + 1)
    counts[0, 2] = 100
    average.add([counts, counts], decay=0.5)
    return average


@pytest.fixture
def validation(global_model) -> Blocks:
    ids = random_ids(global_model.model)
    return Blocks(ids, ids)


def run(global_model, usage, validation, **changes):
    keys = Rewiring(2, 1, 100.0, 0, 0, 0.01)
    state = usage if isinstance(usage, FederationState) else FederationState(server_round=3, usage=usage)
    return rewire(global_model, state, replace(keys, **changes), validation=validation)


def test_rewiring_makes_the_proposed_edits_as_part_of_the_latest_step(global_model, usage):
    proposed = propose_edits(global_model.graph, usage.counts, 2)
    version = global_model.version
    record = run(global_model, usage, None)
    assert [edit["op"] for edit in record.edits] == ["remove-edge", "add-edge"]
    assert record.edits == [edit.as_dict() for edit in proposed]
    assert (record.round, record.rho_max) == (3, 2)
    assert (record.loss_before, record.loss_after, record.gamma_hat) == (None, None, None)
    assert global_model.graph.version == 1 and global_model.version == version
    assert global_model.steps[-1].edits == proposed


def test_with_validation_text_the_drift_is_measured(global_model, usage, validation):
    before = evaluate_loss(global_model.model, validation.input_ids, validation.labels).mean
    record = run(global_model, usage, validation)
    after = evaluate_loss(global_model.model, validation.input_ids, validation.labels).mean
    assert (record.loss_before, record.loss_after) == (before, after)
    assert before != after
    assert record.gamma_hat == abs(after - before) / 2
    assert global_model.graph.version == 1


@pytest.mark.parametrize(
    ("losses", "max_drift", "kept"),
    [
        ((1.0, 1.2), 0.1, False),
        ((1.0, 1.2), 0.25, True),
        ((1.0, 1.5), 0.5, True),
        ((2.0, 1.0), 0.0, True),
        ((1.0, float("nan")), 10.0, False),
    ],
)
def test_rewiring_that_costs_too_much_is_rolled_back(
    global_model, usage, validation, losses, max_drift, kept, monkeypatch
):
    given = iter(losses)
    monkeypatch.setattr("server.strategies.rewire.evaluate_loss", lambda *_: LossSum(next(given), 1))
    before, digest = copy.deepcopy(global_model.model), global_model.graph.digest()
    record = run(global_model, usage, validation, merge_max_drift=max_drift)
    assert (len(record.edits) == 2) == kept == bool(global_model.steps[-1].edits)
    if not kept:
        assert global_model.graph.digest() == digest and all_equal(global_model.model, before)
        assert record.edits == [] and len(record.proposed) == 2
        np.testing.assert_equal(record.gamma_hat, abs(losses[1] - losses[0]) / 2)


def test_without_usage_or_demand_there_is_nothing_to_rewire(global_model, validation):
    average = UsageAverage()
    assert run(global_model, average, validation).edits == []
    average.add([np.zeros((4, 4))] * 2, decay=0.5)
    record = run(global_model, average, validation)
    assert record.edits == [] and record.gamma_hat is None
    assert global_model.graph.version == 0 and global_model.steps[-1].edits == []


def test_a_graph_used_the_same_way_settles(global_model, usage):
    made = [len(run(global_model, usage, None).edits) for _ in range(12)]
    assert made[0] > 0 and made[-1] == 0


def test_demand_and_traversals_are_compared_by_the_routed_visits(shared_graph_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "server.strategies.rewire.propose_edits", lambda *_, margin, resting: seen.append(margin) or []
    )
    average = UsageAverage()
    average.add([np.zeros((8, 8))] * 2, decay=0.5)
    global_model = GlobalModel(str(shared_graph_dir))
    run(global_model, average, None)
    global_model.model.config.experts_per_token = 7
    run(global_model, average, None)
    # 4 and 7 experts per token, two of them shared.
    assert seen == [1.0, 2.5]


def test_an_edited_edge_rests(global_model, usage):
    state = FederationState(server_round=3, usage=usage)
    run(global_model, state, None, edit_rest=2)
    edited = {(edit.layer, edit.p, edit.q) for edit in global_model.steps[-1].edits}
    usage.counts = [100 * np.triu(np.random.default_rng(0).random((4, 4))) for _ in range(2)]
    later = []
    for state.server_round in (4, 5):
        later.append(
            {
                (edit["layer"], edit["p"], edit["q"])
                for edit in run(global_model, state, None, edit_rest=2, rho_max=9).edits
            }
        )
    assert len(edited) == 2 and later[0] and not edited & later[0]


def test_drift_spawns_an_expert_where_routing_moved_and_restarts_the_detection(global_model, usage):
    state = FederationState(server_round=3, usage=usage, drift=Drift(overall=True, layers=[0.1, 0.4]))
    model = copy.deepcopy(global_model.model)
    record = run(global_model, state, None, max_spawned=1, rho_max=1)
    (edit,) = record.edits
    # Visits without demand: 1, 2 + 6, 7 + 11 and 12 + 16.
    assert (edit["op"], edit["layer"], edit["p"], edit["q"]) == ("spawn-expert", 1, 3, 4)
    assert not state.drift.overall and [len(counts) for counts in usage.counts] == [4, 5]
    assert logit_difference(model, global_model.model, random_ids(model)) < 1e-5
    assert run(global_model, state, None, max_spawned=1, rho_max=1).edits[0]["op"] != "spawn-expert"


def test_a_new_expert_that_is_not_used_retires_after_a_round(global_model, usage):
    state = FederationState(server_round=3, usage=usage, drift=Drift(overall=True, layers=[0.1, 0.4]))
    run(global_model, state, None, max_spawned=1, rho_max=1)
    assert state.usage.counts[1][:, 4].sum() == 0
    keep = run(global_model, state, None, rho_max=0)  # the latest plan: it had no round
    assert keep.edits == []
    global_model.advance(random_change(global_model.model), value_bits=8)
    run(global_model, state, None, rho_max=2)
    global_model.advance(random_change(global_model.model), value_bits=8)
    (edit,) = run(global_model, state, None, rho_max=1).edits
    assert (edit["op"], edit["layer"], edit["p"]) == ("retire-expert", 1, 4)
    assert global_model.graph.num_experts == [4, 4] and [len(counts) for counts in usage.counts] == [4, 4]
