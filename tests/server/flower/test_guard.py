"""Processes of a job whose driver is killed, real ones: daemons, and children that lost the mark of the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from federated.driver_watch import driver_mark
from server.flower.flower_process import job_processes
from server.flower.guard import guard, guarded
from tests.support.paths import ROOT

# Starts a process as Flower's are started, which starts one without its environment, as Ray's agents are.
CHILD = "import subprocess; subprocess.Popen(['sleep', '60'], env={}, start_new_session=True).wait()"
DRIVER = f"""
import sys, time
from pathlib import Path
from server.flower.flower_process import flower_environment, start_process
from server.flower.guard import guarded
job, folder = sys.argv[1], Path(sys.argv[2])
with guarded(job, folder), (folder / "log").open("wb") as log:
    env = flower_environment(folder, job=job)
    start_process([sys.executable, "-c", {CHILD!r}], env=env, cwd=folder, stdout=log)
    print("started", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def job() -> str:
    return f"guarded-{os.getpid()}-{time.monotonic_ns()}"


def start_driver(job: str, folder: Path, seconds: float) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A driver, and the two processes of its job."""
    folder.mkdir()
    command = [sys.executable, "-c", DRIVER, job, folder, str(seconds)]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert driver.stdout.readline() == b"started\n"
    driver.stdout.close()
    deadline = time.monotonic() + 10
    while len(found := job_processes(job)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return driver, found


def started_guard(job: str) -> psutil.Process:
    """Guard of a job, which has the command line of its parent for a moment."""
    deadline = time.monotonic() + 10
    while not (found := guards_of(job)) and time.monotonic() < deadline:
        time.sleep(0.02)
    (guard,) = found
    return guard


def guards_of(job: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "server.flower.guard" in (line := process.info["cmdline"] or []) and job in line:
            found.append(process)
    return found


def test_the_processes_of_a_killed_driver_are_gone_within_seconds(tmp_path, job):
    driver, processes = start_driver(job, tmp_path / "scratch", 60)
    assert len(processes) == 2 and len(guards_of(job)) == 1
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert job_processes(job) == []
    deadline = time.monotonic() + 5
    while (tmp_path / "scratch").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (tmp_path / "scratch").exists()


def test_a_guard_ends_with_its_block_and_ends_nothing_then(tmp_path, job):
    (tmp_path / "scratch").mkdir()
    with guarded(job, tmp_path / "scratch"):
        assert os.getsid(started_guard(job).pid) != os.getsid(0)
    assert guards_of(job) == [] and (tmp_path / "scratch").exists()


def test_a_guard_waits_for_the_end_of_the_driver_first(tmp_path, job):
    driver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    started = time.monotonic()
    (tmp_path / "scratch").mkdir()
    guard(job, driver_mark(driver.pid), [tmp_path / "scratch"])
    assert driver.poll() is not None and time.monotonic() - started > 0.5
    assert not (tmp_path / "scratch").exists()
