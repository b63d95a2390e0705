"""The project's ClientApp, whose answer is late or absent in the rounds that the server chose."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from benchmarks.scale.apps.faults import DROPPED, LATE, read_fault
from clients import client_app

ROUNDS = "rounds.jsonl"
_LONGEST_WAIT = 60.0  # seconds

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the project's ClientApp does; a late client answers after the round, a failing one raises."""
    log_dir, server_round = Path(str(context.run_config["log-dir"])), int(message.metadata.group_id)
    fault = read_fault(log_dir, server_round, context.node_id)
    if fault == DROPPED:
        raise RuntimeError("the client fails in this round")
    if fault == LATE:
        _wait_for_round(log_dir / ROUNDS, server_round)
    return client_app.app(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate as the project's ClientApp does."""
    return client_app.app(message, context)


def _wait_for_round(path: Path, server_round: int) -> None:
    """Wait until the round is logged, i.e. until the server has gone on without this client."""
    deadline = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < deadline:
        if path.is_file() and path.read_bytes().count(b"\n") >= server_round:
            return
        time.sleep(0.05)
