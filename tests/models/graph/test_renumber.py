"""Spawned, retired and renumbered experts of opened graphs: outputs, and undoing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from experts.graph.edit_plan import apply_plan
from experts.graph.edits import RemoveEdge, RetireExpert, SpawnExpert
from experts.graph.expert_graph import ExpertGraph
from models.graph.graph_state import read_graph
from models.graph.renumber import (
    id_origins,
    identity_origins,
    renumber_experts,
    renumber_layer,
    restore_layers,
    saved_layers,
    write_plan,
)
from models.graph.runtime_settings import observing_walks, set_residents
from models.graph.unit_vectors import read_unit
from tests.support.tiny_graphs import (
    graph_of,
    logit_difference,
    random_ids,
    shared_graph_of,
    with_random_gains,
)

SPAWNS = [SpawnExpert(0, 1, 4), SpawnExpert(1, 3, 4), SpawnExpert(1, 2, 5)]


def edited(model, edits):
    write_plan(model, apply_plan(read_graph(model), edits))
    return model


@pytest.mark.parametrize("visits", [1, 2, 4])
def test_spawned_experts_change_no_logit(visits):
    model = with_random_gains(graph_of(visits=visits))
    grown = edited(copy.deepcopy(model), SPAWNS)
    assert grown.config.num_experts == [5, 6] and grown.config.attached_experts == [[4], [4, 5]]
    ids = random_ids(model)
    assert logit_difference(model, grown, ids) < 1e-5
    one = ids[:1, :1]  # the decoding path
    assert logit_difference(model, grown, one) < 1e-5


def test_spawned_experts_change_no_logit_beside_shared_experts_and_default_outputs():
    model = shared_graph_of()
    grown = edited(copy.deepcopy(model), [SpawnExpert(0, 3, 8)])
    assert logit_difference(model, grown, random_ids(model)) < 1e-5


def test_an_attached_expert_runs_for_the_tokens_of_its_parent_alone_beside_their_k():
    model = edited(graph_of(visits=2), [SpawnExpert(0, 1, 4)])
    layer, seen = model.expert_layers()[0], []
    with torch.no_grad():
        layer.write_expert(4, *(torch.ones_like(each) for each in layer.read_expert(4)))

    def observer(index):
        return lambda block, scores, walk, weights: seen.append((index, walk, weights))

    with observing_walks(model, observer), torch.no_grad():
        model(input_ids=random_ids(model))
    (_, walk, weights), *_ = (each for each in seen if each[0] == 0)
    follows = (walk.experts_TK[:, :2] == 1).any(1)
    assert 0 < follows.sum() < len(follows)
    assert (walk.experts_TK[:, :2] < 4).all() and walk.experts_TK.shape[1] == 3
    assert torch.equal(walk.experts_TK[:, 2], torch.where(follows, 4, -1))
    assert torch.equal(walk.parents_TK[:, 2], torch.where(follows, 1, -1))
    assert (weights[:, 2] == 1).all()
    x_TD = torch.randn(32, layer.hidden_size)
    without = copy.deepcopy(layer)
    without.resident = torch.tensor([True, True, True, True, False])
    rows = (layer.walk(layer.router(x_TD)).experts_TK == 1).any(1)
    added = layer(x_TD) - without(x_TD)
    torch.testing.assert_close(added, layer.run_expert(4, x_TD) * rows[:, None], rtol=1e-4, atol=1e-4)


def test_an_attached_expert_learns():
    model = edited(graph_of(visits=2), [SpawnExpert(0, 1, 4)])
    ids = random_ids(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.expert_layers()[0].down_proj.grad[4].abs().sum() > 0
    set_residents(model, [torch.tensor([True, False, True, True, True]), None])
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_retired_experts_leave_the_others_as_they_were():
    model = with_random_gains(graph_of())
    before = copy.deepcopy(model)
    edited(model, [RetireExpert(0, 1)])
    old, new = before.expert_layers()[0], model.expert_layers()[0]
    for place, origin in enumerate([0, 2, 3]):
        for one, other in zip(new.read_expert(place), old.read_expert(origin), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(new.router.weight[place], old.router.weight[origin])
    kept = [0, 2, 3]
    assert torch.equal(new.edge_gain, old.edge_gain[kept][:, kept] * new.edges.triu(1))
    assert new.neurons.tolist() == old.neurons[kept].tolist() and new.ids == (0, 2, 3)
    assert model.config.num_experts == [3, 4]


@pytest.mark.parametrize(
    "edits", [SPAWNS, [RetireExpert(0, 0), RemoveEdge(1, 0, 1)], [SPAWNS[0], RetireExpert(1, 2)]]
)
def test_a_plan_is_undone_bit_for_bit(edits):
    model = with_random_gains(graph_of())
    graph, state = read_graph(model), {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    saved = saved_layers(model)
    edited(model, edits)
    restore_layers(model, saved)
    assert read_graph(model).digest() == graph.digest() and model.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_identities_find_experts_again():
    graph = ExpertGraph((np.eye(4, dtype=bool),))
    spawned = apply_plan(graph, [SpawnExpert(0, 0, 4)]).graph
    retired = apply_plan(spawned, [RetireExpert(0, 2)]).graph
    assert [each.tolist() for each in identity_origins(graph, retired)] == [[0, 1, 3, -1]]
    assert [each.tolist() for each in identity_origins(spawned, retired)] == [[0, 1, 3, 4]]
    assert [each.tolist() for each in id_origins([(5, 7)], [(7, 6, 5)])] == [[1, -1, 0]]


def test_new_experts_are_zeros_until_written():
    model = with_random_gains(graph_of())
    renumber_experts(model, [np.array([3, -1]), np.arange(4)])
    assert not read_unit(model, (0, 1)).any()
    assert model.config.num_experts == [2, 4]


def test_a_layer_that_holds_a_part_of_its_experts_is_refused():
    layer = graph_of().expert_layers()[0]
    layer.hold([0], layer.gate_up_proj[:1], layer.down_proj[:1])
    with pytest.raises(ValueError, match="to hold all its experts"):
        renumber_layer(layer, np.array([0, 1]))
