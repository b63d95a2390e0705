from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale.cost_model import FEATURES
from benchmarks.scale.runs import asked_clients, config_of, load_of, load_of_run, quantities, totals
from benchmarks.scale.settings import DEMO, FULL, Point

POINT = Point(DEMO, 8, 0.05)


def line(number: int, up: list[int], updates: list[int | None], down: int, step: int) -> dict[str, Any]:
    clients = [
        {
            "name": f"client-{client}",
            "budget": 16 - 8 * client,
            "bytes_up": size,
            "bytes_down": down,
            "update_bytes": update,
        }
        for client, (size, update) in enumerate(zip(up, updates, strict=True))
    ]
    total = {"bytes_up": sum(up), "bytes_down": down * len(up)}
    return {"round": number, "step_bytes": step, "clients": clients, **total}


RUN = {
    "rounds": [
        line(1, [900, 900], [800, 800], 70, 10),
        line(2, [110, 130, 7, 0], [100, 120, None, None], 50, 30),
        line(3, [112, 132, 7, 0], [100, 120, None, None], 60, 50),
    ],
    "costs": [
        {"round": 1, "check": 50.0},
        {
            "round": 2,
            "check": 1.0,
            "aggregate": 2.0,
            "pack": 3.0,
            "save": 4.0,
            "other": 5.0,
            "exchange": 6.0,
            "poll": 99.0,
        },
        {"round": 3, "check": 3.0, "aggregate": 2.0, "pack": 3.0, "save": 4.0, "other": 5.0, "exchange": 6.0},
    ],
    "peak_bytes": 700,
}


def test_quantities_are_means_over_the_rounds_from_the_second_on():
    found = quantities(RUN, load_of(POINT, FULL))
    assert found.keys() == FEATURES.keys()
    assert found["update_bytes"] == 110 and found["step_bytes"] == 40
    assert found["reply_frame"] == 11 and found["request_frame"] == 70  # of the first round, without a step
    assert found["first_step_bytes"] == 10
    assert found["error_bytes"] == 7
    assert found["check"] == 2.0 and found["exchange"] == 6.0


def test_the_load_of_a_run_is_that_of_its_used_clients():
    load = load_of_run(load_of(POINT, FULL), RUN)
    assert load.held == pytest.approx(12 / 16)
    assert load.fresh == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_totals_leave_out_requests_that_no_reply_had_arrived_to():
    assert totals(RUN) == {"bytes_up": 249, "bytes_down": 220, "server_seconds": 22.0, "peak_bytes": 700}


def test_half_of_the_clients_are_asked_and_the_faultless_ones_end_a_round():
    config = config_of(replace(POINT, clients=50), FULL, Path("graph"), Path("logs"))
    assert asked_clients(replace(POINT, clients=50), FULL) == 25
    assert config.participation.wanted(50) == 25 and config.participation.quorum == 25 - 2 * 4
    assert config.client_budgets[:4] == (16, 12, 8, 16) and len(config.client_budgets) == 50


def test_the_load_of_a_point():
    load = load_of(POINT, FULL)
    assert (load.asked, load.used, load.failed) == (4, 2, 1)
    assert (load.weights, load.layers, load.experts) == (DEMO.weights, 4, 16)
    assert 0.5 < load.held < 1.0
    assert 0.5 < load.missing_steps < 2 and 0 < load.missing_first < 1 and 0 < load.fresh < 0.5
