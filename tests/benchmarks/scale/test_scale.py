from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.scale import runs
from benchmarks.scale.__main__ import ERRORS, measure, measured
from benchmarks.scale.cost_model import PARTS
from benchmarks.scale.runs import load_of
from benchmarks.scale.settings import FULL, QUICK


def test_the_quick_run_measures_two_federations_and_goes_on_from_finished_ones(tmp_path, monkeypatch):
    steps = []
    found = measure(True, lambda stage, done, total: steps.append((done, total)), work=tmp_path)
    assert steps == [(1, 2), (2, 2)]
    assert set(found.notes) <= set(found.figures)
    for row in found.peers["points"]:
        assert min(row["measured"].values()) > 0 and len(row["rounds"]) == QUICK.rounds
        assert all(cost[part] > 0 for cost in row["costs"] for part in PARTS)
        assert 50e6 < row["measured"]["peak_bytes"] < 3e9
    few, many = (row["measured"] for row in found.peers["points"])
    assert many["bytes_up"] > few["bytes_up"] and many["bytes_down"] > few["bytes_down"]
    monkeypatch.setattr(runs, "run_point", lambda *_: pytest.fail("a finished federation was repeated"))
    again = measure(True, lambda *_: None, work=tmp_path)
    assert again.figures == found.figures and again.seconds == found.seconds


LARGE = [
    (replace(load_of(FULL.points[0], FULL), weights=1e7), dict.fromkeys(("check", "aggregate", "pack"), 1.0))
]


MEMORY = {"per unit": 0.0, "per usage count": 0.0}


def result_of(clients: int, **changes: Any) -> dict[str, Any]:
    """A run whose costs are proportional to its clients, except for its memory."""
    client = {"name": "client-0", "budget": 8, "bytes_up": 1100, "bytes_down": 500, "update_bytes": 1000}
    row = {
        "step_bytes": 300,
        "clients": [client] * clients,
        "bytes_up": 1100 * clients,
        "bytes_down": 500 * clients,
    }
    rounds = [{"round": number, **row} for number in (1, 2)]
    costs = [{"round": number, **dict.fromkeys(PARTS, 0.1 * clients)} for number in (1, 2)]
    return {"rounds": rounds, "costs": costs, "peak_bytes": 1000 + clients, "seconds": 2.0, **changes}


def test_the_figures_are_the_largest_errors_on_held_out_points():
    settings = replace(FULL, rounds=2)
    found = measured(settings, {point: result_of(point.clients) for point in settings.points}, LARGE, MEMORY)
    held_out = [row for row in found.peers["points"] if row["held_out"]]
    assert [row["clients"] for row in held_out] == [50, 24]
    for figure, name in ERRORS.items():
        errors = [abs(row["predicted"][name] / row["measured"][name] - 1) for row in held_out]
        assert found.figures[f"{figure}_error_held_out"] == pytest.approx(max(errors))
    assert found.figures["relative_error_held_out"] == max(
        found.figures[f"{figure}_error_held_out"] for figure in ERRORS
    )
    assert found.figures["rss_ratio_50_over_8"] == pytest.approx(1050 / 1008)
    assert found.seconds == 2.0 * len(settings.points)
