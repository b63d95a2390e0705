"""One federation in a process of its own, killed with SIGKILL at a stage of its second round, or continued.

``python -m benchmarks.support.resume.killed_run CONFIG STAGE`` reads a run configuration from the JSON file CONFIG;
with the stage ``none`` the run goes to its end and prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from clients.client_app import app
from configs.schema import RunConfig, load_run_config
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, InProcessGrid
from server.rounds import loop
from server.state import journal

NONE = "none"
# Owner and name of a function, number of its call, and whether the process dies before it rather than after it. With
# two clients the third message is the first of round 2.
_Call = tuple[Any, str, int, bool]
STAGES: dict[str, _Call] = {
    "before send": (InProcessGrid, "push_messages", 2, True),
    "before training": (InProcessGrid, "client_app", 3, True),
    "after training": (InProcessGrid, "client_app", 3, False),
    "between replies": (InProcessGrid, "pull_messages", 3, True),
    "before aggregation": (loop.GlobalModel, "drop_steps", 2, True),
    "after aggregation": (loop.GlobalModel, "advance", 2, False),
    "after the log": (loop.RunObserver, "round", 2, False),
    "after the merge": (loop.RunObserver, "rewire", 2, False),
    "between step and state": (journal, "write_in_turn", 2, True),
    "after the state": (journal.Journal, "save", 2, False),
    "before the final model": (loop.GlobalModel, "save", 1, True),
}


def run(config: RunConfig, stage: str) -> dict[str, Any]:
    """Run a federation of two clients to its end, unless ``stage`` ends the process.

    Args:
        config: run configuration; with ``resume`` the run is continued.
        stage: of ``STAGES``, or ``none``.

    Returns:
        ``{"hash", "seconds_to_resume"}``: SHA-256 of the final model's weights, and seconds from the start of the run
        to its first request, the model's loading included.
    """
    nodes = [
        {"partition-id": index, "num-partitions": config.num_clients} for index in range(config.num_clients)
    ]
    grid = InProcessGrid(app, nodes, config.values())
    started, first = time.perf_counter(), []
    push = grid.push_messages
    grid.push_messages = lambda messages: first.append(time.perf_counter()) or push(messages)  # type: ignore
    if stage != NONE:
        _kill_at(grid, STAGES[stage])
    run_federation(grid, config, run_id=RUN_ID)
    return {"hash": weights_hash(Path(config.out)), "seconds_to_resume": first[0] - started}


def _kill_at(grid: InProcessGrid, call: _Call) -> None:
    """Replace the function of ``call`` by one that kills this process."""
    kind, name, number, before = call
    owner: Any = grid if kind is InProcessGrid else kind
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    setattr(owner, name, dying(getattr(owner, name), number, before, die))


def dying(original: Callable, number: int, before: bool, die: Callable[[], Any]) -> Callable:
    """Function that calls ``original``, and in one call ``die`` before or after it.

    Args:
        original: function to replace.
        number: number of the call, from 1.
        before: whether ``die`` comes before the call of ``original``.
        die: ends the process or raises.
    """
    calls = 0

    def replaced(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and before:
            die()
        result = original(*args, **options)
        if calls == number and not before:
            die()
        return result

    return replaced


def weights_hash(folder: Path) -> str:
    """SHA-256 of names and values of all tensors of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                values = file.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def main(config_file: str, stage: str) -> None:
    """Run the federation of a configuration file and print its result as JSON."""
    values = json.loads(Path(config_file).read_text(encoding="utf-8"))
    print(json.dumps(run(load_run_config(values), stage)))


if __name__ == "__main__":
    main(*sys.argv[1:])
