from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from benchmarks.scale.cost_model import (
    FEATURES,
    PARTS,
    Load,
    column_bytes,
    fit,
    position_bits,
    predict,
    quantity,
)

LOAD = Load(
    asked=8, used=6, failed=1, weights=1000.0, held=0.5, density=0.1, step_density=0.2, value_bits=2,
    layers=2, experts=4, missing_steps=1.5, missing_first=0.5, fresh=0.25, kept_steps=3,
)  # fmt: skip
REPLY = {"per unit": 2.0, "per usage count": 3.0}


def test_positions_take_their_entropy():
    assert position_bits(0.5) == pytest.approx(2.0)  # one bit for each of two positions per entry
    assert position_bits(1.0) == 0.0
    assert position_bits(0.01) == pytest.approx(0.0807931 / 0.01, rel=1e-5)
    assert column_bytes(80, 0.5, 2) == pytest.approx(40.0)


def test_a_load_counts_entries_units_and_usage():
    assert (LOAD.update_entries, LOAD.step_entries, LOAD.units, LOAD.counts) == (50, 200, 4, 32)


def loads() -> list[Load]:
    grid = product((4, 9, 25), (1000.0, 5000.0), (0.01, 0.1), (2, 3))
    return [
        replace(
            LOAD,
            asked=asked,
            used=asked - 2,
            weights=weights,
            density=density,
            layers=layers,
            fresh=1 / asked,
        )
        for asked, weights, density, layers in grid
    ]


def test_the_fit_recovers_a_cost_that_the_model_describes():
    generator = np.random.default_rng(0)
    true = {name: {key: float(generator.uniform(1, 2)) for key in keys} for name, keys in FEATURES.items()}
    measured = [{name: quantity(name, true, load) for name in FEATURES} for load in loads()]
    other = replace(LOAD, asked=50, used=40, weights=20000.0, density=0.03, layers=5)
    found = fit(loads(), measured)
    for name in FEATURES:
        assert quantity(name, found, other) == pytest.approx(quantity(name, true, other)), name


def test_coefficients_are_not_negative():
    measured = [dict.fromkeys(FEATURES, 1000.0 / load.asked) for load in loads()]
    assert all(value >= 0 for keys in fit(loads(), measured).values() for value in keys.values())


def test_a_quantity_that_no_run_has_is_zero():
    measured = [dict.fromkeys(FEATURES, 1.0) | {"error_bytes": 0.0} for _ in loads()]
    found = fit(loads(), measured)
    assert found["error_bytes"] == {"per error": 0.0} and found["request_frame"][
        "per request"
    ] == pytest.approx(1)


def test_a_prediction_adds_up():
    coefficients = {name: dict.fromkeys(keys, 0.0) for name, keys in FEATURES.items()} | {
        "reply_memory": REPLY
    }
    update = column_bytes(50, 0.1, 2)
    coefficients["update_bytes"] = {"per entropy byte": 1.0, "per entropy byte, first update": 0.6}
    coefficients["reply_frame"]["per usage count"] = 2.0
    coefficients["step_bytes"]["per step"] = 10.0
    coefficients["first_step_bytes"]["per step"] = 4.0
    coefficients["request_frame"]["per request"] = 1.0
    coefficients["error_bytes"]["per error"] = 9.0
    coefficients["check"]["per entry"] = 0.01
    coefficients["peak_bytes"] = {"per process": 500.0, "per weight": 4.0}
    found = predict(coefficients, LOAD)
    assert found["bytes_up"] == pytest.approx(6 * (0.9 * update + 2 * 32) + 9)
    assert found["bytes_down"] == 8 * (1.5 * 10 + 0.5 * 4 + 1)
    assert found["parts"].keys() == set(PARTS)
    assert found["server_seconds"] == found["parts"]["check"] == pytest.approx(0.01 * 6 * 50)
    assert found["peak_bytes"] == 500 + 4 * 1000 + 6 * (2 * 4 + 3 * 32) + 3 * 10
    assert math.isfinite(found["peak_bytes"])
