from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.support.quality.result import Run
from benchmarks.support.quality.settings import QUICK, Job
from benchmarks.support.quality.store import facts_of, fits, stored_run

RATE = (1e-3, "linear")
ENTRY = {"round": 0, "up": 0, "down": 0, "losses": {"a": 1.5}}


@pytest.fixture
def made() -> list[Job]:
    """Jobs that were run."""
    return []


@pytest.fixture
def result(made, tmp_path):
    """Result of a job, with the folders of finished runs."""

    def of(job, settings=QUICK, quick=True, folders=(tmp_path,)) -> Run:
        def run():
            made.append(job)
            return Run(job.method, job.seed, job.learning_rate, [ENTRY], 2.5, len(made), job.keys)

        return stored_run(job, settings, quick, folders, run)

    return of


def test_a_finished_run_is_read_in_place_of_run_again(result, made):
    job = Job("ours", 0, RATE, {"density": 0.5})
    first = result(job)
    assert result(job) == first == Run("ours", 0, RATE, [ENTRY], 2.5, 1, {"density": 0.5})
    assert made == [job]


@pytest.mark.parametrize(
    ("job", "settings", "quick"),
    [
        (Job("ours", 1, RATE), QUICK, True),
        (Job("half ours", 0, RATE), QUICK, True),
        (Job("ours", 0, (2e-3, "linear")), QUICK, True),
        (Job("ours", 0, RATE, {"density": 0.5}), QUICK, True),
        (Job("ours", 0, RATE), replace(QUICK, local_steps=2), True),
        (Job("ours", 0, RATE), QUICK, False),
    ],
)
def test_another_job_or_setting_is_another_run(result, made, job, settings, quick):
    result(Job("ours", 0, RATE))
    result(job, settings, quick)
    assert len(made) == 2


def test_runs_of_further_seeds_leave_a_run_as_it_is(result, made):
    job = Job("ours", 0, RATE)
    result(job)
    result(job, replace(QUICK, seeds=(0, 1, 2), half_seeds=(), jobs=2))
    assert made == [job]


def test_a_run_is_read_from_a_further_folder_and_written_to_the_first(result, made, tmp_path):
    job, earlier, new = Job("ours", 0, RATE), tmp_path / "earlier", tmp_path / "new"
    result(job, folders=(earlier,))
    result(job, folders=(new, earlier))
    assert (made, new.exists()) == ([job], False)
    result(Job("ours", 1, RATE), folders=(new, earlier))
    assert len(list(new.glob("ours-1-*.json"))) == 1


def test_a_changed_default_is_another_run_and_a_key_that_a_file_lacks_is_not(result, made, tmp_path):
    job = Job("ours", 0, RATE)
    result(job)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    del record["facts"]["config"]["rho-max"]
    path.write_text(json.dumps(record))
    result(job)
    assert len(made) == 1
    record["facts"]["config"]["density"] = 0.9
    path.write_text(json.dumps(record))
    result(job)
    assert len(made) == 2


def test_facts_of_a_baseline_leave_out_the_keys_of_our_method():
    ours, dense = (
        facts_of(Job(name, 0, RATE), QUICK, True)["config"] for name in ("half ours", "half dense")
    )
    assert "density" in ours
    assert "density" not in dense
    assert dense["local_steps"] == 20


def test_facts_fit_where_all_stored_ones_are_equal():
    assert fits({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}})
    assert not fits({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}})
    assert not fits({"a": {"b": 1}}, {"a": {"b": 2}})
    assert not fits({"a": {"b": 1}}, {"a": 1})
