from __future__ import annotations

from benchmarks.start.__main__ import measure


def test_a_quick_run_measures_the_start_of_a_round(tmp_path):
    measured = measure(True, lambda *step: None, work=tmp_path)
    seconds = measured.peers["seconds_by_round"]
    assert len(seconds) == 2
    # Python and torch alone take more than half a second to start.
    assert measured.figures == {"seconds_message_to_first_step": seconds[1]} and min(seconds) > 0.5
