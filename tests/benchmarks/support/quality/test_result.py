from __future__ import annotations

import math

import pytest

from benchmarks.support.quality.result import Run, mean_loss


def run_of(*losses: float) -> Run:
    entries = [
        {"round": i, "up": 10 * i, "down": 0, "losses": {"a": each, "b": each - 1}}
        for i, each in enumerate(losses)
    ]
    return Run("ours", 0, (1e-3, "linear"), entries)


def test_the_mean_loss_is_the_log_of_the_geometric_mean_perplexity():
    entry = {"losses": {"a": math.log(2.0), "b": math.log(8.0)}}
    assert math.exp(mean_loss(entry)) == pytest.approx(4.0)
    assert run_of(5.0, 4.0).loss == 3.5


def test_the_first_round_that_is_good_enough_counts():
    run = run_of(5.0, 4.0, 3.0, 2.0)
    assert run.reached(2.6)["up"] == 20
    assert run.reached(4.5)["up"] == 0
    assert run.reached(1.0) is None


def test_the_worst_change_is_that_of_the_client_that_gained_least_at_the_target():
    run = run_of(5.0, 4.0)
    run.trajectory[1]["losses"]["b"] = 3.8
    assert run.worst_change(3.9) == pytest.approx(math.exp(-0.2))
    # Half way between the start, 4.5, and the only round.
    assert run.worst_change(4.2) == pytest.approx(math.exp(-0.1))
    assert run.worst_change(4.5) == pytest.approx(1)
    assert run.worst_change(3.0) is None
