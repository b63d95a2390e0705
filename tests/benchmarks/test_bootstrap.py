"""Benchmark of the bootstrap."""

from __future__ import annotations

import math

from benchmarks.bootstrap import measure

RATIOS = {"ppl_75_over_dense", "ppl_50_over_dense", "ppl_25_over_dense", "static_over_router_50"}


def test_a_quick_run_measures_every_figure_of_the_small_model():
    steps = []
    measured = measure(True, lambda *step: steps.append(step))
    assert set(measured.figures) == {f"small_{name}" for name in RATIOS} | {
        "seconds_bootstrap",
        "rss_over_weights",
        "healed_50_over_dense",
        "core_minutes_healing",
    }
    assert all(math.isfinite(value) for value in measured.figures.values())
    assert len(measured.peers["commands"]["heal"]["result"]["losses"]) == 2
    assert 1 < measured.figures["small_ppl_75_over_dense"] < measured.figures["small_ppl_25_over_dense"]
    assert steps == [("cases", done, 3) for done in (1, 2, 3)] and len(measured.peers["cases"]) == 3
