from __future__ import annotations

import copy
from itertools import repeat

import pytest
import torch

from clients.trainer import LocalTraining, expert_parameters, resident_units, train_locally
from configs.errors import UserError
from models.settings import set_residents
from models.units import read_unit, unit_sizes
from tests.tiny_graphs import graph_of, random_ids, with_random_gains

HELD = [torch.tensor([True, False, True, False]), torch.tensor([False, False, False, True])]
TRAINED = [(0, 0), (0, 2), (1, 3)]


@pytest.fixture
def model():
    graph = with_random_gains(graph_of(visits=2))
    set_residents(graph, HELD)
    return graph


@pytest.fixture
def ids(model):
    return random_ids(model, 4, 16)


def train(model, ids, *, labels=None, **changes):
    training = LocalTraining(**{"steps": 3, "learning_rate": 0.01, "autocast": False} | changes)
    return train_locally(model, repeat((ids, ids if labels is None else labels)), training)


def vectors(model) -> dict:
    return {unit: read_unit(model, unit) for unit in unit_sizes(model)}


def test_the_units_that_train_are_the_residents(model):
    assert resident_units(model) == TRAINED
    set_residents(model, [None, None])
    assert resident_units(model) == sorted(unit_sizes(model))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_only_residents_change_and_deltas_are_what_changed(model, ids, weight_decay):
    before, frozen = vectors(model), copy.deepcopy(model.state_dict())
    result = train(model, ids, weight_decay=weight_decay)
    assert sorted(result.deltas) == TRAINED
    for unit, after in vectors(model).items():
        if unit in TRAINED:
            assert torch.equal(result.deltas[unit], after - before[unit]) and result.deltas[unit].any()
        else:
            assert torch.equal(after, before[unit])
    for name, value in model.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(value, frozen[name]), name


def test_gains_of_pairs_without_an_edge_never_move(model, ids):
    layer = model.expert_layers()[0]
    with torch.no_grad():
        layer.edges[0, 2] = False
        layer.edge_gain[0, 2] = layer.edge_affinity[0, 2] = 0
    train(model, ids, weight_decay=0.1)
    assert layer.edge_gain[0, 2] == layer.edge_affinity[0, 2] == 0


def test_with_all_resident_everything_that_an_edge_can_carry_learns(model, ids):
    set_residents(model, [None, None])
    layer = model.expert_layers()[0]
    with torch.no_grad():
        layer.edge_gain.zero_()
    train(model, ids)
    assert (layer.edge_gain[0, 1:] != 0).any()
    assert not torch.tril(layer.edge_gain).any()


def test_the_loss_falls_on_a_repeated_batch(model, ids):
    losses = train(model, ids, steps=30).losses
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]


def test_losses_are_those_of_the_model_before_each_step(model, ids):
    expected = model(input_ids=ids, labels=ids).loss.item()
    assert train(model, ids, steps=1).losses == [pytest.approx(expected, rel=1e-6)]


def test_predicted_tokens_are_counted(model, ids):
    labels = ids.clone()
    labels[0, 5:] = -100
    # 16 tokens a block predict 15; the first block predicts 4.
    assert train(model, ids, labels=labels, steps=3).tokens == 3 * (3 * 15 + 4)


def test_batches_are_taken_one_a_step(model):
    batches = iter([(random_ids(model, 1, 8, seed=seed),) * 2 for seed in range(5)])
    result = train_locally(model, batches, LocalTraining(steps=3, learning_rate=0.01, autocast=False))
    assert len(result.losses) == 3 and len(set(result.losses)) == 3
    assert len(list(batches)) == 2


@pytest.mark.parametrize(("limit", "expected"), [(0.0, None), (0.5, 0.5), (1e9, None)])
def test_gradients_are_clipped_to_the_norm(model, ids, limit, expected, monkeypatch):
    norms = []

    def step(self, *_):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(model, ids, steps=1, max_grad_norm=limit)
    whole = unclipped_norm(model, ids)
    assert whole > 0.5
    assert norms == [pytest.approx(expected or whole, rel=1e-4)]


def unclipped_norm(model, ids) -> float:
    parameters = expert_parameters(model)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())


def test_the_norm_takes_effect_on_what_is_learned(model, ids):
    other = copy.deepcopy(model)
    set_residents(other, HELD)
    clipped, free = (
        train(each, ids, steps=3, max_grad_norm=norm) for each, norm in ((model, 1e-9), (other, 0))
    )
    assert clipped.deltas[0, 0].norm() < free.deltas[0, 0].norm()


@pytest.mark.parametrize("learning_rate", [1e4, 1e30])
def test_a_loss_that_is_not_finite_is_the_users_affair(model, ids, learning_rate):
    with pytest.raises(UserError, match="finite.*lower learning-rate"):
        train(model, ids, steps=50, learning_rate=learning_rate)


def test_labels_without_a_token_to_predict_are_no_training(model, ids):
    with pytest.raises(UserError, match="finite"):
        train(model, ids, labels=torch.full_like(ids, -100))


def test_bf16_products_leave_the_weights_in_fp32(model, ids):
    result = train(model, ids, autocast=True, steps=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    exact = train(with_held(), ids, steps=2)
    assert result.losses == [pytest.approx(loss, rel=0.05) for loss in exact.losses]
    assert result.losses != exact.losses


def with_held():
    graph = with_random_gains(graph_of(visits=2))
    set_residents(graph, HELD)
    return graph


def test_training_is_repeatable(model, ids):
    one, other = train(model, ids), train(with_held(), ids)
    assert one.losses == other.losses
    assert all(torch.equal(one.deltas[unit], other.deltas[unit]) for unit in TRAINED)


def test_expert_parameters_freeze_all_others(model):
    parameters = expert_parameters(model)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad} == {"mlp"}
    assert not model.training
