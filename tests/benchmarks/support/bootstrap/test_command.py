"""Figures of the commands bootstrap and heal."""

from __future__ import annotations

from benchmarks.support.bootstrap.command import Measured


def test_figures_are_ratios_to_the_dense_model_and_its_weights():
    perplexity = {"dense": 10.0, "before": 16.0, "after": 12.0}
    heal = {"seconds": 400.0, "peak_bytes": 5, "result": {"perplexity": perplexity, "core_seconds": 300.0}}
    measured = Measured(200, {"seconds": 150.0, "peak_bytes": 700, "result": {}}, heal)
    assert measured.figures() == {
        "seconds_bootstrap": 150.0,
        "rss_over_weights": 3.5,
        "healed_50_over_dense": 1.2,
        "core_minutes_healing": 5.0,
    }
