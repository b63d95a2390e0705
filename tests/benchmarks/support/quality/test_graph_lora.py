from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.support.quality.graph_lora import graph_factors
from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.graph.runtime_settings import set_visits

RANK, ALPHA = 2, 4


@pytest.fixture
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def graph(dense):
    ids = torch.randint(0, 64, (4, 16))
    return build_graph(dense, plan_experts(dense, ids, BootstrapOptions(4)), 2)


def test_factors_on_a_graph_equal_those_of_peft_on_the_dense_model(dense, graph):
    ids = torch.randint(0, 64, (2, 8))
    neurons = [layer.neurons.flatten() for layer in graph.expert_layers()]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = get_peft_model(copy.deepcopy(dense), lora).eval()
    factors = graph_factors(graph, rank=RANK, alpha=ALPHA, seed=0)
    set_visits(graph, 4)
    theirs = {name: each for name, each in reference.named_parameters() if "lora_" in name}
    assert sum(each.numel() for each in factors.values()) == sum(each.numel() for each in theirs.values())
    torch.testing.assert_close(graph(ids).logits, dense(ids).logits)  # no change at the start
    with torch.no_grad():
        for name, each in theirs.items():
            each.normal_(generator=torch.Generator().manual_seed(len(name)))
        for name, each in factors.items():
            each.copy_(_same(name, theirs, neurons))
    expected = reference(ids).logits
    assert (expected - dense(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(graph(ids).logits, expected, rtol=1e-4, atol=1e-4)


def _same(name, theirs, neurons):
    """Factor of the dense model at the place of a factor of the graph, whose neurons are in another order."""
    layer, kind = int(name.split(".")[2]), "lora_A" if "lora_A" in name else "lora_B"
    if "self_attn" in name:
        return theirs[f"base_model.model.{name}"]
    part = next(each for each in ("gate", "up", "down") if f".{each}." in name)
    factor = theirs[f"base_model.model.model.layers.{layer}.mlp.{part}_proj.{kind}.default.weight"]
    if (part, kind) in (("gate", "lora_B"), ("up", "lora_B")):
        return factor[neurons[layer]]
    return factor[:, neurons[layer]] if (part, kind) == ("down", "lora_A") else factor


def test_only_the_factors_train(graph):
    graph.requires_grad_(False)
    factors = graph_factors(graph, rank=RANK, alpha=ALPHA, seed=0)
    for each in factors.values():
        each.requires_grad_(True)
    ids = torch.randint(0, 64, (2, 8))
    graph(input_ids=ids, labels=ids).loss.backward()
    moved = {name for name, each in graph.named_parameters() if each.grad is not None}
    assert moved == set(factors)
    assert all(each.grad.abs().sum() > 0 for name, each in factors.items() if "lora_B" in name)
