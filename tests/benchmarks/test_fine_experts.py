from __future__ import annotations

import math

import pytest
import torch

from benchmarks.fine_experts import WAYS, WIDTH, by_way, fine_layer, measure


def test_a_quick_run_gives_every_figure():
    threads = torch.get_num_threads()
    measured = measure(True, lambda stage, done, total: None)
    assert {"forward_over_dense", "decoding_over_dense", "chosen_over_best_max"} <= set(measured.figures)
    assert all(value is not None and 0 < value < math.inf for value in measured.figures.values())
    assert len(measured.peers["cases"]) == 6 and torch.get_num_threads() == threads


@pytest.mark.parametrize("experts", [16, 64])
@torch.no_grad()
def test_the_timed_ways_compute_the_same(experts):
    layer, x, results = fine_layer(experts, torch.float32), torch.randn(5, WIDTH), []
    for wide in WAYS.values():
        by_way(lambda: results.append(layer(x)), wide)()
    assert len(results) == 3
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
