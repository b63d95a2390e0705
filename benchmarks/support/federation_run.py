"""Federation of ``server.app`` and ``clients.client_app`` in one process: bytes and losses after each round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from clients.client_app import app
from configs.schema import RunConfig
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, InProcessGrid
from server.reporting.run_log import read_rounds


@dataclass(frozen=True)
class Federated:
    """Result of a federation.

    Attributes:
        trajectory: for the start and after each round: ``round``; ``losses``, nats per token, by client; serialized
            bytes so far ``up`` and ``down``, of which ``updates`` are packed updates. The step of a round travels in
            the next request, with which it is counted.
        edits: graph edits of the run.
    """

    trajectory: list[dict[str, Any]]
    edits: int


def run_in_process(
    config: RunConfig,
    names: Sequence[str],
    data_dirs: Sequence[Path],
    *,
    client_app: Callable[[Message, Context], Message] | None = None,
) -> Federated:
    """Run a federation in which every client has a data folder of its own.

    Args:
        config: run configuration; ``log_dir`` receives the logs and the files of the clients.
        names: name of each client.
        data_dirs: data folder of each client.
        client_app: called with each message and the Context of its client; None: ``clients.client_app``.

    Raises:
        RuntimeError: a client's reply was refused, so the run is not the one asked for.
    """
    nodes = [
        {"partition-id": partition, "num-partitions": len(names), "data-dir": str(folder)}
        for partition, folder in enumerate(data_dirs)
    ]
    summary = run_federation(InProcessGrid(client_app or app, nodes, config.values()), config, run_id=RUN_ID)
    by_name = {f"client-{partition}": name for partition, name in enumerate(names)}
    return Federated(_trajectory(read_rounds(Path(config.log_dir)), summary, by_name), summary["edits"])


def _trajectory(
    rounds: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Clients evaluate the model they receive before they train: the loss after a round stands in the next record."""
    evaluations = [{each["name"]: each["perplexity"] for each in record["clients"]} for record in rounds]
    evaluations.append({each["name"]: each["perplexity_after"] for each in summary["clients"]})
    requests = [record["bytes_down"] for record in rounds]
    requests.append(summary["bytes_down"] - sum(requests))
    refused = [each["refused"] for record in rounds for each in record["clients"] if each["refused"]]
    if refused:
        raise RuntimeError(f"expected a reply of every client in every round, got {refused[0]}")
    entries: list[dict[str, Any]] = []
    up = updates = 0
    for server_round, perplexities in enumerate(evaluations):
        if server_round:
            record = rounds[server_round - 1]
            up += record["bytes_up"]
            updates += sum(each["update_bytes"] for each in record["clients"])
        entries.append(
            {
                "round": server_round,
                "up": up,
                "down": sum(requests[: server_round + 1]) if server_round else 0,
                "updates": updates,
                "losses": {names[name]: math.log(value) for name, value in perplexities.items()},
            }
        )
    return entries
