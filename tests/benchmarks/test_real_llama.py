from __future__ import annotations

import math

import pytest

from benchmarks.real_llama import QUICK, TABLE, chosen_row, measure
from benchmarks.support.quality.result import Run

METHODS = ("half dense", "half ours", "half fedit", "dense")


def test_the_quick_run_measures_every_method_and_setting(tmp_path):
    steps = []
    measured = measure(True, lambda stage, done, total: steps.append((done, total)), work=tmp_path)
    assert set(measured.figures) == set(measured.notes)
    assert set(measured.figures) == {
        "uplink_ratio_dense",
        "total_ratio_dense",
        "worst_client_ratio",
        "uplink_ratio_fedit",
        "ppl_over_dense",
    }
    assert all(value is None or 0 < value < math.inf for value in measured.figures.values())
    assert steps[-1] == (8, 8)
    runs = measured.peers["runs"]
    for method in METHODS:
        assert [run["seed"] for run in runs[method]] == list(QUICK.half_seeds)
        start, end = runs[method][0]["trajectory"][0], runs[method][0]["trajectory"][-1]
        assert start["up"] == 0 < min(end["up"], end["down"])
        assert end["losses"] != start["losses"]
    # The same graph and text in all three methods; the dense model starts from a lower loss.
    starts = {method: runs[method][0]["trajectory"][0]["losses"] for method in METHODS}
    assert starts["half ours"] == pytest.approx(starts["half dense"], abs=1e-4)
    assert starts["half fedit"] == pytest.approx(starts["half dense"], abs=1e-4)
    assert all(starts["dense"][name] < loss for name, loss in starts["half dense"].items())
    # Settings are tried on the first seed only.
    assert [row["keys"] for row in measured.peers["table"]] == [{}, *TABLE[:1]]
    assert {run["seed"] for run in runs["table"]} == set(QUICK.seeds)
    up = [run["trajectory"][-1]["up"] for run in runs["table"]]
    assert up[1] < up[0]
    # A second run reads all of them.
    assert measure(True, lambda *step: None, work=tmp_path).figures == measured.figures
    assert len(list(tmp_path.glob("*.json"))) == 8


def trained(*losses: tuple[float, float], up: int, **keys: float) -> Run:
    entries = [
        {"round": i, "up": up * i, "down": up * i, "losses": {"a": a, "b": b}}
        for i, (a, b) in enumerate([(3.0, 3.0), *losses])
    ]
    return Run("half ours", 0, (1e-3, "linear"), entries, keys=keys)


def test_the_cheapest_settings_with_a_good_worst_client_are_chosen():
    dense = trained((2.0, 2.0), up=1000)
    even = trained((1.9, 1.9), up=10, density=1)
    uneven = trained((1.5, 2.3), up=1, density=2)
    short = trained((2.5, 2.5), up=1, density=3)
    assert chosen_row([uneven, even, short], dense) is even
    assert chosen_row([uneven, short], dense) is uneven
