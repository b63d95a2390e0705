from __future__ import annotations

import pytest
import torch

from clients.residents.expert_features import NUM_FEATURES, expert_features, gate_importance
from models.checkpoints.disk_experts import open_mapped
from models.graph.runtime_settings import frozen, observing_walks, set_visits, visiting
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains


@pytest.fixture
def model():
    return with_random_gains(graph_of(num_experts=8, visits=3))


def features_of(model, ids):
    return expert_features(model, ids, ids, visits=[layer.num_visits for layer in model.expert_layers()])


def test_the_first_feature_weighs_how_often_an_expert_is_selected_and_how_much_the_loss_depends_on_it(model):
    ids = random_ids(model, 8, 48, seed=3)
    picks = [torch.zeros(8) for _ in model.expert_layers()]

    def observer(index):
        def observe(layer, scores, walk, weights):
            for expert in walk.experts_TK.flatten().tolist():
                picks[index][expert] += 1

        return observe

    with torch.no_grad(), observing_walks(model, observer):
        model(input_ids=ids)
    importance = gate_importance(model, ids, ids, visits=[3, 3])
    for rows, counts, each in zip(features_of(model, ids), picks, importance, strict=True):
        frequency = torch.log(counts / counts.sum() * 8 + 1e-3)
        torch.testing.assert_close(rows[:, 1], frequency)
        torch.testing.assert_close(rows[:, 0], (frequency + torch.log(each / each.mean() + 1e-3)) / 2)


def test_importance_is_the_squared_slope_of_the_loss_by_a_gate_on_the_experts_output(model):
    ids = random_ids(model, 2, 24)
    importance = gate_importance(model, ids, ids, visits=[3, 3])
    layer, step = model.expert_layers()[1], 1e-2
    for expert in (0, 5):
        losses = []
        for sign in (1, -1):
            layer.residency_gate = torch.ones(8)
            layer.residency_gate[expert] += sign * step
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
        layer.residency_gate = None
        slope = (losses[0] - losses[1]) / (2 * step)
        assert importance[1][expert].item() == pytest.approx(slope**2, rel=0.05, abs=1e-7)


def test_importance_follows_the_visits_asked_for_and_leaves_the_model_as_it_was(model):
    ids = random_ids(model, 4, 24)
    set_visits(model, 2)
    two = gate_importance(model, ids, ids, visits=[2, 2])
    set_visits(model, 5)
    again = gate_importance(model, ids, ids, visits=[2, 2])
    assert all(torch.equal(one, other) for one, other in zip(two, again, strict=True))
    assert all(layer.residency_gate is None and layer.num_visits == 5 for layer in model.expert_layers())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_features_are_finite_standardized_and_tell_the_depth():
    model = graph_of(num_experts=4, visits=2)
    features = features_of(model, random_ids(model))
    assert [rows.shape for rows in features] == [(4, NUM_FEATURES)] * 2
    assert all(torch.isfinite(rows).all() for rows in features)
    assert [rows[:, 4].tolist() for rows in features] == [[0] * 4, [1] * 4]
    for rows in features:
        assert rows[:, 2].mean().item() == pytest.approx(0, abs=1e-5)
        assert rows[:, 2].std(correction=0).item() == pytest.approx(1, abs=1e-4)
        assert rows[:, 3].mean() == pytest.approx(1, abs=1e-5)  # softmax shares, times E


def test_a_single_layer_a_single_expert_and_a_single_block_have_features():
    model = graph_of(tiny_llama(num_hidden_layers=1), num_experts=1, visits=1)
    (rows,) = features_of(model, random_ids(model, 1, 8))
    assert rows.shape == (1, NUM_FEATURES) and torch.isfinite(rows).all()


def test_experts_on_disk_have_the_same_features(tiny_graph_dir):
    from models.checkpoints.load import load_graph

    mapped, whole = open_mapped(str(tiny_graph_dir)), load_graph(str(tiny_graph_dir), dtype=torch.float32)
    ids = random_ids(whole)
    for one, other in zip(features_of(mapped, ids), features_of(whole, ids), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_gates_are_taken_off_after_an_error(model):
    with pytest.raises(IndexError):
        gate_importance(model, torch.full((2, 8), 1000), torch.zeros(2, 8, dtype=torch.long), visits=[3, 3])
    assert all(layer.residency_gate is None for layer in model.expert_layers())


def test_nothing_trains_within_a_frozen_block(model):
    model.lm_head.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError("inside")
    assert [p.requires_grad for p in model.parameters()] == before
    with visiting(model, [1, 1]):
        assert [layer.num_visits for layer in model.expert_layers()] == [1, 1]
