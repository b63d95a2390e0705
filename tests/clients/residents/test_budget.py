from __future__ import annotations

import psutil
import pytest

from clients.residents.budget import activation_bytes, budget_of_memory, client_budget, expert_bytes
from configs.errors import UserError
from configs.schema import load_run_config
from models.checkpoints.disk_experts import open_mapped
from models.graph.unit_vectors import weight_count
from tests.support.tiny_federation import node_of

MIB = 2**20


@pytest.fixture
def model(tiny_graph_dir):
    return open_mapped(str(tiny_graph_dir))


def config_of(**changes):
    return load_run_config({key.replace("_", "-"): value for key, value in changes.items()})


def occupied(model, config) -> float:
    """MiB that are taken before any expert is held."""
    return (psutil.Process().memory_info().rss + activation_bytes(config, model)) / MIB


@pytest.mark.parametrize(
    ("run", "node", "expected"),
    [
        ({}, {}, 0),
        ({"expert_budget": 3}, {}, 3),
        ({"budgets": "1,4"}, {}, 4),
        ({"budgets": "1,4"}, {"expert-budget": 2}, 2),
        ({"memory_budget_mb": 10**6}, {}, 4),
        ({"expert_budget": 3}, {"memory-budget-mb": 10**6}, 4),
        ({"memory_budget_mb": 10**6}, {"expert-budget": 1}, 1),
    ],
)
def test_a_nodes_own_budget_counts_before_the_runs(model, run, node, expected):
    assert client_budget(config_of(**run), node_of(node, partition=1), model, "a") == expected


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"expert-budget": 0}, "expected a budget from 1 to the graph's 4 experts for client a, got 0"),
        ({"expert-budget": 5}, "got 5"),
        ({"expert-budget": 2, "memory-budget-mb": 900}, "expected expert-budget or memory-budget-mb"),
        ({"memory-budget-mb": 1}, "expected memory-budget-mb of at least [0-9]+ for one expert"),
    ],
)
def test_what_cannot_be_held_is_refused(model, node, words):
    with pytest.raises(UserError, match=words):
        client_budget(config_of(), node_of(node), model, "a")


def test_a_budget_holds_all_shared_experts(shared_graph_dir, monkeypatch):
    model, config = open_mapped(str(shared_graph_dir)), config_of()
    assert client_budget(config, node_of({"expert-budget": 2}), model, "a") == 2
    with pytest.raises(UserError, match="from 2 to the graph's 8 experts, of which .* shared ones, .* got 1"):
        client_budget(config, node_of({"expert-budget": 1}), model, "a")
    monkeypatch.setattr("clients.residents.budget.expert_bytes", lambda config, model: 100.0 * MIB)
    memory = int(occupied(model, config)) + 150
    with pytest.raises(UserError, match="for the 2 shared experts a layer of client a"):
        budget_of_memory(config, model, memory, "a")


def test_as_many_experts_as_fit_are_held(model, monkeypatch):
    config = config_of(batch_size=1, block_size=16)
    monkeypatch.setattr("clients.residents.budget.expert_bytes", lambda config, model: 100.0 * MIB)
    for fitting in (1, 2, 4):
        # Half an expert more than fits: the process itself may grow a little in between.
        memory = int(occupied(model, config) + 100 * (fitting + 0.5))
        assert budget_of_memory(config, model, memory, "a") == fitting
    assert budget_of_memory(config, model, int(occupied(model, config) + 5000), "a") == 4
    with pytest.raises(UserError) as refused:
        budget_of_memory(config, model, int(occupied(model, config) + 50), "a")
    enough = int(str(refused.value).split("at least ")[1].split()[0])
    assert budget_of_memory(config, model, enough + 5, "a") == 1


SCORES = ("saliency", "magnitude")


def test_the_bytes_of_an_expert_follow_from_how_it_is_trained(model):
    weights = sum(weight_count(layer) for layer in model.expert_layers())
    assert expert_bytes(config_of(), model) == 16 * weights
    assert expert_bytes(config_of(optimizer="adafactor", density=0.05), model) == 9 * weights
    # Packing needs more than that where much is kept, and more again where the slopes of the loss are kept for it.
    everything = {name: expert_bytes(config_of(density=1.0, entry_score=name), model) for name in SCORES}
    assert everything["saliency"] == everything["magnitude"] + 4 * weights
    dense = expert_bytes(config_of(optimizer="adafactor", density=1.0), model)
    assert dense > 40 * weights
    assert expert_bytes(config_of(optimizer="adafactor", density=1.0, upload_budget_mb=1.0), model) < dense
    lora = {
        name: expert_bytes(config_of(weights=name, lora_rank=4), model) for name in ("fp32", "bf16", "nf4")
    }
    assert 12 * weights > lora["fp32"] > lora["bf16"] > lora["nf4"] > 3 * weights


def test_a_byte_budget_takes_memory_of_its_own(model, monkeypatch):
    monkeypatch.setattr("clients.residents.budget.expert_bytes", lambda config, model: 100.0 * MIB)
    config = config_of(batch_size=1, block_size=16)
    memory = int(occupied(model, config) + 350)
    held = [
        budget_of_memory(config.model_copy(update={"upload_budget_mb": megabytes}), model, memory, "a")
        for megabytes in (0.0, 1.0)
    ]
    assert held == [3, 1]


def test_activations_grow_with_tokens_visits_and_vocabulary(model):
    small = activation_bytes(config_of(batch_size=2, block_size=16), model)
    assert activation_bytes(config_of(batch_size=4, block_size=32), model) == 4 * small
    for layer in model.expert_layers():
        layer.num_visits += 1
    assert activation_bytes(config_of(batch_size=2, block_size=16), model) > small
