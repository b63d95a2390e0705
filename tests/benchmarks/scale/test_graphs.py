from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.scale import graphs
from benchmarks.scale.graphs import graph_of, random_llama
from benchmarks.scale.settings import DEMO, FULL, TINY
from models.checkpoints.load import load_graph
from models.graph.unit_vectors import weight_count


@pytest.mark.parametrize(
    "size", sorted({point.size for point in FULL.points} | {TINY}, key=lambda size: size.name)
)
def test_experts_divide_the_neurons_of_each_size(size):
    assert size.intermediate % size.experts == 0 and size.hidden % 32 == 0


def test_the_graph_of_a_size_is_made_once(tmp_path, monkeypatch):
    folder = graph_of(TINY, tmp_path, 64)
    graph = load_graph(str(folder))
    assert sum(weight_count(layer) * layer.num_experts for layer in graph.expert_layers()) == TINY.weights
    monkeypatch.setattr(graphs, "write_bootstrapped", lambda *_: pytest.fail("made twice"))
    assert graph_of(TINY, tmp_path, 64) == folder


def test_a_random_llama_has_its_size(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(random_llama(replace(TINY, layers=3), tmp_path))
    shapes = [tuple(layer.mlp.gate_proj.weight.shape) for layer in model.model.layers]
    assert shapes == [(TINY.intermediate, TINY.hidden)] * 3


def test_the_demo_size_is_that_of_the_demo_model():
    model = AutoModelForCausalLM.from_pretrained(graphs.DEMO_MODEL)
    layers = model.model.layers
    assert (len(layers), *layers[0].mlp.gate_proj.weight.shape) == (
        DEMO.layers,
        DEMO.intermediate,
        DEMO.hidden,
    )
