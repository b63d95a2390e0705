from __future__ import annotations

import math

import pytest
import torch

from benchmarks.layer import EXPERTS, ComposedLoop, Shape, measure, random_graph_layer


def test_a_quick_run_gives_every_figure():
    threads = torch.get_num_threads()
    measured = measure(True, lambda stage, done, total: None)
    assert set(measured.figures) == {"speedup_fp32_k4", "speedup_bf16_k4", "walk_share", "decode_ratio_k8"}
    assert all(
        value is not None and math.isfinite(value) and value > 0 for value in measured.figures.values()
    )
    assert torch.get_num_threads() == threads


def test_the_layer_measured_has_four_edges_an_expert_and_gains():
    layer = random_graph_layer(Shape(32, 64, 8), 4)
    assert layer.edges.triu(1).sum(1).tolist() == [min(4, EXPERTS - 1 - expert) for expert in range(EXPERTS)]
    assert (layer.edge_gain != 0).all() and (layer.edge_affinity != 0).all()


def test_the_timed_alternatives_compute_the_same():
    layer, x = random_graph_layer(Shape(32, 64, 8), 4), torch.randn(2, 9, 32)
    torch.testing.assert_close(ComposedLoop(layer)(x), layer(x))


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_are_possible(tokens):
    layer = random_graph_layer(Shape(32, 64, 8), 4)
    assert layer(torch.zeros(1, tokens, 32)).shape == (1, tokens, 32)
