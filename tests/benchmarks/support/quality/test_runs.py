from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.support.quality import runs
from benchmarks.support.quality.result import Run
from benchmarks.support.quality.runs import stored_run
from benchmarks.support.quality.settings import QUICK, Job

RATE = (1e-3, "linear")
ENTRY = {"round": 0, "up": 0, "down": 0, "losses": {"a": 1.5}}


@pytest.fixture
def made(monkeypatch) -> list[Job]:
    """Jobs that are run, in place of their training."""
    jobs: list[Job] = []

    def run(job, settings, quick, work):
        jobs.append(job)
        return Run(job.method, job.seed, job.learning_rate, [ENTRY], seconds=2.5, edits=len(jobs))

    monkeypatch.setattr(runs, "_run_job", run)
    return jobs


def test_a_finished_run_is_read_in_place_of_run_again(made, tmp_path):
    job = Job("ours", 0, RATE)
    first = stored_run(job, QUICK, True, tmp_path)
    assert stored_run(job, QUICK, True, tmp_path) == first == Run("ours", 0, RATE, [ENTRY], 2.5, 1)
    assert made == [job]


@pytest.mark.parametrize(
    ("job", "settings", "quick"),
    [
        (Job("ours", 1, RATE), QUICK, True),
        (Job("half ours", 0, RATE), QUICK, True),
        (Job("ours", 0, (2e-3, "linear")), QUICK, True),
        (Job("ours", 0, RATE), replace(QUICK, local_steps=2), True),
        (Job("ours", 0, RATE), QUICK, False),
    ],
)
def test_another_job_or_setting_is_another_run(made, tmp_path, job, settings, quick):
    stored_run(Job("ours", 0, RATE), QUICK, True, tmp_path)
    stored_run(job, settings, quick, tmp_path)
    assert len(made) == 2


def test_runs_of_further_seeds_leave_a_run_as_it_is(made, tmp_path):
    job = Job("ours", 0, RATE)
    stored_run(job, QUICK, True, tmp_path)
    stored_run(job, replace(QUICK, seeds=(0, 1, 2), half_seeds=(), jobs=2), True, tmp_path)
    assert made == [job]
