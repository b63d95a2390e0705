from __future__ import annotations

import math

import pytest

from benchmarks.quality_per_byte import measure, target
from benchmarks.support.quality_runs import QUICK, Run

FIGURES = {
    "uplink_ratio_dense",
    "total_ratio_dense",
    "uplink_ratio_half_active",
    "uplink_ratio_fedit",
    "worst_client_ratio",
}


def test_the_quick_run_measures_every_method():
    steps = []
    measured = measure(True, lambda stage, done, total: steps.append((done, total)))
    assert set(measured.figures) == set(measured.notes) == FIGURES
    assert all(value is None or 0 < value < math.inf for value in measured.figures.values())
    assert steps[-1][0] == steps[-1][1]
    runs = measured.peers["runs"]
    for method in ("dense", "fedit", "ours", "half dense", "half ours"):
        seeds = QUICK.half_seeds if method.startswith("half") else QUICK.seeds
        assert [run["seed"] for run in runs[method]] == list(seeds)
        for run in runs[method]:
            first, last = run["trajectory"][0], run["trajectory"][-1]
            assert first["up"] == first["down"] == 0
            # Ours stops where it is good enough, which so little training may be from the start.
            assert method.endswith("ours") or min(last["up"], last["down"]) > 0
            assert all(math.isfinite(loss) for loss in last["losses"].values())
    assert runs["fedit"][0]["trajectory"][-1]["up"] < runs["dense"][0]["trajectory"][-1]["up"]


def _run(*losses: float) -> Run:
    entries = [
        {"round": i, "up": 10 * i, "down": 0, "losses": {"a": each, "b": each - 1}}
        for i, each in enumerate(losses)
    ]
    return Run("ours", 0, 1e-3, entries)


def test_the_target_is_most_of_the_gain():
    assert target(_run(5.0, 4.0, 3.0)) == pytest.approx(4.5 - 0.9 * 2)


def test_the_first_round_that_is_good_enough_counts():
    run = _run(5.0, 4.0, 3.0, 2.0)
    assert run.reached(2.6)["up"] == 20
    assert run.reached(4.5)["up"] == 0
    assert run.reached(1.0) is None


def test_the_worst_change_is_that_of_the_client_that_gained_least_at_the_target():
    run = _run(5.0, 4.0)
    run.trajectory[1]["losses"]["b"] = 3.8
    assert run.worst_change(3.9) == pytest.approx(math.exp(-0.2))
    # Half way between the start, 4.5, and the only round.
    assert run.worst_change(4.2) == pytest.approx(math.exp(-0.1))
    assert run.worst_change(4.5) == pytest.approx(1)
    assert run.worst_change(3.0) is None
