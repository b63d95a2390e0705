"""Commands of Flower's command line: submission, status and end of a run, its log, runs and nodes of a SuperLink."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from server.flower.connection import CONNECTION
from server.flower.flower_process import RunFailed, resolve_program

_UNAVAILABLE = "Connection to the SuperLink is unavailable"  # Flower's message
_KEY_IN_USE = 23  # Flower's error code of a public key that is registered
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NoAnswer(RunFailed):
    """The SuperLink does not answer."""


class FlowerOptions(TypedDict):
    """Environment and working directory of a command."""

    env: Mapping[str, str]
    cwd: Path


@dataclass(frozen=True)
class RunStatus:
    """Status of a run as Flower reports it, e.g. ``finished:completed``, and its details."""

    state: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether the run has ended, with or without success."""
        return self.state.startswith("finished")


def submit(
    app: Path,
    *,
    config_file: Path,
    env: Mapping[str, str],
    cwd: Path,
    federation_config: Mapping[str, int | float] | None = None,
) -> str:
    """Submit the app in folder ``app`` with ``flwr run``; returns the run id. Raises RunFailed if it is refused."""
    command = ["flwr", "run", str(app), CONNECTION, "--format", "json", "--run-config", str(config_file)]
    if federation_config:
        command += ["--federation-config", " ".join(f"{k}={v}" for k, v in federation_config.items())]
    return str(_ask_flwr(command, env=env, cwd=cwd)["run-id"])


def run_status(run_id: str, *, env: Mapping[str, str], cwd: Path) -> RunStatus:
    """Query the status of a run with ``flwr ls``; raises RunFailed when the SuperLink does not answer."""
    command = ["flwr", "ls", CONNECTION, "--run-id", run_id, "--format", "json"]
    run = _ask_flwr(command, env=env, cwd=cwd)["runs"][0]
    return RunStatus(state=run["status"], details=run["status-details"])


def run_log(run_id: str, *, env: Mapping[str, str], cwd: Path) -> str:
    """Log of a run so far, with ``flwr log``; empty where there is none."""
    program = resolve_program(["flwr", "log", run_id, CONNECTION, "--show"], env)
    result = subprocess.run(
        program, env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return result.stdout


def known_runs(*, env: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """States of the runs that a SuperLink knows, latest first, by run id; raises RunFailed when it does not answer."""
    runs = _ask_flwr(["flwr", "ls", CONNECTION, "--format", "json"], env=env, cwd=cwd)["runs"]
    return {run["run-id"]: run["status"] for run in runs}


def known_nodes(*, env: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """States of a SuperLink's SuperNodes, e.g. ``online``, by node id; raises RunFailed when it does not answer."""
    command = ["flwr", "supernode", "list", CONNECTION, "--format", "json"]
    nodes = _ask_flwr(command, env=env, cwd=cwd)["nodes"]
    return {str(node["node-id"]): node["status"] for node in nodes}


def register_node(public_key: Path, *, env: Mapping[str, str], cwd: Path) -> bool:
    """Register the public key of a SuperNode; returns False if it was registered before.

    Raises:
        RunFailed: the SuperLink does not answer, or the file holds no such key.
    """
    try:
        _ask_flwr(
            ["flwr", "supernode", "register", str(public_key), CONNECTION, "--format", "json"],
            env=env,
            cwd=cwd,
        )
    except RunFailed as error:
        if f"[code: {_KEY_IN_USE}]" in str(error):
            return False
        raise
    return True


def end_at_once(run_id: str, *, env: Mapping[str, str], cwd: Path) -> None:
    """End a run with ``flwr stop``: its ServerApp is terminated. Raises RunFailed where it has ended before."""
    _ask_flwr(["flwr", "stop", run_id, CONNECTION, "--format", "json"], env=env, cwd=cwd)


def _ask_flwr(command: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> dict[str, Any]:
    """Run a ``flwr`` command and parse the JSON object it prints; raises RunFailed with its error message.

    Raises NoAnswer where the SuperLink is not reached.
    """
    program = resolve_program(command, env)
    result = subprocess.run(
        program, env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    try:
        answer = json.loads(result.stdout[result.stdout.index("{") :])
    except ValueError:
        answer = {"error-message": result.stderr or result.stdout}
    if not answer.get("success"):
        lines = [line.strip() for line in ANSI.sub("", answer.get("error-message", "")).splitlines()]
        message = next((line for line in reversed(lines) if line), "no answer")
        kind = NoAnswer if _UNAVAILABLE in message else RunFailed
        raise kind(f"`{' '.join(command[:2])}` failed: {message}")
    return answer
