"""Execution of the jobs of a benchmark, several side by side, with the results of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from joblib import Parallel, delayed

from benchmarks.support.quality.comparison import run_line
from benchmarks.support.quality.result import Run
from benchmarks.support.quality.runs import run_job
from benchmarks.support.quality.settings import Job, Settings
from benchmarks.support.quality.store import stored_run
from benchmarks.support.runner import RESULTS, OnStep
from scripts.shared.console import stderr


class Jobs:
    """Runner of jobs, ``settings.jobs`` side by side.

    Args:
        name: name of the benchmark; finished runs are also read from ``benchmarks/results/NAME_jobs``.
        settings: amount of training and of measurement.
        quick: whether the run is on little data.
        work: folder of graphs and finished runs.
        on_step: progress callback.
        total: number of jobs of the whole benchmark.
    """

    def __init__(
        self, name: str, settings: Settings, quick: bool, work: Path, on_step: OnStep, total: int
    ) -> None:
        self._settings, self._quick, self._work, self._on_step = settings, quick, work, on_step
        self._folders = [work] if quick else [work, RESULTS / f"{name}_jobs"]
        self._done, self._total = 0, total

    def run(self, jobs: Sequence[Job]) -> list[Run]:
        """Results of jobs, in their order; each finished one is printed."""
        results = []
        # A thread waits for the process of a job apart: a worker process of joblib's cannot start one itself.
        backend = "threading" if self._settings.apart else None
        work = Parallel(n_jobs=self._settings.jobs, return_as="generator", backend=backend)(
            delayed(_run_or_read)(job, self._settings, self._quick, self._folders) for job in jobs
        )
        for run in work:
            results.append(run)
            self._done += 1
            self._on_step("runs", self._done, self._total)
            stderr.print(run_line(run), highlight=False, markup=False, soft_wrap=True)
        return results


def _run_or_read(job: Job, settings: Settings, quick: bool, folders: Sequence[Path]) -> Run:
    def run() -> Run:
        if not settings.apart:
            return run_job(job, settings, quick, folders[0])
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(run_job, job, settings, quick, folders[0]).result()

    return stored_run(job, settings, quick, folders, run)
