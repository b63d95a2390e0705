from __future__ import annotations

import copy

import numpy as np
import pytest

from experts.graph.edge_edits import Edit, propose_edits
from experts.graph.expert_graph import ExpertGraph
from federated.data.blocks import Blocks
from models.graph.graph_state import write_graph
from models.runtime.perplexity import LossSum, evaluate_loss
from server.model.global_model import GlobalModel
from server.rounds.rewire import UsageAverage, merge
from tests.support.tiny_federation import all_equal, random_change, save_tiny_graph
from tests.support.tiny_graphs import random_ids, with_random_gains


@pytest.fixture
def server(tmp_path, tiny_tokenizer) -> GlobalModel:
    """Edges 0 -> 1 -> 2 -> 3 with gains, after a first step."""
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=3)
    server = GlobalModel(str(graph))
    with_random_gains(server.model)
    write_graph(server.model, ExpertGraph((np.eye(4, dtype=bool) | np.eye(4, k=1, dtype=bool),) * 2))
    server.advance(random_change(server.model), value_bits=8)
    return server


@pytest.fixture
def usage() -> UsageAverage:
    average = UsageAverage(0.5)
    counts = np.triu(np.arange(16).reshape(4, 4) + 1)
    counts[0, 2] = 100
    average.add([[counts, counts]])
    return average


@pytest.fixture
def validation(server) -> Blocks:
    ids = random_ids(server.model)
    return Blocks(ids, ids)


def run(server, usage, validation, **changes):
    options = {"server_round": 3, "rho_max": 2, "max_drift": 100.0} | changes
    return merge(server, usage, validation=validation, **options)


def test_usage_is_summed_over_clients_and_averaged_over_rounds():
    average = UsageAverage(0.75)
    one, two = np.array([[1, 2], [0, 3]]), np.array([[10, 20], [0, 30]])
    average.add([[one, two], [two, two]])
    assert np.array_equal(average.counts[0], one + two) and np.array_equal(average.counts[1], 2 * two)
    average.add([[two, one]])
    assert np.allclose(average.counts[0], 0.75 * (one + two) + 0.25 * two)
    assert np.allclose(average.counts[1], 0.75 * 2 * two + 0.25 * one)
    before = copy.deepcopy(average.counts)
    average.add([])
    assert all(np.array_equal(a, b) for a, b in zip(average.counts, before, strict=True))


def test_a_decay_of_zero_forgets_the_past():
    average = UsageAverage(0.0)
    for value in (5, 7):
        average.add([[np.full((2, 2), value)]])
    assert average.counts[0].tolist() == [[7, 7], [7, 7]]


def test_a_merge_makes_the_proposed_edits_as_part_of_the_latest_step(server, usage):
    proposed = propose_edits(server.graph, usage.counts, 2)
    version = server.version
    record = run(server, usage, None)
    assert [edit["op"] for edit in record.edits] == ["remove-edge", "add-edge"]
    assert record.edits == [edit.as_dict() for edit in proposed]
    assert (record.round, record.rho_max) == (3, 2)
    assert (record.loss_before, record.loss_after, record.gamma_hat) == (None, None, None)
    assert server.graph.version == 1 and server.version == version
    assert server.steps[-1].edits == proposed


def test_with_validation_text_the_drift_is_measured(server, usage, validation):
    before = evaluate_loss(server.model, validation.input_ids, validation.labels).mean
    record = run(server, usage, validation)
    after = evaluate_loss(server.model, validation.input_ids, validation.labels).mean
    assert (record.loss_before, record.loss_after) == (before, after)
    assert before != after
    assert record.gamma_hat == abs(after - before) / 2
    assert server.graph.version == 1


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
def test_a_merge_that_costs_too_much_is_taken_back(
    server, usage, validation, losses, max_drift, kept, monkeypatch
):
    given = iter(losses)
    monkeypatch.setattr("server.rounds.rewire.evaluate_loss", lambda *_: LossSum(next(given), 1))
    before, digest = copy.deepcopy(server.model), server.graph.digest()
    record = run(server, usage, validation, max_drift=max_drift)
    assert (len(record.edits) == 2) == kept == bool(server.steps[-1].edits)
    if not kept:
        assert server.graph.digest() == digest and all_equal(server.model, before)
        assert record.edits == []
        np.testing.assert_equal(record.gamma_hat, abs(losses[1] - losses[0]) / 2)


def test_without_usage_or_demand_there_is_nothing_to_merge(server, validation):
    average = UsageAverage(0.5)
    assert run(server, average, validation).edits == []
    average.add([[np.zeros((4, 4))] * 2])
    record = run(server, average, validation)
    assert record.edits == [] and record.gamma_hat is None
    assert server.graph.version == 0 and server.steps[-1].edits == []


def test_pairs_whose_edge_came_or_went_start_from_the_mean_of_their_layer():
    average = UsageAverage(0.5)
    counts = np.array([[9, 1, 2], [0, 9, 6], [0, 0, 9]])
    average.add([[counts, counts]])
    average.forget([Edit("add-edge", 1, 1, 2)])
    assert np.array_equal(average.counts[0], counts)
    assert average.counts[1].tolist() == [[9, 1, 2], [0, 9, 3], [0, 0, 9]]


def test_a_graph_used_the_same_way_settles(server, usage):
    made = [len(run(server, usage, None).edits) for _ in range(12)]
    assert made[0] > 0 and made[-1] == 0
