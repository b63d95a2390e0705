"""Peak memory of one client's round and time of its training step, measured in a process of its own.

``python -m benchmarks.support.budget_client GRAPH BUDGET FOLDER STEPS SETTINGS`` prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from flwr.app import Context, RecordDict

from benchmarks.support.process_peak import peak_bytes
from clients.data_stream import client_documents
from clients.participant import Participant
from clients.training.trainer import train_locally
from configs.schema import load_run_config
from federated.data.blocks import batches
from federated.protocol.messages import Request
from models.bootstrap.recipe import graph_fingerprint
from models.checkpoints.disk_experts import open_mapped
from models.graph.graph_state import read_graph
from models.graph.runtime_settings import visiting

_MIB = 2**20


def open_client(graph: str, budget: int, folder: Path, settings: dict) -> tuple[Participant, Request]:
    """Client with a budget of ``budget`` experts per layer before its first round, and the request of that round."""
    values = {
        "graph": graph,
        "log-dir": str(folder),
        "expert-budget": budget,
        "precision": "fp32",
        **settings,
    }
    config = load_run_config(values)
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 2}, RecordDict(), config.values())
    request = Request(
        server_round=1,
        version=0,
        graph_hash=read_graph(open_mapped(graph)).digest(),
        base_fingerprint=graph_fingerprint(graph),
        steps=[],
    )
    return Participant.open(config, context, request), request


def measure_client(graph: str, budget: int, folder: Path, steps: int, settings: dict) -> dict[str, float]:
    """Peak memory of a whole round minus that of imports and data, in MiB, and median seconds of a training step.

    Args:
        graph: folder of the graph.
        budget: residents per layer.
        folder: log directory, with the client's files.
        steps: optimizer steps to time.
        settings: other keys of the run configuration.
    """
    # Reading documents imports libraries, whose memory is not part of the round.
    client_documents(load_run_config({"graph": graph, **settings}), 0)
    imported = psutil.Process().memory_info().rss / _MIB
    client, request = open_client(graph, budget, folder, settings)
    started = time.perf_counter()
    reply = client.train_round(request)
    round_seconds = time.perf_counter() - started
    peak = peak_bytes() / _MIB
    return {
        "imports_mib": imported,
        "peak_mib": peak - imported,
        "round_seconds": round_seconds,
        "step_seconds": statistics.median(step_seconds(client, request, steps)),
        "residents": float(max(int(held.sum()) for held in reply.residents)),
        "experts_per_token": float(max(client.visits())),
    }


def step_seconds(client: Participant, request: Request, steps: int) -> list[float]:
    """Seconds of each of ``steps`` optimizer steps of a client with its residents in memory."""
    stream = batches(client.train, client.config.batch_size, generator=torch.Generator().manual_seed(0))
    training = replace(client.training(request), local_steps=1)
    seconds = []
    with visiting(client.model, client.visits()):
        for _ in range(steps):
            started = time.perf_counter()
            train_locally(client.model, stream, training)
            seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Measure the client of the command line."""
    graph, budget, folder, steps, settings = sys.argv[1:]
    values = json.loads(settings)
    torch.set_num_threads(values.get("num-threads", 1))
    print(json.dumps(measure_client(graph, int(budget), Path(folder), int(steps), values)))


if __name__ == "__main__":
    main()
