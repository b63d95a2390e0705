from __future__ import annotations

import math

from benchmarks.budget import EXPERTS, measure, write_random_graph
from models.checkpoints.load import load_graph


def test_a_quick_run_gives_every_figure():
    measured = measure(True, lambda stage, done, total: None)
    assert set(measured.figures) == {"rss_ratio_quarter", "step_ratio_quarter"}
    assert all(
        value is not None and math.isfinite(value) and value > 0 for value in measured.figures.values()
    )
    quarter, whole = measured.peers["budget 4"], measured.peers["budget 16"]
    assert (quarter["residents"], whole["residents"]) == (4, 16)
    assert (quarter["experts_per_token"], whole["experts_per_token"]) == (2, 8)


def test_the_random_graph_is_a_whole_checkpoint_of_the_size_it_says(tmp_path):
    gigabytes = write_random_graph(tmp_path, hidden_size=32, ffn_size=64, layers=2)
    graph = load_graph(str(tmp_path))
    assert gigabytes * 1e9 == sum(4 * parameter.numel() for parameter in graph.parameters())
    for layer in graph.expert_layers():
        assert layer.edges.triu(1).sum(1).tolist() == [
            min(4, EXPERTS - 1 - expert) for expert in range(EXPERTS)
        ]
