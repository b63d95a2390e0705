from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.graph_vs_topk import build_arm, measure, outside_top_k, trained_figures
from federated.data.blocks import Blocks
from models.bootstrap.build import BootstrapOptions, plan_experts
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains


def test_a_quick_run_measures_every_figure():
    steps = []
    measured = measure(True, lambda *step: steps.append(step))
    assert set(measured.figures) == {"ppl_ratio_ci_high", "selection_changed_share", "mean_abs_gain"}
    assert all(math.isfinite(value) for value in measured.figures.values())
    assert measured.figures["mean_abs_gain"] > 0
    assert measured.peers["ppl_ratio_ci_low"] <= measured.figures["ppl_ratio_ci_high"]
    assert steps[-1] == ("seeds", 2, 2)
    json.dumps(measured.peers)
    for pair in measured.peers["seeds"]:
        assert pair["graph"]["edges"] > 0 == pair["topk"]["edges"]
        assert pair["topk"]["selection_changed_share"] == pair["topk"]["mean_abs_gain"] == 0


def test_both_arms_start_as_the_same_function():
    dense, ids = tiny_llama(), random_ids(tiny_llama())
    experts = plan_experts(dense, ids, BootstrapOptions(num_experts=8, experts_per_token=3))
    graph, flat = (build_arm(dense, experts, 3, arm) for arm in ("graph", "topk"))
    assert any(layer.edges.triu(1).any() for layer in graph.expert_layers())
    assert not any(layer.edges.triu(1).any() for layer in flat.expert_layers())
    assert logit_difference(graph, flat, ids) == 0


def test_visits_outside_the_top_k_are_counted():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert outside_top_k(scores, torch.tensor([[1, 0], [2, 3]])) == (0, 4)
    assert outside_top_k(scores, torch.tensor([[0, 2], [0, 1]])) == (3, 4)
    assert outside_top_k(scores, torch.tensor([[0, -1], [-1, -1]])) == (0, 1)


@pytest.mark.parametrize("learned", [False, True])
def test_figures_of_a_trained_graph(learned):
    model = graph_of(num_experts=8, visits=3)
    model = with_random_gains(model) if learned else model
    ids = random_ids(model)
    figures = trained_figures(model, Blocks(ids, ids))
    with torch.no_grad():
        assert figures["perplexity"] == pytest.approx(
            math.exp(model(input_ids=ids, labels=ids).loss), rel=1e-4
        )
    if not learned:
        assert figures["mean_abs_gain"] == figures["selection_changed_share"] == 0
        return
    layers = model.expert_layers()
    gains = [
        layer.edge_gain[p, q].abs().item() for layer in layers for p in range(8) for q in range(p + 1, 8)
    ]
    assert figures["edges"] == len(gains) and figures["mean_abs_gain"] == pytest.approx(
        sum(gains) / len(gains)
    )
    assert 0 < figures["selection_changed_share"] < 1
