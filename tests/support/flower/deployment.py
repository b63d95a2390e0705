"""A real SuperLink and two real SuperNodes on loopback, processes of which a test may kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from configs.errors import UserError
from server.flower.flower_process import (
    JOB_VARIABLE,
    flower_environment,
    free_ports,
    loopback,
    start_process,
    stop_job,
    wait_until_healthy,
)
from server.flower.guard import guarded
from server.state.run_lock import SERVER_LOCK, check_unused
from tests.support.paths import ROOT

POLL_SECONDS = 0.05


class Deployment:
    """SuperLink and SuperNodes as processes of their own; the nodes keep their files in ``cache`` of the folder.

    Args:
        folder: for logs and files.
        job: mark of the processes.

    Attributes:
        link: process of the SuperLink.
        options: options of ``fedgraft`` that name it.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder, self.job = folder, job
        (folder / "empty").mkdir(parents=True)
        self.port, *self._node_ports = free_ports(3)
        self.options = ("--superlink", f"127.0.0.1:{self.port}", "--insecure")
        env = flower_environment(folder / "home", job=self.job)
        self._env = env | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05"}
        self._start_all()

    def fedgraft(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a verb of the ``fedgraft`` command that connects to the SuperLink."""
        return subprocess.Popen(
            [sys.executable, "fedgraft.py", *arguments, *self.options],
            cwd=ROOT,
            env=os.environ | {JOB_VARIABLE: self.job},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def restart(self) -> None:
        """Start the SuperLink, which was killed, and two new nodes with the same disks."""
        self.link.wait()
        for node in self._nodes:
            node.kill()
            node.wait()
        self._start_all()

    def _start_all(self) -> None:
        self.link = self._start("superlink", "flower-superlink", "--insecure", "--port", str(self.port))
        self._nodes = [self._start_node(index, port) for index, port in enumerate(self._node_ports)]
        wait_until_healthy(loopback(self.port), process=self.link)

    def _start_node(self, index: int, port: int) -> subprocess.Popen[bytes]:
        cache = self.folder / "cache" / f"client{index}"
        config = f'partition-id={index} num-partitions=2 cache-dir="{cache}"'
        address = ("--superlink", f"127.0.0.1:{self.port}", "--port", str(port))
        return self._start(
            f"node{index}", "flower-supernode", "--insecure", *address, "--node-config", config
        )

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return start_process(
                [*command, "--host", "127.0.0.1"], env=self._env, cwd=self.folder / "empty", stdout=log
            )


@contextmanager
def deployment(folder: Path) -> Iterator[Deployment]:
    """A deployment whose processes are stopped after the block, also if this process is killed."""
    job = uuid4().hex
    with guarded(job, folder / "empty"):
        try:
            yield Deployment(folder, job)
        finally:
            stop_job(job)


def kill_server_app(log_dir: Path) -> None:
    """Kill the process of the ServerApp that uses a log directory."""
    os.kill(json.loads((log_dir / SERVER_LOCK).read_text())["pid"], signal.SIGKILL)


def wait_for_end_of_server_app(log_dir: Path, *, seconds: float = 300.0) -> None:
    """Wait until no ServerApp uses a log directory; one whose SuperLink was killed ends when another one answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check_unused(log_dir, SERVER_LOCK)
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(POLL_SECONDS)


def wait_until(
    condition: Callable[[], bool], *, process: subprocess.Popen[str], seconds: float = 600.0
) -> None:
    """Wait until a condition holds while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(POLL_SECONDS)
