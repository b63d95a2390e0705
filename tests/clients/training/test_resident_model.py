from __future__ import annotations

from itertools import repeat

import pytest
import torch

from clients.training.resident_model import changes, hold_residents
from clients.training.starting_point import StartingPoint
from clients.training.trainer import train_locally
from configs.schema import load_run_config
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_graph
from models.graph.expert_modules import ExpertModules
from models.graph.unit_vectors import OTHERS, add_to_unit, unit_sizes
from tests.support.local_training import local_training
from tests.support.tiny_graphs import logit_difference, random_ids

HELD = [torch.tensor([True, False, True, False]), torch.tensor([False, False, False, True])]
UNITS = [(0, 0), (0, 2), (1, 3)]
TRAINING = local_training(local_steps=4, learning_rate=0.02)


def adapters_of(**changes):
    return load_run_config({key.replace("_", "-"): value for key, value in changes.items()}).adapters


def trained(tiny_graph_dir, adapters):
    """The residents after a few steps, and what changed."""
    model = open_mapped(str(tiny_graph_dir))
    start = StartingPoint(model)
    hold_residents(model, HELD, adapters, seed=1)
    ids = random_ids(model, 2, 16)
    train_locally(model, repeat((ids, ids)), TRAINING)
    return model, dict(changes(model, start, adapters))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4"])
def test_residents_are_held_as_the_run_says(tiny_graph_dir, weights):
    model = open_mapped(str(tiny_graph_dir))
    hold_residents(model, HELD, adapters_of(weights=weights, lora_rank=2), seed=0)
    for layer, held in zip(model.expert_layers(), HELD, strict=True):
        assert isinstance(layer.storage, ExpertModules)
        assert layer.storage.held == held.nonzero().flatten().tolist()
        assert torch.equal(layer.resident, held)
    fused = open_mapped(str(tiny_graph_dir))
    hold_residents(fused, HELD, adapters_of(), seed=0)
    assert [layer.held for layer in fused.expert_layers()] == [[0, 2], [3]]


@pytest.mark.parametrize("attention", [False, True])
def test_the_server_adds_up_exactly_what_lora_learned(tiny_graph_dir, attention):
    """The global model plus the changes that were shipped is the client's own trained model."""
    model, moved = trained(tiny_graph_dir, adapters_of(lora_rank=3, attention_lora=attention))
    assert list(moved) == UNITS + ([(0, OTHERS), (1, OTHERS)] if attention else [])
    whole = load_graph(str(tiny_graph_dir), dtype=torch.float32)
    sizes = unit_sizes(whole, attention=True)
    for unit, change in moved.items():
        assert change.numel() == sizes[unit] and change.any()
        add_to_unit(whole, unit, change)
    for layer, held in zip(whole.expert_layers(), HELD, strict=True):
        layer.resident = held
    ids = random_ids(whole, 2, 16, seed=3)
    assert logit_difference(model, whole, ids) < 1e-4
    untouched = load_graph(str(tiny_graph_dir), dtype=torch.float32)
    for layer, held in zip(untouched.expert_layers(), HELD, strict=True):
        layer.resident = held
    assert logit_difference(model, untouched, ids) > 1e-2


def test_factors_have_the_rank_they_were_given(tiny_graph_dir):
    _, moved = trained(tiny_graph_dir, adapters_of(lora_rank=2))
    gate_up = moved[0, 2][: 2 * 16 * 32].view(32, 32)
    assert torch.linalg.matrix_rank(gate_up, atol=1e-5) == 2


def test_a_4_bit_base_trains_factors_and_routing_and_moves_nothing_else(tiny_graph_dir):
    model, moved = trained(tiny_graph_dir, adapters_of(weights="nf4", lora_rank=2))
    assert list(moved) == UNITS
    assert all(change[: 3 * 16 * 32].any() and change[3 * 16 * 32 :].any() for change in moved.values())
    packed = [p for name, p in model.named_parameters() if "base_layer.weight" in name]
    assert packed and all(p.dtype == torch.uint8 and not p.requires_grad for p in packed)


def test_whole_matrices_that_train_change_in_every_entry(tiny_graph_dir):
    _, moved = trained(tiny_graph_dir, adapters_of())
    assert list(moved) == UNITS
    assert all((change[: 3 * 16 * 32] != 0).float().mean() > 0.9 for change in moved.values())
