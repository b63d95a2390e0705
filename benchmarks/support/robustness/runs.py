"""Federation of one job: real server and client apps in one process, some of the clients hostile."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.support.federation_run import federate
from benchmarks.support.material import data_sources, model_path, write_client_data
from benchmarks.support.robustness.attacks import ATTACKS, AttackedApp, Victim
from benchmarks.support.robustness.settings import AGGREGATIONS, Job, Settings
from benchmarks.support.stored import stored
from clients.client_app import app
from configs.schema import RunConfig
from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import unit_sizes
from server.reporting.run_log import read_rounds


def run_or_read(job: Job, settings: Settings, quick: bool, work: Path) -> dict[str, Any]:
    """Result of a job, read from the folder ``work`` where it is finished.

    Returns:
        ``perplexity``, the geometric mean over the honest clients of the final model's held-out perplexity, None where
        it is not finite; ``losses`` by client, nats per token; ``refused``, the number of refused replies; ``edits``,
        the graph edits; ``seconds``.
    """
    amount = {name: value for name, value in asdict(settings).items() if name not in ("seeds", "attacks")}
    # All that a job depends on but its code; named by its keys, so that a changed default makes another job.
    facts = {
        "attack": job.attack,
        "seed": job.seed,
        "settings": amount,
        "quick": quick,
        "config": RunConfig(**_keys(job)).values(),
    }
    return stored(work, facts, lambda: run_job(job, settings, quick, work))


def run_job(job: Job, settings: Settings, quick: bool, work: Path) -> dict[str, Any]:
    """Train the federation of a job; the folder ``work`` holds the bootstrapped graphs."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    graph = settings.graph(work, job.seed, quick=quick)
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        folder = Path(scratch)
        config = settings.config(graph=graph, log_dir=folder / "logs", seed=job.seed, **_keys(job))
        data = _write_data(folder / "data", job.seed, settings, quick)
        summary = federate(config, data, _hostile(job, settings, config) if job.attack else None)
        rounds = read_rounds(Path(config.log_dir))
    return _result(summary, rounds, settings) | {"seconds": round(time.perf_counter() - started, 1)}


def _keys(job: Job) -> dict[str, Any]:
    return AGGREGATIONS[job.aggregation] | dict(job.keys)


def _write_data(folder: Path, seed: int, settings: Settings, quick: bool) -> list[Path]:
    """Data folder of each client: equal parts of all domains, training documents in an order of its own."""
    path, domains = model_path(settings.model, quick=quick), len(settings.domains)
    train, valid = (
        blocks * settings.block_size // domains for blocks in (settings.train_blocks, settings.valid_blocks)
    )
    folders = []
    for client in range(settings.num_clients):
        folders.append(folder / f"client-{client}")
        for part, source in enumerate(data_sources(settings.domains, quick=quick)):
            order = settings.num_clients * seed + client
            write_client_data(
                folders[-1] / str(part), source, path, train_tokens=train, valid_tokens=valid, seed=order
            )
    return folders


def _hostile(job: Job, settings: Settings, config: RunConfig) -> AttackedApp:
    model = load_graph(config.graph)
    victim = Victim(read_graph(model).num_experts, unit_sizes(model), settings.num_clients)
    return AttackedApp(app, range(settings.attackers), ATTACKS[job.attack], victim)


def _result(summary: Mapping[str, Any], rounds: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    honest = {f"client-{client}" for client in range(settings.attackers, settings.num_clients)}
    after = {each["name"]: each["perplexity_after"] for each in summary["clients"] if each["name"] in honest}
    losses = {name: None if value is None else math.log(value) for name, value in sorted(after.items())}
    known = [loss for loss in losses.values() if loss is not None]
    return {
        "perplexity": math.exp(fmean(known)) if len(known) == len(honest) else None,
        "losses": losses,
        "perplexities": [record["perplexity"] for record in rounds],
        "refused": sum(each["refused"] is not None for record in rounds for each in record["clients"]),
        "edits": summary["edits"],
    }
