from __future__ import annotations

import copy
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch

from clients.training.starting_point import resident_units
from clients.training.trainer import expert_parameters, train_groups, train_locally
from configs.errors import UserError
from federated.aggregation.usage import UsageCounter
from models.checkpoints.load import load_dense
from models.graph.expert_modules import materialize_modules
from models.graph.graph_state import read_graph
from models.graph.lora import attach_lora
from models.graph.router_losses import collect_routing, load_balance_loss, router_loss
from models.graph.runtime_settings import residents, set_residents
from models.graph.unit_vectors import read_unit, unit_sizes
from tests.support.local_training import local_training
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains

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
    training = local_training(**{"local_steps": 3} | changes)
    return with_changes(model, repeat((ids, ids if labels is None else labels)), training)


def with_changes(model, batches, training):
    """What ``train_locally`` returns, and what it changed in each resident unit."""
    before = vectors(model)
    result = train_locally(model, batches, training)
    changed = {unit: read_unit(model, unit) - before[unit] for unit in resident_units(model)}
    return SimpleNamespace(losses=result.losses, tokens=result.tokens, deltas=changed)


def vectors(model) -> dict:
    return {unit: read_unit(model, unit) for unit in unit_sizes(model)}


def test_the_units_that_train_are_the_residents(model):
    assert resident_units(model) == TRAINED
    set_residents(model, [None, None])
    assert resident_units(model) == sorted(unit_sizes(model))


def test_residents_change_and_nothing_else(model, ids):
    before, frozen = vectors(model), copy.deepcopy(model.state_dict())
    train(model, ids)
    for unit, after in vectors(model).items():
        assert torch.equal(after, before[unit]) == (unit not in TRAINED)
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
    losses = train(model, ids, local_steps=30).losses
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]


def test_losses_are_those_of_the_model_before_each_step(model, ids):
    expected = model(input_ids=ids, labels=ids).loss.item()
    assert train(model, ids, local_steps=1).losses == [pytest.approx(expected, rel=1e-6)]


def test_predicted_tokens_are_counted(model, ids):
    labels = ids.clone()
    labels[0, 5:] = -100
    # 16 tokens a block predict 15; the first block predicts 4.
    assert train(model, ids, labels=labels, local_steps=3).tokens == 3 * (3 * 15 + 4)


def test_batches_are_taken_one_a_step(model):
    batches = iter([(random_ids(model, 1, 8, seed=seed),) * 2 for seed in range(5)])
    result = train_locally(model, batches, local_training(local_steps=3))
    assert len(result.losses) == 3 and len(set(result.losses)) == 3
    assert len(list(batches)) == 2


@pytest.mark.parametrize(("limit", "expected"), [(0.0, None), (0.5, 0.5), (1e9, None)])
def test_gradients_are_clipped_to_the_norm(model, ids, limit, expected, monkeypatch):
    norms = []

    def step(self, *_):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(model, ids, local_steps=1, max_grad_norm=limit)
    whole = unclipped_norm(model, ids)
    assert whole > 0.5
    assert norms == [pytest.approx(expected or whole, rel=1e-4)]


def unclipped_norm(model, ids) -> float:
    parameters = expert_parameters(model, "all")
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())


def test_the_norm_takes_effect_on_what_is_learned(model, ids):
    other = copy.deepcopy(model)
    set_residents(other, HELD)
    clipped, free = (
        train(each, ids, local_steps=3, max_grad_norm=norm) for each, norm in ((model, 1e-9), (other, 0))
    )
    assert clipped.deltas[0, 0].norm() < free.deltas[0, 0].norm()


@pytest.mark.parametrize("learning_rate", [1e4, 1e30])
def test_a_loss_that_is_not_finite_is_the_users_affair(model, ids, learning_rate):
    with pytest.raises(UserError, match="finite.*lower learning-rate"):
        train(model, ids, local_steps=50, learning_rate=learning_rate)


def test_labels_without_a_token_to_predict_are_no_training(model, ids):
    with pytest.raises(UserError, match="finite"):
        train(model, ids, labels=torch.full_like(ids, -100))


def test_bf16_products_leave_the_weights_in_fp32(model, ids):
    result = train(model, ids, autocast=True, local_steps=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    exact = train(with_held(), ids, local_steps=2)
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
    parameters = expert_parameters(model, "all")
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad} == {"mlp"}
    assert not model.training


ROUTING_NAMES = {"router.weight", "edge_gain", "edge_affinity", "output_gain"}
MATRIX_NAMES = {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("part", "names"),
    [("all", ROUTING_NAMES | MATRIX_NAMES), ("experts", MATRIX_NAMES), ("routing", ROUTING_NAMES)],
)
def test_only_the_part_that_trains_moves_or_has_a_gradient_or_optimizer_state(
    model, ids, part, names, monkeypatch
):
    held, step = [], torch.optim.AdamW.step

    def watch(self, *_):
        step(self)
        named = {id(p): name.partition(".mlp.")[2] for name, p in model.named_parameters()}
        held.append({named[id(p)] for p in self.state})
        held.append(
            {name.partition(".mlp.")[2] for name, p in model.named_parameters() if p.grad is not None}
        )

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    before = copy.deepcopy(model.state_dict())
    train(model, ids, local_steps=2, train=part)
    assert held == [names] * 4
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".mlp.")[2] for name in moved} == names
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gains_have_a_learning_rate_of_their_own(ids):
    moved = {}
    for factor in (1.0, 5.0):
        graph = with_held()
        before = copy.deepcopy(graph.state_dict())
        train(graph, ids, local_steps=1, gain_learning_rate=factor, max_grad_norm=0.0)
        moved[factor] = {
            name.rpartition(".")[2]: (value - before[name]).abs().max().item()
            for name, value in graph.state_dict().items()
            if ".layers.0.mlp." in name and value.is_floating_point()
        }
    for name, change in moved[1.0].items():
        expected = 5.0 if name in ("edge_gain", "output_gain") else 1.0
        assert moved[5.0][name] == pytest.approx(expected * change, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_every_optimizer_learns(model, ids, optimizer):
    rate = 0.5 if optimizer == "sgd" else 0.01
    losses = train(model, ids, local_steps=20, optimizer=optimizer, learning_rate=rate).losses
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_no_optimizer_moves_what_is_not_held(model, ids, optimizer):
    before = vectors(model)
    train(model, ids, optimizer=optimizer)
    assert all(torch.equal(v, before[unit]) for unit, v in vectors(model).items() if unit not in TRAINED)


def test_a_schedule_spans_the_rounds(ids):
    """Two rounds of sgd without momentum, which has no state, are one run of twice the steps."""
    options = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "learning_rate": 0.2,
        "schedule": "cosine",
        "warmup_steps": 2,
    }
    whole, halves = with_held(), with_held()
    train(whole, ids, local_steps=6, total_steps=6, **options)
    for first in (0, 3):
        train(halves, ids, local_steps=3, first_step=first, total_steps=6, **options)
    for unit, vector in vectors(whole).items():
        torch.testing.assert_close(vectors(halves)[unit], vector)


def test_a_schedule_that_has_ended_changes_nothing(model, ids):
    result = train(model, ids, schedule="linear", first_step=6, total_steps=6)
    assert not any(delta.any() for delta in result.deltas.values())


@pytest.mark.parametrize("labeled", [15, 3])
def test_accumulated_batches_are_one_larger_batch(ids, labeled):
    labels = ids.clone()
    labels[2:, labeled + 1 :] = -100  # batches that predict fewer tokens weigh less
    one, two = with_held(), with_held()
    large = train(one, ids, labels=labels, local_steps=2)
    halves = [(ids[:2], labels[:2]), (ids[2:], labels[2:])] * 2
    training = local_training(local_steps=2, accumulation_steps=2)
    small = with_changes(two, iter(halves), training)
    assert small.losses == pytest.approx(large.losses, rel=1e-5) and small.tokens == large.tokens
    for unit in TRAINED:
        torch.testing.assert_close(small.deltas[unit], large.deltas[unit], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_layers_learn_the_same_and_are_counted_once(ids, autocast):
    counts, results, models = [], [], []
    for checkpointing in (False, True):
        graph = with_held()
        counter = UsageCounter(read_graph(graph))
        with counter.counting(graph):
            results.append(
                train(
                    graph,
                    ids,
                    gradient_checkpointing=checkpointing,
                    load_balance_weight=0.1,
                    z_loss_weight=0.1,
                    autocast=autocast,
                )
            )
        counts.append(counter.counts())
        models.append(graph)
    assert results[0].losses == results[1].losses
    for unit in TRAINED:
        assert torch.equal(results[0].deltas[unit], results[1].deltas[unit])
    assert all((one == other).all() and one.any() for one, other in zip(*counts, strict=True))
    again = models[1]
    assert not again.is_activation_checkpointing and all(
        layer.observers == [] for layer in again.expert_layers()
    )
    assert not getattr(again, "_require_grads_hooks", None)


def test_checkpointing_keeps_fewer_activations(ids):
    kept = []
    for checkpointing in (False, True):
        sizes: list[int] = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train(with_held(), ids, local_steps=1, gradient_checkpointing=checkpointing)
        kept.append(sum(sizes))
    assert kept[1] < kept[0]


def test_router_losses_are_added_to_what_is_descended_but_not_to_what_is_reported(ids):
    plain = train(with_held(), ids, local_steps=1)
    weighted = train(with_held(), ids, local_steps=1, z_loss_weight=0.5)
    assert weighted.losses == plain.losses
    graph = with_held()
    parameters = expert_parameters(graph, "all")
    with collect_routing(graph) as routings:
        loss = graph(input_ids=ids, labels=ids).loss
        (loss + router_loss(routings, z_loss_weight=0.5)).backward()
    expected = {id(p): p.grad for p in parameters if p.grad is not None}
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    mine = with_held()
    options = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1, "z_loss_weight": 0.5}
    train(mine, ids, local_steps=1, **options)
    assert expected
    for unit, vector in vectors(graph).items():
        torch.testing.assert_close(vectors(mine)[unit], vector)


def test_the_load_balance_loss_spreads_the_load(ids):
    balances = []
    for weight in (0.0, 5.0):
        graph = graph_of(num_experts=8, visits=2)
        train(graph, ids, local_steps=30, load_balance_weight=weight, train="routing")
        with torch.no_grad(), collect_routing(graph) as routings:
            graph(input_ids=ids, use_cache=False)
        balances.append(sum(float(load_balance_loss(routing)) for routing in routings))
    assert balances[1] < balances[0]


def test_a_gradient_that_is_not_finite_is_the_users_affair(model, ids, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(UserError, match="finite gradient.*lower learning-rate"):
        train(model, ids)


def test_lora_factors_train_in_place_of_the_matrices(ids):
    graph = with_random_gains(graph_of(visits=2))
    materialize_modules(graph, residents(graph), kind="plain", dtype=torch.float32)
    factors = attach_lora(graph, rank=2, alpha=4.0, attention=True)
    chosen = {id(parameter) for parameter in expert_parameters(graph, "all")}
    assert chosen == {id(parameter) for parameter in factors}
    assert not {id(p) for p in expert_parameters(graph, "routing")} - chosen
    names = {name for name, p in graph.named_parameters() if p.requires_grad}
    assert {name.partition(".mlp.")[2] for name in names} == ROUTING_NAMES
    expert_parameters(graph, "experts")
    assert all(".lora_" in name for name, p in graph.named_parameters() if p.requires_grad)


def test_groups_of_a_dense_model_train_as_in_a_plain_loop(tiny_llama_dir):
    trained, expected = (load_dense(str(tiny_llama_dir)).float() for _ in range(2))
    chosen = dict(trained.requires_grad_(False).named_parameters())["model.layers.0.mlp.up_proj.weight"]
    chosen.requires_grad_(True)
    weight = dict(expected.requires_grad_(False).named_parameters())["model.layers.0.mlp.up_proj.weight"]
    weight.requires_grad_(True)
    batch = random_ids(trained, 2, 16)
    training = local_training(
        local_steps=2, optimizer="sgd", momentum=0.0, learning_rate=0.5, max_grad_norm=0.1
    )
    result = train_groups(trained, [{"params": [chosen], "lr": 0.5}], repeat((batch, batch)), training)
    losses = []
    for _ in range(2):
        loss = expected(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.norm() > 0.1  # so that clipping shows
        with torch.no_grad():
            weight -= 0.5 * 0.1 * gradient / gradient.norm()
    assert result.losses == pytest.approx(losses, rel=1e-5) and result.tokens == 2 * 2 * 15
    torch.testing.assert_close(chosen, weight, rtol=0, atol=1e-5)
    assert not trained.training
