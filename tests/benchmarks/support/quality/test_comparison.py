from __future__ import annotations

import math

import pytest

from benchmarks.support.quality.comparison import (
    both_directions,
    byte_ratios,
    figure_notes,
    intervals,
    mean_figures,
    perplexities,
    run_line,
    target,
    uplink,
    worst_ratios,
)
from benchmarks.support.quality.result import Run


def run_of(*losses: float, up: int = 10, down: int = 0) -> Run:
    entries = [
        {"round": i, "up": up * i, "down": down * i, "losses": {"a": each, "b": each - 1}}
        for i, each in enumerate(losses)
    ]
    return Run("ours", 0, (1e-3, "linear"), entries)


def test_the_target_is_most_of_the_gain():
    assert target(run_of(5.0, 4.0, 3.0)) == pytest.approx(4.5 - 0.9 * 2)


def test_bytes_are_compared_where_each_run_reaches_the_loss():
    dense, ours = run_of(5.0, 4.0, 3.0, up=1000, down=500), run_of(5.0, 3.9, up=20, down=30)
    assert byte_ratios([dense], [ours], [3.6], uplink) == [1000 / 20]
    assert byte_ratios([dense], [ours], [3.6], both_directions) == [1500 / 50]
    assert byte_ratios([dense], [ours], [2.6], uplink) == [None]


def test_worst_clients_are_compared_at_the_same_mean():
    dense, ours = run_of(5.0, 4.0), run_of(5.0, 4.0)
    ours.trajectory[1]["losses"] = {"a": 4.5, "b": 2.5}
    assert worst_ratios([ours], [dense], [3.5]) == [pytest.approx(math.exp(-0.5) / math.exp(-1.0))]
    assert worst_ratios([ours], [dense], [1.0]) == [None]


def test_a_figure_is_the_mean_over_seeds_and_missing_where_one_is():
    found = {"good": [1.0, 2.0], "short": [1.0, None], "single": [3.0]}
    assert mean_figures(found) == {"good": 1.5, "short": None, "single": 3.0}
    assert set(intervals(found)) == {"good"}


def test_the_perplexities_of_a_run_are_geometric_means():
    found = perplexities(run_of(5.0, 4.0))
    assert found == {
        "start": pytest.approx(math.exp(4.5)),
        "end": pytest.approx(math.exp(3.5)),
        "round": 1,
        "up": 10,
        "down": 0,
    }


def test_the_line_of_a_run_names_its_keys():
    run = Run("ours", 3, (1e-3, "linear"), run_of(5.0, 4.0).trajectory, keys={"density": 0.5})
    assert run_line(run).startswith(
        "ours, seed 3, 0.001 linear, density 0.5: loss 4.5000 to 3.5000 in 1 rounds"
    )


def test_notes_say_over_how_many_seeds_or_that_a_loss_was_not_reached():
    notes = figure_notes({"a": [1.0, 2.0], "b": [1.0, None]}, " of two")
    assert notes["a"] == "mean over seeds (2) of two" and notes["b"].startswith("not reached on every seed")
