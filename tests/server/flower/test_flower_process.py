"""Processes of a job are found by their mark and ended with their descendants; other processes keep running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from federated.driver_watch import DRIVER_VARIABLE, driver_mark
from server.flower.flower_process import (
    JOB_VARIABLE,
    RunFailed,
    flower_environment,
    free_ports,
    inherited_job,
    job_processes,
    loopback,
    resolve_program,
    start_process,
    stop_job,
    termination_as_interrupt,
    wait_until_healthy,
    without_loopback_proxy,
    without_marks,
)

# Starts a child in a session of its own that ignores SIGTERM, as a daemon does, and ends itself.
DAEMONIZE = """
import signal, subprocess, sys
code = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'1'); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.read(1)
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"no_proxy": "127.0.0.1,localhost,::1", "NO_PROXY": "127.0.0.1,localhost,::1"}),
        (
            {"NO_PROXY": "a.org", "http_proxy": "http://p:1"},
            dict.fromkeys(("no_proxy", "NO_PROXY"), "a.org,127.0.0.1,localhost,::1")
            | {"http_proxy": "http://p:1"},
        ),
        (
            {"no_proxy": "b.org", "NO_PROXY": "a.org", "no_grpc_proxy": "c.org"},
            dict.fromkeys(("no_proxy", "NO_PROXY"), "b.org,127.0.0.1,localhost,::1")
            | {"no_grpc_proxy": "c.org,127.0.0.1,localhost,::1"},
        ),
    ],
)
def test_a_proxy_does_not_receive_connections_to_loopback(given, expected):
    assert without_loopback_proxy(given) == expected


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_environment_is_isolated_and_finds_flower_without_activation(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:1")
    monkeypatch.setenv(JOB_VARIABLE, "outer")
    monkeypatch.setenv(DRIVER_VARIABLE, "1:2.0")
    assert {JOB_VARIABLE, DRIVER_VARIABLE}.isdisjoint(without_marks()) and "RAY_ADDRESS" in without_marks()
    monkeypatch.setenv("PATH", "/usr/bin")
    env = flower_environment(tmp_path, job="j")
    assert "PYTHONPATH" not in env
    assert "RAY_ADDRESS" not in env
    assert (env["FLWR_HOME"], env[JOB_VARIABLE], env["OMP_NUM_THREADS"]) == (str(tmp_path), "j", "1")
    assert env[DRIVER_VARIABLE] == driver_mark()
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["RAY_worker_niceness"] == "0"
    program = resolve_program(["flower-superlink", "--insecure"], env)
    assert os.access(program[0], os.X_OK)
    assert program[1:] == ["--insecure"]


def test_the_priority_of_simulated_clients_can_be_set(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "7")
    assert flower_environment(tmp_path, job="j")["RAY_worker_niceness"] == "7"


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(RunFailed, match="no-such-program is not installed"):
        resolve_program(["no-such-program"], {"PATH": str(tmp_path)})


def test_free_ports_differ_and_can_be_bound():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports[0]))


def test_stop_job_ends_stubborn_daemons_of_this_job_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("server.flower.flower_process.STOP_SECONDS", 0.5)
    env = flower_environment(tmp_path, job=f"mine-{os.getpid()}")
    subprocess.run([sys.executable, "-c", DAEMONIZE], env=env, check=True)
    other = flower_environment(tmp_path, job=f"other-{os.getpid()}")
    with (tmp_path / "log").open("wb") as log:
        bystander = start_process(
            [sys.executable, "-c", "import time; time.sleep(60)"], env=other, cwd=tmp_path, stdout=log
        )
    try:
        (daemon,) = job_processes(env[JOB_VARIABLE])
        stop_job(env[JOB_VARIABLE])
        assert job_processes(env[JOB_VARIABLE]) == []
        assert has_ended(daemon)
        assert bystander.poll() is None
        assert os.getsid(bystander.pid) != os.getsid(0)
    finally:
        bystander.kill()
        bystander.wait()


def test_stop_job_ends_children_that_lost_the_mark(tmp_path):
    env = flower_environment(tmp_path, job=f"parent-{os.getpid()}")
    code = "import subprocess; subprocess.Popen(['sleep', '60'], env={}).wait()"
    with (tmp_path / "log").open("wb") as log:
        parent = start_process([sys.executable, "-c", code], env=env, cwd=tmp_path, stdout=log)
    deadline = time.monotonic() + 10
    while len(job_processes(env[JOB_VARIABLE])) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    child = next(process for process in job_processes(env[JOB_VARIABLE]) if process.pid != parent.pid)
    stop_job(env[JOB_VARIABLE])
    parent.wait()
    assert has_ended(child)


def test_stop_job_spares_the_process_that_calls_it(tmp_path):
    code = (
        f"from server.flower.flower_process import stop_job; stop_job('self-{os.getpid()}'); print('alive')"
    )
    env = dict(os.environ) | {JOB_VARIABLE: f"self-{os.getpid()}"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout == "alive\n"


def test_waiting_for_a_superlink_that_ended_fails_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(RunFailed, match="ended with code 3"):
        wait_until_healthy(loopback(free_ports(1)[0]), process=process, timeout=30)


def test_waiting_for_a_closed_port_ends_at_the_timeout():
    with pytest.raises(RunFailed, match="no SuperLink answered"):
        wait_until_healthy(loopback(free_ports(1)[0]), timeout=0.3)


def test_sigterm_becomes_an_interrupt_inside_the_body_only():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), termination_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_are_left_alone_in_another_thread():
    entered = []

    def body():
        with termination_as_interrupt():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert entered == [signal.getsignal(signal.SIGTERM)]


def test_a_signal_that_is_ignored_stays_so_and_others_interrupt():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_as_interrupt(signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), termination_as_interrupt(signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_mark_of_the_own_job(monkeypatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    assert inherited_job() == ""
    monkeypatch.setenv(JOB_VARIABLE, "mine")
    assert inherited_job() == "mine"
