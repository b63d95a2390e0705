from __future__ import annotations

import copy

import pytest
import torch

from clients.residents.trial_training import best_residents
from clients.training.trainer import train_locally
from models.checkpoints.disk_experts import materialize, open_mapped
from models.graph.runtime_settings import residents, set_residents
from tests.support.local_training import local_training
from tests.support.tiny_graphs import graph_of, random_ids

TRAINING = local_training(local_steps=99, schedule="linear", warmup_steps=5)


def masks(*held: int) -> list[torch.Tensor]:
    return [torch.isin(torch.arange(4), torch.tensor(held))] * 2


def batches_of(model, count: int = 4):
    ids = random_ids(model, 2 * count, 16).split(2)
    return [(each, each) for each in ids]


def test_the_candidate_with_the_lower_loss_wins_wherever_it_stands():
    model = graph_of(visits=2)
    # Experts 2 and 3 are spoilt: whoever holds them starts from large outputs of no use.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.expert_layers():
            spoilt = layer.down_proj[2:]
            layer.down_proj[2:] = 3 * torch.randn(spoilt.shape, generator=generator)
    tried = batches_of(model)
    assert best_residents(model, [masks(0, 1), masks(2, 3)], tried, TRAINING) == 0
    assert best_residents(model, [masks(2, 3), masks(0, 1)], tried, TRAINING) == 1


def test_it_compares_the_losses_of_real_training():
    model = graph_of(visits=2)
    candidates, tried = [masks(0, 1), masks(1, 2), masks(0, 3)], batches_of(model)
    losses = []
    for candidate in candidates:
        client = copy.deepcopy(model)
        set_residents(client, candidate)
        result = train_locally(client, iter(tried), local_training(local_steps=4))
        losses.append(sum(result.losses[2:]))
    assert best_residents(model, candidates, tried, TRAINING) == losses.index(min(losses))


def test_a_model_in_memory_is_as_it_was():
    model = graph_of(visits=2)
    set_residents(model, masks(1, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    best_residents(model, [masks(0, 1), masks(2, 3)], batches_of(model), TRAINING)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [held.tolist() for held in residents(model)] == [held.tolist() for held in masks(1, 3)]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_on_disk_stay_there(tiny_graph_dir):
    model = open_mapped(str(tiny_graph_dir))
    storages = [layer.storage for layer in model.expert_layers()]
    routers = [layer.router.weight.detach().clone() for layer in model.expert_layers()]
    best_residents(model, [masks(0, 1), masks(2, 3)], batches_of(model), TRAINING, hold=materialize)
    assert [layer.storage for layer in model.expert_layers()] == storages
    assert all(layer.held == [] and layer.gate_up_proj.numel() == 0 for layer in model.expert_layers())
    for layer, router in zip(model.expert_layers(), routers, strict=True):
        assert torch.equal(layer.router.weight, router)


@pytest.mark.parametrize("count", [1, 3])
def test_on_a_tie_and_without_batches_the_first_wins(count):
    model = graph_of(visits=2)
    assert best_residents(model, [masks(0, 1)] * count, batches_of(model, 1), TRAINING) == 0
    assert best_residents(model, [masks(2, 3), masks(0, 1)], [], TRAINING) == 0
