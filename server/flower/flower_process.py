"""Starting and stopping Flower's own processes on this machine, and finding every one of them again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
import psutil
import tomli_w

CONNECTION = "local"  # name of the one SuperLink connection in the config.toml we write
JOB_VARIABLE = "FEDGRAFT_JOB"  # marks every process of one job, whoever became its parent
STOP_SECONDS = 8.0


class RunFailed(RuntimeError):
    """A Flower run that did not complete; the message is its root cause in one line."""


def flower_environment(home: Path, *, job: str) -> dict[str, str]:
    """Environment for Flower's commands: own ``FLWR_HOME``, no telemetry, no installs, no foreign imports.

    ``job`` marks every process started with it, for :func:`stop_job`.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    commands = sysconfig.get_path("scripts")  # found without an activated virtual environment, too
    return inherited | {
        "PATH": os.pathsep.join([commands, inherited.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        JOB_VARIABLE: job,
    }


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports on loopback that nobody listens on right now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def write_connection(home: Path, address: str) -> None:
    """Make ``address`` (host:port, without TLS) the default connection of the Flower home folder."""
    home.mkdir(parents=True, exist_ok=True)
    superlink = {"default": CONNECTION, CONNECTION: {"address": address, "insecure": True}}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": superlink}), encoding="utf-8")


def start_process(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdout: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, so that a Ctrl-C on the console reaches only us."""
    return subprocess.Popen(
        resolve_program(command, env),
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_simulator(
    port: int, *, env: Mapping[str, str], cwd: Path, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a SuperLink with the simulation engine on loopback; raises RunFailed when it does not answer."""
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = start_process(command, env=env, cwd=cwd, stdout=log)
    wait_until_healthy(port, process=process)
    return process


def wait_until_healthy(
    port: int, *, process: subprocess.Popen[bytes] | None = None, timeout: float = 60.0
) -> None:
    """Wait at most ``timeout`` seconds for a SuperLink on loopback ``port`` to answer.

    Raises RunFailed when it does not, at once when ``process`` has ended.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        answers = _answers(port)
        if process is not None and process.poll() is not None:
            raise RunFailed(f"the SuperLink on port {port} ended with code {process.returncode}")
        if answers:
            return
        time.sleep(0.1)
    raise RunFailed(f"no SuperLink answered on port {port} within {timeout:.0f} s")


def stop_job(job: str) -> None:
    """End every process of ``job``, and no other: politely at first, by force after STOP_SECONDS."""
    processes = set(job_processes(job))
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            _signal(process, signal_number)
        _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
        processes = {*alive, *job_processes(job)}  # something may have been started meanwhile


def job_processes(job: str) -> list[psutil.Process]:
    """The living processes whose environment carries the mark ``job`` and their descendants, without this one.

    Both are needed: a daemon loses its parents, and Ray's agents overwrite their environment with a title.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.pid != os.getpid() and process.environ().get(JOB_VARIABLE) == job:
                found.update([process, *process.children(recursive=True)])
    return [process for process in found if _is_alive(process)]


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt inside the body, so that clean-up runs; only in the main thread."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: its caller decides about signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def resolve_program(command: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """``command`` with the full path of its program, looked up in the PATH it will run with."""
    program = shutil.which(command[0], path=env["PATH"])
    if program is None:
        raise RunFailed(f"{command[0]} is not installed in {sysconfig.get_path('scripts')}; install flwr")
    return [program, *command[1:]]


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):  # gone already
        process.send_signal(number)


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    return False
