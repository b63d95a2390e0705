from __future__ import annotations

import json

import pytest

from benchmarks.scale.apps import costs
from benchmarks.scale.apps.costs import COSTS_FILE, ServerCosts


@pytest.fixture
def clock(monkeypatch):
    """CPU seconds of the thread, which rise by one with every reading."""
    seconds = iter(range(1000))
    monkeypatch.setattr(costs.time, "thread_time", lambda: float(next(seconds)))


def test_seconds_are_counted_by_round_and_part(tmp_path, clock):
    counter = ServerCosts()
    with counter.counting("pack"):  # before the first round: not counted
        pass
    assert counter.begin(1) and not counter.begin(1)
    double = counter.counted("check", lambda value: 2 * value)
    assert double(4) == 8 and double(value=1) == 2
    with counter.counting("poll") as part:
        part.name = "exchange"
    assert counter.begin(2)
    counter.write(tmp_path)
    written = json.loads((tmp_path / COSTS_FILE).read_text())
    # Round 1 lasts from reading 2 to reading 9; its three parts take a second each, once or twice.
    assert written["rounds"] == [
        {"round": 1, "check": 2.0, "exchange": 1.0, "other": 4.0},
        {"round": 2, "other": 1.0},
    ]
    assert written["peak_bytes"] > 50e6
