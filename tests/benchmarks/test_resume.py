"""Benchmark of continued runs."""

from __future__ import annotations

from benchmarks.resume import measure


def test_a_quick_run_kills_and_continues_at_one_stage():
    steps = []
    measured = measure(True, lambda *step: steps.append(step))
    figures = measured.figures
    assert figures["stages_bit_identical"] == figures["stages"] == 1
    assert figures["seconds_to_resume"] > 0 and 0 < figures["checkpoint_bytes_over_model"] < 1.5
    assert steps == [("stages", 1, 1)]
