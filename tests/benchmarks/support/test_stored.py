"""Results of measurements in files."""

from __future__ import annotations

from benchmarks.support.stored import digest, stored


def test_a_result_is_computed_once_for_the_same_facts(tmp_path):
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"value": float(len(calls))}

    folder = tmp_path / "results"
    for facts, expected in (({"a": 1}, 1.0), ({"a": 1}, 1.0), ({"a": 2}, 2.0), ({"a": 1}, 1.0)):
        assert stored(folder, facts, compute) == {"value": expected}
    assert len(calls) == len(list(folder.iterdir())) == 2


def test_the_digest_does_not_depend_on_the_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert len(digest({})) == 16
