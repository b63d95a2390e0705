"""A real SuperLink and real SuperNodes on loopback, processes which can be stopped, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil

from benchmarks.support.runner import ROOT
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

POLL_SECONDS = 0.05


# Mounts a disk of $1 bytes on $2, which this process and its children alone see, and runs the rest as a command.
_OWN_DISK = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
OWN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@dataclass(frozen=True)
class Node:
    """A SuperNode.

    Attributes:
        config: values of its node configuration beside its index and cache folder.
        disk_bytes: size of the disk that its cache folder is on; 0: this machine's.
    """

    config: Mapping[str, str] = field(default_factory=dict)
    disk_bytes: int = 0


class Deployment:
    """SuperLink and SuperNodes as processes of their own; node i keeps its files in ``cache/client{i}`` of the folder.

    Args:
        folder: for logs and files.
        job: mark of the processes.
        nodes: the SuperNodes, in order of their indices.
        executor: whether ServerApps are started by a process apart from the SuperLink, whose end they outlast; the
            SuperLink's state is in a database then.

    Attributes:
        link: process of the SuperLink.
        nodes: processes of the SuperNodes.
        options: options of ``fedgraft`` that name the SuperLink.
    """

    def __init__(self, folder: Path, job: str, nodes: Sequence[Node], *, executor: bool = False) -> None:
        self.folder, self.job, self._plans = folder, job, nodes
        (folder / "empty").mkdir(parents=True)
        self.port, *self._node_ports = free_ports(1 + len(nodes))
        self.options = ("--superlink", f"127.0.0.1:{self.port}", "--insecure")
        self._executor = executor
        env = flower_environment(folder / "home", job=self.job)
        self._env = env | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05", "PYTHON": sys.executable}
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
        """Start the SuperLink, which was killed, and new nodes with the same disks."""
        self.link.wait()
        for node in self.nodes:
            node.kill()
            node.wait()
        self._start_all()

    def start_link(self) -> None:
        """Start the SuperLink, also after it was killed."""
        address = ["--insecure", "--port", str(self.port), "--host", "127.0.0.1"]
        if self._executor:
            state = ["--state", str(self.folder / "superlink")]
            self.link = self._start_script("superlink", *address, *state, "--isolation", "process")
        else:
            self.link = self._start("superlink", "flower-superlink", *address)

    def start_node(self, index: int) -> subprocess.Popen[bytes]:
        """Start a SuperNode, also after it was killed, with the same disk."""
        plan, cache = self._plans[index], self.folder / "cache" / f"client{index}"
        cache.mkdir(parents=True, exist_ok=True)
        own = "".join(f' {key}="{value}"' for key, value in plan.config.items())
        config = f'partition-id={index} num-partitions={len(self._plans)} cache-dir="{cache}"{own}'
        address = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(self._node_ports[index])]
        disk = [*OWN_NAMESPACE, "sh", "-c", _OWN_DISK, "sh", str(plan.disk_bytes), str(cache)]
        command = ["flower-supernode", "--insecure", *address, "--host", "127.0.0.1", "--node-config", config]
        return self._start(f"node{index}", *(disk if plan.disk_bytes else []), *command)

    def client_files(self, index: int, name: str) -> list[Path]:
        """Files of a name that node ``index`` has in its cache, of any run."""
        return list((self.folder / "cache" / f"client{index}").glob(f"run-*/client-{index}/{name}"))

    def client_app(self, index: int) -> psutil.Process | None:
        """Process in which node ``index`` runs the ClientApp now; None: in none."""
        for process in psutil.Process(self.nodes[index].pid).children(recursive=True):
            try:
                if any("flwr-clientapp" in part for part in process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    def _start_all(self) -> None:
        self.start_link()
        self.nodes = [self.start_node(index) for index in range(len(self._plans))]
        wait_until_healthy(loopback(self.port), process=self.link)
        if self._executor:
            state = ["--state", str(self.folder / "superexec")]
            self._start_script("superexec", *self.options, *state)

    def _start_script(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self._start(name, "bash", str(ROOT / "scripts" / "deploy" / f"{name}.sh"), *arguments)

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return start_process(command, env=self._env, cwd=self.folder / "empty", stdout=log)


@contextmanager
def deployment(
    folder: Path, nodes: Sequence[Node] = (Node(), Node()), *, executor: bool = False
) -> Iterator[Deployment]:
    """A deployment whose processes are stopped after the block, also if this process is killed."""
    job = uuid4().hex
    with guarded(job, folder / "empty"):
        try:
            yield Deployment(folder, job, nodes, executor=executor)
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
