"""Results of measurements in files."""

from __future__ import annotations

from pathlib import Path

from benchmarks.support.stored import chosen_work, digest, stored, work_folder


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


def test_results_go_to_the_folder_given_or_to_one_that_is_removed(tmp_path):
    with work_folder(tmp_path) as folder:
        assert folder == tmp_path
    with work_folder(None) as folder:
        assert folder.is_dir()
    assert tmp_path.is_dir() and not folder.exists()


def test_only_a_full_run_without_a_folder_takes_that_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path))
    assert chosen_work("drift", None, quick=False) == tmp_path / "benchmarks" / "drift"
    assert chosen_work("drift", None, quick=True) is None
    assert chosen_work("drift", Path("/own"), quick=False) == Path("/own")
