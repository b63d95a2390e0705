from __future__ import annotations

import copy
from itertools import repeat

import pytest
import torch

from models.assembler import (
    NUM_FEATURES,
    Assembler,
    choose_residents,
    expert_features,
    holding_scores,
    straight_through,
    train_assembler,
)
from models.perplexity import evaluate_loss
from models.settings import observing, residents, set_residents
from tests.conftest import tiny_llama
from tests.tiny_federation import all_equal
from tests.tiny_graphs import graph_of, random_ids, with_random_gains


@pytest.fixture
def assembler() -> Assembler:
    torch.manual_seed(0)
    return Assembler()


@pytest.fixture
def trained(assembler) -> Assembler:
    """One whose root scores no longer start at zero."""
    torch.nn.init.normal_(assembler.root.weight)
    torch.nn.init.normal_(assembler.embed.weight)
    return assembler


def test_logits_run_from_lower_to_higher_experts_only(trained):
    logits = trained(torch.randn(6, NUM_FEATURES))
    assert logits.shape == (6, 6)
    assert torch.equal(logits, logits.triu())
    assert (logits.triu(1)[torch.triu_indices(6, 6, 1).unbind()] != 0).all()


def test_holding_scores_add_the_mean_logit_of_the_edges_of_the_graph():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 8.0], [0.0, 0.0, 5.0]])
    edges = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert holding_scores(logits, edges).tolist() == [1 + 2, 3 + (2 + 8) / 2, 5 + 8]
    assert holding_scores(logits, torch.eye(3, dtype=torch.bool)).tolist() == [1, 3, 5]


def test_untrained_it_ranks_experts_by_how_often_the_clients_tokens_select_them(assembler):
    model = with_random_gains(graph_of(num_experts=8, visits=3))
    ids = random_ids(model, 8, 48, seed=3)
    picks = [torch.zeros(8) for _ in model.expert_layers()]

    def observer(index):
        def observe(layer, scores, walk, weights):
            for expert in walk.experts_TK.flatten().tolist():
                picks[index][expert] += 1

        return observe

    with torch.no_grad(), observing(model, observer):
        model(input_ids=ids)
    features = expert_features(model, ids)
    for rows, counts, layer in zip(features, picks, model.expert_layers(), strict=True):
        assert torch.allclose(rows[:, 0], torch.log(counts / counts.sum() * 8 + 1e-3), atol=1e-5)
        scores = holding_scores(assembler(rows), layer.edges)
        # Edges count next to nothing yet: experts whose counts differ by a tenth keep their order.
        for e in range(8):
            for f in range(8):
                if counts[e] > 1.1 * counts[f] + 1:
                    assert scores[e] > scores[f]


def test_features_are_finite_standardised_and_tell_the_depth():
    model = graph_of(num_experts=4, visits=2)
    features = expert_features(model, random_ids(model))
    assert [rows.shape for rows in features] == [(4, NUM_FEATURES)] * 2
    assert all(torch.isfinite(rows).all() for rows in features)
    assert [rows[:, 4].tolist() for rows in features] == [[0] * 4, [1] * 4]
    for rows in features:
        assert torch.allclose(rows[:, (1, 3)].mean(0), torch.zeros(2), atol=1e-5)
        assert torch.allclose(rows[:, (1, 3)].std(0, correction=0), torch.ones(2), atol=1e-4)
        assert rows[:, 2].mean() == pytest.approx(1, abs=1e-5)  # softmax shares, times E


def test_a_single_layer_and_a_single_expert_have_features():
    model = graph_of(tiny_llama(num_hidden_layers=1), num_experts=1, visits=1)
    (rows,) = expert_features(model, random_ids(model))
    assert rows.shape == (1, NUM_FEATURES) and torch.isfinite(rows).all()


@pytest.mark.parametrize(
    ("budget", "held"),
    [(0, [0, 1, 2, 3]), (1, [2]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])],
)
def test_the_best_scored_experts_within_the_budget_are_held(budget, held):
    resident = choose_residents(torch.tensor([-1.0, 2.0, 3.0, 0.5]), budget)
    assert resident.dtype == torch.bool and resident.nonzero().flatten().tolist() == held


def test_on_ties_the_lower_expert_is_held():
    assert choose_residents(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [True, True, True, False]
    assert choose_residents(torch.zeros(5), 2).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_exactly_zero_and_one_with_a_gradient_on_both_sides(seed):
    scores = (torch.randn(16, generator=torch.Generator().manual_seed(seed)) * 3).requires_grad_()
    resident = choose_residents(scores.detach(), 5)
    gate = straight_through(scores, resident)
    assert torch.equal(gate.detach(), resident.float())
    gate.sum().backward()
    assert (scores.grad > 0).all()
    inside, outside = scores.detach()[resident].min(), scores.detach()[~resident].max()
    soft = torch.sigmoid(scores.detach() - (inside + outside) / 2)
    assert torch.allclose(scores.grad, soft * (1 - soft), atol=1e-6)


def test_with_every_expert_held_there_is_nothing_to_learn():
    scores = torch.randn(4, requires_grad=True)
    gate = straight_through(scores, torch.ones(4, dtype=torch.bool))
    assert gate.tolist() == [1.0] * 4 and not gate.requires_grad


def test_the_runner_up_leaves_the_loss_as_it_is():
    model = with_random_gains(graph_of(num_experts=8, visits=2))
    ids = random_ids(model)
    held = [torch.arange(8) % 2 == 0, torch.arange(8) < 3]
    set_residents(model, held)
    alone = model(input_ids=ids, labels=ids).loss.item()
    for layer, resident in zip(model.expert_layers(), held, strict=True):
        layer.residency_gate = straight_through(resident * 2.0 - 1, resident)
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(alone, abs=1e-6)


def learn(assembler, model, ids, labels, features=None, **changes):
    options = {"budget": 2, "steps": 3, "learning_rate": 0.1, "autocast": False} | changes
    features = expert_features(model, ids) if features is None else features
    return train_assembler(assembler, model, features, repeat((ids, labels)), **options)


def test_only_the_assembler_learns(assembler):
    model = with_random_gains(graph_of(num_experts=4, visits=2))
    model.lm_head.requires_grad_(False)
    model.train()
    before, start = copy.deepcopy(model), copy.deepcopy(assembler.state_dict())
    ids = random_ids(model)
    losses = learn(assembler, model, ids, ids)
    assert len(losses) == 3
    assert all_equal(model, before)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = [name for name, value in assembler.state_dict().items() if not torch.equal(value, start[name])]
    assert {"root.weight", "embed.weight"} <= set(moved)
    assert [int(held.sum()) for held in residents(model)] == [2, 2]
    assert all(layer.residency_gate is None for layer in model.expert_layers())


def test_without_steps_the_assembler_stays_and_its_choice_is_made(assembler):
    model, start = graph_of(num_experts=4, visits=2), copy.deepcopy(assembler.state_dict())
    ids = random_ids(model)
    features = expert_features(model, ids)
    assert learn(assembler, model, ids, ids, steps=0, budget=1) == []
    assert all(torch.equal(value, start[name]) for name, value in assembler.state_dict().items())
    for rows, held, layer in zip(features, residents(model), model.expert_layers(), strict=True):
        assert torch.equal(held, choose_residents(holding_scores(assembler(rows), layer.edges), 1))


def test_it_finds_an_expert_that_it_would_not_have_held(assembler):
    """The text is what the model says with expert 3 alone; by frequency another expert is held."""
    model = graph_of(tiny_llama(num_hidden_layers=1), num_experts=4, visits=1)
    layer = model.expert_layers()[0]
    with torch.no_grad():
        layer.down_proj[3] *= 4
    ids = random_ids(model, 8, 32)
    features = expert_features(model, ids)
    rows = features[0]
    rows[:, 0] = torch.tensor([0.5, 0.2, -0.1, -0.3])  # frequencies that speak for expert 0
    set_residents(model, [torch.arange(4) == 3])
    with torch.no_grad():
        said = model(input_ids=ids).logits.argmax(-1)
    labels = torch.cat([ids[:, :1], said[:, :-1]], 1)
    losses = learn(assembler, model, ids, labels, features, budget=1, steps=25)
    assert residents(model)[0].tolist() == [False, False, False, True]
    assert evaluate_loss(model, ids, labels).mean < 0.9 * losses[0]
