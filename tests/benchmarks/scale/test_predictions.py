from __future__ import annotations

import pytest

from benchmarks.scale import predictions as module
from benchmarks.scale.cost_model import FEATURES
from benchmarks.scale.predictions import (
    LLAMA_2_7B,
    llama_load,
    prediction_lines,
    predictions,
    read_coefficients,
)
from configs.errors import UserError

ONES = {name: dict.fromkeys(keys, 1.0) for name, keys in FEATURES.items()}
ONES["reply_memory"] = {"per unit": 1.0, "per usage count": 1.0}


def test_the_ffn_of_llama_2_7b_has_four_billion_weights():
    assert LLAMA_2_7B.weights == 3 * 32 * 4096 * 11008 == 4_328_521_728
    assert LLAMA_2_7B.intermediate % LLAMA_2_7B.experts == 0


def test_a_client_that_is_asked_rarely_lacks_many_steps():
    assert llama_load(100_000, 1_000).missing_steps == llama_load(100_000, 1_000).kept_steps == 100
    assert llama_load(50, 25).missing_steps == 2


def test_each_cohort_has_a_row():
    rows = predictions(ONES)
    assert [(row["clients"], row["asked"]) for row in rows] == [(50, 25), (1000, 100), (100_000, 1000)]
    for row in rows:
        assert row["up"] * row["asked"] == pytest.approx(row["bytes_up"])
    assert rows[2]["down"] > rows[0]["down"]
    lines = prediction_lines(rows)
    assert lines[-1].startswith("| 100,000 | 1,000 | ") and len({line.count("|") for line in lines}) == 1


def test_without_a_result_the_command_that_makes_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    with pytest.raises(UserError, match="run python -m benchmarks.scale"):
        read_coefficients()
