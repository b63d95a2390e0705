"""Start, health check, search and termination of Flower's processes on this machine."""

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

import psutil

from federated.driver_watch import DRIVER_VARIABLE, driver_mark
from server.flower.connection import LOOPBACK, Connection

JOB_VARIABLE = (
    "FEDGRAFT_JOB"  # environment variable that marks every process of one job, whichever its parent
)
STOP_SECONDS = 8.0  # between SIGTERM and SIGKILL


class RunFailed(RuntimeError):
    """Failure of a Flower run; the message is its cause in one line."""


def flower_environment(home: Path, *, job: str) -> dict[str, str]:
    """Environment of Flower's commands: no telemetry, no installs, no inherited ``PYTHONPATH``, no proxy to loopback.

    Args:
        home: ``FLWR_HOME``.
        job: mark of every process started with it, for :func:`stop_job`; the client and server app among them end with
            this process, see ``federated.driver_watch``.
    """
    inherited = {k: v for k, v in without_marks().items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    commands = sysconfig.get_path("scripts")  # found also without an activated virtual environment
    return without_loopback_proxy(inherited) | {
        "PATH": os.pathsep.join([commands, inherited.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's own is 15, with which simulated clients get next to no time beside other processes.
        "RAY_worker_niceness": inherited.get("RAY_worker_niceness", "0"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        JOB_VARIABLE: job,
        DRIVER_VARIABLE: driver_mark(),
    }


def inherited_job() -> str:
    """Mark of the job that this process belongs to; empty without one."""
    return os.environ.get(JOB_VARIABLE, "")


def without_marks() -> dict[str, str]:
    """Environment of this process without the marks of a job and its driver."""
    return {k: v for k, v in os.environ.items() if k not in (JOB_VARIABLE, DRIVER_VARIABLE)}


def without_loopback_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment in which a configured proxy does not receive the connections to loopback.

    ``no_proxy`` is read in lower or upper case, depending on the program; gRPC prefers ``no_grpc_proxy``.
    """
    direct = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    excluded = {"no_proxy": direct, "NO_PROXY": direct}
    if "no_grpc_proxy" in environment:
        excluded["no_grpc_proxy"] = environment["no_grpc_proxy"]
    return dict(environment) | {
        name: ",".join([*filter(None, [hosts]), *LOOPBACK]) for name, hosts in excluded.items()
    }


def free_ports(count: int) -> list[int]:
    """``count`` different free TCP ports on loopback; they are not reserved."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def loopback(port: int) -> Connection:
    """Connection without TLS to a port of this machine."""
    return Connection(f"127.0.0.1:{port}", insecure=True)


def start_process(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdout: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, so that Ctrl-C on the console does not reach it."""
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
    """Start a SuperLink with the simulation engine on loopback; raises RunFailed if it does not answer."""
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = start_process(command, env=env, cwd=cwd, stdout=log)
    wait_until_healthy(loopback(port), process=process)
    return process


def wait_until_healthy(
    connection: Connection, *, process: subprocess.Popen[bytes] | None = None, timeout: float = 60.0
) -> None:
    """Wait at most ``timeout`` seconds for a SuperLink to answer its health check.

    Raises:
        RunFailed: it does not; at once if ``process`` has ended.
        UserError: it has other TLS settings than the connection.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        answers = connection.is_healthy()
        if process is not None and process.poll() is not None:
            raise RunFailed(f"the SuperLink at {connection.address} ended with code {process.returncode}")
        if answers:
            return
        time.sleep(0.1)
    raise RunFailed(f"no SuperLink answered at {connection.address} within {timeout:.0f} s")


def stop_job(job: str) -> None:
    """End every process of ``job``, and no other: SIGTERM, then SIGKILL after STOP_SECONDS."""
    processes = set(job_processes(job))
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            _signal(process, signal_number)
        _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
        processes = {*alive, *job_processes(job)}  # a process may have been started meanwhile


def job_processes(job: str) -> list[psutil.Process]:
    """Running processes whose environment carries the mark ``job``, and their descendants, without this process.

    Both are needed: a daemon is detached from its parent, and Ray's agents overwrite their environment.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile, or of another user
            if process.pid != os.getpid() and process.environ().get(JOB_VARIABLE) == job:
                found.update([process, *process.children(recursive=True)])
    return [process for process in found if _is_alive(process)]


@contextmanager
def termination_as_interrupt(*signals: signal.Signals) -> Iterator[None]:
    """Raise KeyboardInterrupt on signals inside the body, so that clean-up runs; no effect outside the main thread.

    Args:
        signals: SIGTERM unless given; one that is ignored, as SIGHUP under ``nohup``, stays so.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    chosen = [each for each in signals or (signal.SIGTERM,) if signal.getsignal(each) != signal.SIG_IGN]
    try:
        previous = [(each, signal.signal(each, interrupt)) for each in chosen]
    except ValueError:  # not the main thread, where signal handlers cannot be set
        yield
        return
    try:
        yield
    finally:
        for each, handler in previous:
            signal.signal(each, handler)


def resolve_program(command: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """``command`` with the full path of its program, looked up in the PATH of ``env``."""
    program = shutil.which(command[0], path=env["PATH"])
    if program is None:
        raise RunFailed(f"{command[0]} is not installed in {sysconfig.get_path('scripts')}; install flwr")
    return [program, *command[1:]]


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):  # ended already
        process.send_signal(number)


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    return False
