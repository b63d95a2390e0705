"""Failures, interrupts and port conflicts on Flower's real simulation engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from server.flower.flower_process import RunFailed, job_processes, stop_job
from server.flower.simulation import run_simulation
from tests.support.flower.apps import write_throwaway_app


@pytest.fixture
def app(tmp_path) -> Path:
    return write_throwaway_app(tmp_path / "app")


@pytest.fixture
def stopped(monkeypatch) -> list[tuple[int, int]]:
    """Number of processes of each job before and after it was stopped."""
    counts = []

    def stop(job: str) -> None:
        before = len(job_processes(job))
        stop_job(job)
        counts.append((before, len(job_processes(job))))

    monkeypatch.setattr("server.flower.simulation.stop_job", stop)
    return counts


def simulate(app: Path, tmp_path: Path, **run_config) -> None:
    run_simulation(app, run_config=run_config, num_supernodes=2, log_dir=tmp_path / "logs", timeout=180)


def test_a_user_error_of_the_server_app_is_raised_as_one(app, tmp_path, stopped):
    with pytest.raises(UserError, match="^no graph here; bootstrap one$"):
        simulate(app, tmp_path, graph="user", fail="no graph here; bootstrap one")
    assert stopped[0][1] == 0


def test_an_unknown_key_is_refused_before_anything_runs(app, tmp_path, stopped):
    with pytest.raises(RunFailed, match="Invalid run configuration"):
        simulate(app, tmp_path, nonsense=1)
    assert stopped[0][1] == 0


def test_an_interrupt_stops_the_superlink_and_removes_the_scratch_folder(app, tmp_path, stopped, monkeypatch):
    scratches = []

    def interrupted(*args, scratch: Path, **options) -> None:
        scratches.append(scratch)
        raise KeyboardInterrupt

    monkeypatch.setattr("server.flower.simulation.run_and_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(app, tmp_path)
    assert stopped == [(stopped[0][0], 0)]
    assert stopped[0][0] >= 1
    assert not scratches[0].exists()


def test_a_start_on_a_taken_port_is_repeated_on_another(app, tmp_path, stopped, monkeypatch):
    attempts = []

    def start(port: int, **options) -> Callable:
        attempts.append(port)
        raise RunFailed("port taken")

    monkeypatch.setattr("server.flower.simulation.start_simulator", start)
    with pytest.raises(RunFailed, match="port taken"):
        simulate(app, tmp_path)
    assert len(attempts) == 3


@pytest.mark.parametrize("wrong", [{"num_supernodes": 0}, {"client_cpus": 0}, {"client_cpus": 10**6}])
def test_impossible_numbers_are_refused_in_one_line(app, tmp_path, wrong):
    options = {"num_supernodes": 2, "client_cpus": 1} | wrong
    with pytest.raises(UserError, match="expected"):
        run_simulation(app, run_config={}, log_dir=tmp_path / "logs", timeout=1, **options)
    assert not (tmp_path / "logs").exists()
