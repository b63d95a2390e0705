"""Federation of ``server.app`` and ``clients.client_app`` in one process: bytes and losses after each round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from benchmarks.support.material import stored_graph
from clients.client_app import app
from configs.schema import RunConfig
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, InProcessGrid
from server.reporting.run_log import read_rounds

ClientApp = Callable[[Message, Context], Message]


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


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """Amount of training and of measurement of a federation in one process.

    Attributes:
        num_clients: clients.
        experts: E of each layer at the start.
        rounds: server rounds.
        train_blocks: training blocks of a client.
        valid_blocks: held-out blocks of a client.
        block_size: tokens per block.
        batch_size: blocks per batch.
        local_steps: optimizer steps of a client per round.
        learning_rate: learning rate of the clients at the start.
        seeds: seeds of clusters, data order and batches.
        calibration_tokens: calibration tokens of the bootstrap, sampled from the model.
        model: name of the dense model, see ``material.model_path``.
    """

    num_clients: int
    experts: int
    rounds: int
    train_blocks: int
    valid_blocks: int
    block_size: int
    batch_size: int
    local_steps: int
    learning_rate: float
    seeds: Sequence[int]
    calibration_tokens: int
    model: str = "mix7M"

    def graph(self, work: Path, seed: int, *, quick: bool) -> Path:
        """Folder in ``work`` of the bootstrapped graph of a seed, made where it is absent."""
        return stored_graph(
            work,
            model=self.model,
            experts=self.experts,
            calibration_tokens=self.calibration_tokens,
            seed=seed,
            quick=quick,
        )

    def config(self, *, graph: Path, log_dir: Path, seed: int, **keys: Any) -> RunConfig:
        """Run configuration of a federation; ``keys`` are further keys by their Python names."""
        return RunConfig(
            graph=str(graph),
            log_dir=str(log_dir),
            num_clients=self.num_clients,
            num_rounds=self.rounds,
            eval_blocks=self.valid_blocks,
            block_size=self.block_size,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            learning_rate=self.learning_rate,
            seed=seed,
            device="cpu",
            **keys,
        )


def federate(
    config: RunConfig, data_dirs: Sequence[Path], client_app: ClientApp | None = None
) -> dict[str, Any]:
    """Run a federation in which every client has a data folder of its own, and return its summary.

    Args:
        config: run configuration; ``log_dir`` receives the logs and the files of the clients.
        data_dirs: data folder of each client.
        client_app: called with each message and the Context of its client; None: ``clients.client_app``.
    """
    nodes = [
        {"partition-id": partition, "num-partitions": len(data_dirs), "data-dir": str(folder)}
        for partition, folder in enumerate(data_dirs)
    ]
    return run_federation(InProcessGrid(client_app or app, nodes, config.values()), config, run_id=RUN_ID)


def check_all_used(rounds: Sequence[Mapping[str, Any]]) -> None:
    """Check that every client's update was used in every round, or the run is not the one asked for.

    Args:
        rounds: lines of ``rounds.jsonl``.

    Raises:
        RuntimeError: names the first reason of a refusal.
    """
    refused = [each["refused"] for record in rounds for each in record["clients"] if each["refused"]]
    if refused:
        raise RuntimeError(f"expected a reply of every client in every round, got {refused[0]}")


def run_in_process(
    config: RunConfig,
    names: Sequence[str],
    data_dirs: Sequence[Path],
    *,
    client_app: ClientApp | None = None,
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
    summary = federate(config, data_dirs, client_app)
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
    check_all_used(rounds)
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
