from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.cluster import gate_rows, layer_seconds, measure, synthetic_rows
from benchmarks.support.material import DEMO_MODEL


def test_a_quick_run_measures_every_figure():
    stages = []
    measured = measure(True, lambda *step: stages.append(step))
    assert set(measured.figures) == {"seconds_7b_layer", "objective_ratio"}
    assert all(math.isfinite(value) and value > 0 for value in measured.figures.values())
    assert measured.figures["objective_ratio"] <= 1.01
    assert [set(layer) for layer in measured.peers["objective"]["16"]] == [
        {"ratio", "inertia", "reference_inertia", "seconds", "reference_seconds"}
    ] * 2
    assert len(measured.peers["seconds"]["16"]) == 1 and stages[-1][1] == stages[-1][2]


def test_every_count_is_timed_as_often():
    seconds = layer_seconds(shape=(64, 8), counts=(4, 8), repeats=2, on_step=lambda *step: None)
    assert {count: len(times) for count, times in seconds.items()} == {4: 2, 8: 2}
    assert all(time > 0 for times in seconds.values() for time in times)


def test_synthetic_rows_have_a_fifth_of_their_variance_in_few_directions():
    rows = synthetic_rows(300, 200, directions=4)
    assert rows.shape == (300, 200) and rows.dtype == np.float32
    energy = np.linalg.svd(rows, compute_uv=False) ** 2
    assert energy[:4].sum() / energy.sum() == pytest.approx(0.22, abs=0.05)


def test_gate_rows_are_those_of_the_checkpoint():
    rows = gate_rows(str(DEMO_MODEL))
    assert len(rows) == 4 and all(layer.shape == (1024, 192) and layer.dtype == np.float32 for layer in rows)
