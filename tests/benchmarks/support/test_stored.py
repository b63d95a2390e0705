"""Results of measurements in files."""

from __future__ import annotations

from benchmarks.support.stored import stored


def test_a_result_is_computed_once_for_the_same_facts(tmp_path):
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"value": float(len(calls))}

    folder = tmp_path / "results"
    for facts, expected in (({"a": 1}, 1.0), ({"a": 1}, 1.0), ({"a": 2}, 2.0), ({"a": 1}, 1.0)):
        assert stored(folder, facts, compute) == {"value": expected}
    assert len(calls) == len(list(folder.iterdir())) == 2
