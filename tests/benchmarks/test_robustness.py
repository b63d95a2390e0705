from __future__ import annotations

import math

import pytest

from benchmarks.robustness import measure
from benchmarks.support.robustness import runs
from benchmarks.support.robustness.settings import AGGREGATIONS, QUICK


def test_the_quick_run_measures_every_attack_and_goes_on_from_finished_federations(tmp_path, monkeypatch):
    steps = []
    measured = measure(True, lambda stage, done, total: steps.append((done, total)), work=tmp_path)
    assert (
        set(measured.figures) == {"ppl_ratio_robust", "ppl_ratio_mean", "clean_cost"} == set(measured.notes)
    )
    assert steps[-1][0] == steps[-1][1] == len(AGGREGATIONS) * (1 + len(QUICK.attacks))
    assert all(0 < value < math.inf for value in measured.figures.values() if value is not None)
    found = {(run["aggregation"], run["attack"]): run for run in measured.peers["runs"]}
    for (_, attack), run in found.items():
        assert set(run["losses"]) == {"client-1", "client-2", "client-3"}
        assert run["refused"] == (QUICK.attackers if attack == "nan" else 0)
    flipped = measured.peers["ratios"]["mean"]["flipped"]
    assert flipped is None or flipped > measured.peers["ratios"]["robust"]["flipped"]

    monkeypatch.setattr(runs, "run_job", lambda *_: pytest.fail("a finished federation was repeated"))
    again = measure(True, lambda *_: None, work=tmp_path)
    assert again.figures == measured.figures and again.seconds == measured.seconds
