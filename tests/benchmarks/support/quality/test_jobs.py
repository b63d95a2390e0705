from __future__ import annotations

import os
from dataclasses import replace

import pytest

from benchmarks.support.quality import jobs
from benchmarks.support.quality.jobs import Jobs
from benchmarks.support.quality.result import Run
from benchmarks.support.quality.settings import QUICK, Job

ENTRY = {"round": 0, "up": 0, "down": 0, "losses": {"a": 1.5}}


@pytest.fixture
def made(monkeypatch) -> list[Job]:
    """Jobs that are run, in place of their training."""
    jobs_run: list[Job] = []

    def run(job, settings, quick, work):
        jobs_run.append(job)
        return Run(job.method, job.seed, job.learning_rate, [ENTRY])

    monkeypatch.setattr(jobs, "run_job", run)
    return jobs_run


def test_results_are_in_the_order_of_the_jobs_and_finished_ones_are_read(made, tmp_path, capsys):
    wanted, steps = [Job("ours", seed, (1e-3, "linear")) for seed in (2, 0, 1)], []

    def runner():
        return Jobs("any", QUICK, True, tmp_path / "work", lambda *step: steps.append(step), 3)

    assert [run.seed for run in runner().run(wanted)] == [2, 0, 1]
    assert steps == [("runs", 1, 3), ("runs", 2, 3), ("runs", 3, 3)]
    assert "ours, seed 2, 0.001 linear: loss 1.5000" in capsys.readouterr().err
    assert len(runner().run(wanted)) == len(made) == 3


def test_a_full_run_reads_the_committed_runs_too(made, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RESULTS", tmp_path / "results")
    settings, job = replace(QUICK, jobs=1), Job("ours", 0, (1e-3, "linear"))
    Jobs("any", settings, False, tmp_path / "results" / "any_jobs", lambda *step: None, 1).run([job])
    Jobs("any", settings, False, tmp_path / "work", lambda *step: None, 1).run([job])
    assert made == [job]


def run_with_process_id(job, settings, quick, work) -> Run:
    """Run whose number of edits is the id of its process."""
    return Run(job.method, job.seed, job.learning_rate, [ENTRY], edits=os.getpid())


def test_jobs_apart_run_side_by_side_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "run_job", run_with_process_id)
    settings = replace(QUICK, jobs=2, apart=True)
    runner = Jobs("any", settings, True, tmp_path, lambda *step: None, 2)
    first, second = runner.run([Job("ours", seed, (1e-3, "linear")) for seed in (0, 1)])
    assert (first.seed, second.seed) == (0, 1)
    assert len({os.getpid(), first.edits, second.edits}) == 3
