from __future__ import annotations

import copy

import pytest
import torch

from models.healing.parameters import finish_parameters, select_parameters
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids


def graph_with_defaults():
    """A graph of 8 experts, 4 a token, with default outputs of rank 2."""
    return graph_of(num_experts=8, visits=4, router="contribution", default_rank=2)


PARTS = {
    "defaults": {"down", "up", "bias", "norm", "router", "output_gain"},
    "lora": {"down", "up", "bias", "norm", "router", "output_gain", "lora"},
    "experts": {"down", "up", "bias", "norm", "router", "output_gain", "matrices"},
    "all": {"down", "up", "bias", "norm", "router", "output_gain", "matrices", "attention"},
}


def part_of(name: str) -> str:
    if ".lora_" in name:
        return "lora"
    if ".self_attn." in name:
        return "attention"
    if name.endswith(("gate_up_proj", "down_proj")):
        return "matrices"
    if "norm" in name:
        return "norm"
    return name.removesuffix(".weight").rpartition(".")[2]


@pytest.mark.parametrize("train", PARTS)
def test_each_choice_trains_its_parameters_in_every_layer(train):
    graph = graph_with_defaults()
    chosen = select_parameters(graph, train, rank=2, seed=0)
    assert {part_of(name) for name in chosen} == PARTS[train]
    for layer in (0, 1):
        assert {part_of(name) for name in chosen if f"layers.{layer}." in name} == PARTS[train]
    assert {name for name, value in graph.named_parameters() if value.requires_grad} == set(chosen)
    assert not any(part in name for name in chosen for part in ("embed", "lm_head", "edge_"))


def test_merged_factors_compute_the_same_function():
    graph, ids = graph_with_defaults(), random_ids(tiny_llama())
    before = copy.deepcopy(graph)
    chosen = select_parameters(graph, "lora", rank=2, seed=0)
    assert logit_difference(graph, before, ids) < 1e-6
    with torch.no_grad():
        for name, value in chosen.items():
            if "lora_B" in name:
                value.normal_(std=0.5)
    adapted = copy.deepcopy(graph)
    finish_parameters(graph)
    assert logit_difference(graph, before, ids) > 1e-2
    assert logit_difference(graph, adapted, ids) < 1e-4
    assert {name for name, _ in graph.named_parameters()} == {name for name, _ in before.named_parameters()}
    assert not any(value.requires_grad for value in graph.parameters())
