from __future__ import annotations

import copy
from itertools import repeat

import pytest
import torch

from clients.residents.assembler import (
    Assembler,
    beside_parents,
    choose_residents,
    holding_scores,
    most_used,
    straight_through,
    train_assembler,
)
from clients.residents.expert_features import FREQUENCY, NUM_FEATURES, expert_features
from models.graph.runtime_settings import residents, set_residents
from models.runtime.perplexity import evaluate_loss
from tests.conftest import tiny_llama
from tests.support.tiny_federation import all_equal
from tests.support.tiny_graphs import graph_of, random_ids, shared_graph_of, with_random_gains


@pytest.fixture
def assembler() -> Assembler:
    torch.manual_seed(0)
    return Assembler([6, 6])


@pytest.fixture
def trained(assembler) -> Assembler:
    """One whose root scores no longer start at zero."""
    torch.nn.init.normal_(assembler.root.weight)
    torch.nn.init.normal_(assembler.embed.weight)
    return assembler


def test_logits_run_from_lower_to_higher_experts_only(trained):
    logits = trained(torch.randn(6, NUM_FEATURES), 0)
    assert logits.shape == (6, 6)
    assert torch.equal(logits, logits.triu())
    assert (logits.triu(1)[torch.triu_indices(6, 6, 1).unbind()] != 0).all()


def test_holding_scores_add_the_mean_logit_of_the_edges_of_the_graph():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 8.0], [0.0, 0.0, 5.0]])
    edges = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert holding_scores(logits, edges).tolist() == [1 + 2, 3 + (2 + 8) / 2, 5 + 8]
    assert holding_scores(logits, torch.eye(3, dtype=torch.bool)).tolist() == [1, 3, 5]


def test_untrained_it_ranks_experts_by_their_first_feature(assembler):
    for layer, edges in enumerate(
        (torch.eye(6, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool).triu())
    ):
        rows = torch.randn(6, NUM_FEATURES, generator=torch.Generator().manual_seed(layer))
        scores = holding_scores(assembler(rows, layer), edges)
        assert torch.equal(scores.argsort(), rows[:, 0].argsort())


def test_what_one_layer_learns_of_its_own_experts_stays_there(assembler):
    rows = torch.randn(6, NUM_FEATURES)
    before = [assembler(rows, layer) for layer in (0, 1)]
    with torch.no_grad():
        assembler.own[1][2] += 3
    after = [assembler(rows, layer) for layer in (0, 1)]
    assert torch.equal(before[0], after[0])
    moved = torch.zeros(6, 6)
    moved[2, 2] = 3
    torch.testing.assert_close(after[1] - before[1], moved)


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


def test_the_most_used_are_those_of_the_highest_frequency():
    features = [torch.zeros(4, NUM_FEATURES), torch.zeros(2, NUM_FEATURES)]
    features[0][:, FREQUENCY] = torch.tensor([-3.0, -1.0, -4.0, -2.0])
    features[0][:, 0] = torch.tensor([9.0, 0.0, 8.0, 0.0])
    features[1][:, FREQUENCY] = torch.tensor([-2.0, -1.0])
    first, second = most_used(features, 2)
    assert first.tolist() == [False, True, False, True] and second.tolist() == [True, True]
    assert all(held.all() for held in most_used(features, 0))


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


@pytest.mark.parametrize("budget", [2, 5, 16])
def test_shared_experts_do_not_set_the_threshold_of_the_others(budget):
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    resident = choose_residents(scores.detach(), budget, 2)
    gate = straight_through(scores, resident, 2)
    assert torch.equal(gate.detach(), resident.float()) and resident[:2].all()
    if budget == 5:
        routed = scores.detach()[2:].requires_grad_()
        straight_through(routed, resident[2:]).sum().backward()
        gate.sum().backward()
        assert torch.equal(scores.grad[2:], routed.grad) and not scores.grad[:2].any()
    else:
        assert not gate.requires_grad


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


def features_of(model, ids) -> list[torch.Tensor]:
    return expert_features(model, ids, ids, visits=[layer.num_visits for layer in model.expert_layers()])


def learn(model, ids, labels, features=None, **changes):
    """A fresh assembler after its steps, and their losses."""
    torch.manual_seed(0)
    assembler = Assembler(model.config.num_experts)
    options = {"budget": 2, "steps": 3, "learning_rate": 0.1, "autocast": False} | changes
    features = features_of(model, ids) if features is None else features
    return assembler, train_assembler(assembler, model, features, repeat((ids, labels)), **options)


def test_only_the_assembler_learns():
    model = with_random_gains(graph_of(num_experts=4, visits=2))
    model.lm_head.requires_grad_(False)
    model.train()
    before, ids = copy.deepcopy(model), random_ids(model)
    start, _ = learn(model, ids, ids, steps=0)
    assembler, losses = learn(model, ids, ids)
    assert len(losses) == 3
    assert all_equal(model, before)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    old = start.state_dict()
    moved = {name for name, value in assembler.state_dict().items() if not torch.equal(value, old[name])}
    assert {"root.weight", "embed.weight", "own.0", "own.1"} <= moved
    assert [int(held.sum()) for held in residents(model)] == [2, 2]
    assert all(layer.residency_gate is None for layer in model.expert_layers())


def test_without_steps_its_choice_is_that_of_the_features():
    model = graph_of(num_experts=4, visits=2)
    ids = random_ids(model)
    features = features_of(model, ids)
    _, losses = learn(model, ids, ids, features, steps=0, budget=1)
    assert losses == []
    for rows, held in zip(features, residents(model), strict=True):
        assert held.nonzero().flatten().tolist() == [int(rows[:, 0].argmax())]


@pytest.mark.parametrize(("budget", "held"), [(2, 2), (8, 8), (0, 8), (3, 3)])
def test_a_budget_of_the_shared_experts_or_of_all_leaves_nothing_to_learn(budget, held):
    model = shared_graph_of()
    ids = random_ids(model)
    _, losses = learn(model, ids, ids, budget=budget)
    assert len(losses) == (3 if budget == 3 else 0)
    for resident in residents(model):
        assert resident[:2].all() and resident.sum() == held


def test_it_finds_an_expert_that_it_would_not_have_held():
    """The text is what the model says with expert 3 alone; by its features another expert is held."""
    model = graph_of(tiny_llama(num_hidden_layers=1), num_experts=4, visits=1)
    layer = model.expert_layers()[0]
    with torch.no_grad():
        layer.down_proj[3] *= 4
    ids = random_ids(model, 8, 32)
    features = features_of(model, ids)
    features[0][:, 0] = torch.tensor([0.5, 0.2, -0.1, -0.3])
    set_residents(model, [torch.arange(4) == 3])
    with torch.no_grad():
        said = model(input_ids=ids).logits.argmax(-1)
    labels = torch.cat([ids[:, :1], said[:, :-1]], 1)
    _, losses = learn(model, ids, labels, features, budget=1, steps=25)
    assert residents(model)[0].tolist() == [False, False, False, True]
    assert evaluate_loss(model, ids, labels).mean < 0.9 * losses[0]


def test_an_attached_expert_ranks_with_its_best_parent_and_after_it():
    edges = torch.eye(5, dtype=torch.bool)
    edges[1, 4] = edges[2, 4] = True
    edges[4, 4] = False
    scores = beside_parents(torch.tensor([0.0, 3.0, 2.0, 2.5, -9.0]), edges, [4])
    assert scores.tolist() == [0.0, 3.0, 2.0, 2.5, 3.0]
    assert choose_residents(scores, 1).nonzero().flatten().tolist() == [1]
    assert choose_residents(scores, 2).nonzero().flatten().tolist() == [1, 4]
    assert beside_parents(scores, edges, []) is scores
