"""One federated run on Flower's simulation engine: start of the SuperLink, run, end of every process."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from configs.errors import UserError
from server.flower.flower_process import (
    RunFailed,
    flower_environment,
    free_ports,
    loopback,
    start_simulator,
    stop_job,
    termination_as_interrupt,
)
from server.flower.flower_run import RunConfigValues, empty_folder, run_and_wait
from server.flower.guard import guarded

START_ATTEMPTS = 3  # another program may take the port between its choice and its use


def run_simulation(
    project: Path,
    *,
    run_config: RunConfigValues,
    num_supernodes: int,
    log_dir: Path,
    client_cpus: int = 1,
    timeout: float,
) -> None:
    """Run a Flower app with simulated clients until it finishes.

    Every process started is ended before this returns or raises, also on Ctrl-C and SIGTERM, when the model of the
    rounds so far is saved first; and within seconds if this process is killed.

    Args:
        project: folder of the app.
        run_config: run configuration; each key must exist under ``[tool.flwr.app.config]``.
        num_supernodes: number of clients.
        log_dir: folder of ``flower.log``, the log of the run, and ``superlink.log``, that of the engine.
        client_cpus: cores that a client occupies while it works.
        timeout: limit of the run in seconds.

    Raises:
        UserError: the ServerApp raised it, or a count is out of range.
        RunFailed: any other failure, with its cause.
    """
    if num_supernodes < 1:
        raise UserError(f"expected at least one client, got {num_supernodes}")
    cores = os.cpu_count() or 1
    if not 1 <= client_cpus <= cores:
        raise UserError(f"expected 1 to {cores} cores per client on this machine, got {client_cpus}")
    log_dir = Path(log_dir).resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    federation = {"num-supernodes": num_supernodes, "client-resources-num-cpus": client_cpus}
    job = uuid.uuid4().hex
    with (
        termination_as_interrupt(),
        _scratch_folder() as scratch,
        guarded(job, scratch),
        _simulator(job, scratch, log_dir) as env,
    ):
        run_and_wait(
            project,
            run_config=run_config,
            federation_config=federation,
            env=env,
            scratch=scratch,
            log_file=log_dir / "flower.log",
            timeout=timeout,
        )


@contextmanager
def _simulator(job: str, scratch: Path, log_dir: Path) -> Iterator[Mapping[str, str]]:
    """Start a SuperLink with the simulation engine; yields the environment of ``flwr`` commands for it.

    ``flwr run`` could start one, but a detached one on a fixed port, which outlasts the run.
    """
    home = scratch / "home"
    env = flower_environment(home, job=job) | {"RAY_TMPDIR": str(scratch)}
    process = None
    try:
        with (log_dir / "superlink.log").open("wb") as log:
            port, process = _start_anywhere(env, empty_folder(scratch), log)
        loopback(port).write(home)
        yield env
    finally:
        stop_job(job)
        if process is not None:
            process.wait()


def _start_anywhere(env: Mapping[str, str], cwd: Path, log: IO[bytes]) -> tuple[int, subprocess.Popen[bytes]]:
    """Start the SuperLink on a free port; returns the port and the process."""
    for _ in range(START_ATTEMPTS - 1):
        try:
            return _start_once(env, cwd, log)
        except (RunFailed, UserError):  # of the program that has the port
            continue
    return _start_once(env, cwd, log)


def _start_once(env: Mapping[str, str], cwd: Path, log: IO[bytes]) -> tuple[int, subprocess.Popen[bytes]]:
    (port,) = free_ports(1)
    return port, start_simulator(port, env=env, cwd=cwd, log=log)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Temporary folder for Flower's home, Ray's sockets and an empty working directory.

    Its name is short because the path of a socket has at most 107 characters.
    """
    short = "/tmp" if os.access("/tmp", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="fedgraft-", dir=short))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
