"""Federation of one job: real server and client apps in one process, whose clients' text changes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.drift.settings import Job, Settings, keys_of
from benchmarks.drift.switched_app import SwitchedApp
from benchmarks.support.federation_run import check_all_used, federate
from benchmarks.support.material import (
    data_sources,
    domain_blocks,
    model_path,
    write_client_data,
)
from benchmarks.support.stored import stored
from clients.client_app import app
from configs.schema import RunConfig
from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from models.runtime.perplexity import evaluate_loss
from server.reporting.run_log import read_rewirings, read_rounds
from server.state.checkpoint import CHECKPOINTS
from server.state.federation_state import FederationState
from server.strategies.growth import expert_loads


def run_or_read(job: Job, settings: Settings, quick: bool, work: Path) -> dict[str, Any]:
    """Result of a job, read from the folder ``work`` where it is finished; see ``run_job``."""
    amount = {name: value for name, value in asdict(settings).items() if name != "seeds"}
    # All that a job depends on but its code; named by its keys, so that a changed default makes another job.
    config = RunConfig(**keys_of(job)).values()
    facts = {"arm": job.arm, "seed": job.seed, "settings": amount, "quick": quick, "config": config}
    return stored(work, facts, lambda: run_job(job, settings, quick, work))


def run_job(job: Job, settings: Settings, quick: bool, work: Path) -> dict[str, Any]:
    """Train the federation of a job; the folder ``work`` holds the bootstrapped graphs.

    Returns:
        ``losses``, mean over the changed clients of the held-out loss of the global model (nats per token) before each
        round and after the last; of the text of that round: those from index ``switch`` on are of the second domains;
        ``bytes_up``, ``bytes_down``, ``drifted``, ``client_alarms``, ``excess`` and ``divergence`` (largest of a
        client) by round; ``old_loss``, mean over the first domains at the switch and at the end; ``edits`` by
        operation; ``spawned_use``, visits of a spawned expert over the mean of all experts at the end, None without
        any; ``attached``, the visits of spawned experts by round, see ``server.strategies.growth.attached_visits``;
        ``seconds``.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    graph = settings.graph(work, job.seed, quick=quick)
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        folder = Path(scratch)
        config = settings.config(
            graph=graph,
            log_dir=folder / "logs",
            seed=job.seed,
            checkpoint_every=settings.switch,
            experts_per_token=settings.visits,
            upload_budget_mb=settings.upload_budget_mb,
            **keys_of(job),
        )
        before, after = (
            _write_data(folder / name, domains, job.seed, settings, quick)
            for name, domains in (("before", settings.before), ("after", settings.after))
        )
        switched = SwitchedApp(app, settings.switch, dict(enumerate(after[: settings.changed])))
        summary = federate(config, before, switched)
        result = _result(summary, Path(config.log_dir), settings, quick)
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def _write_data(
    folder: Path, domains: Sequence[str], seed: int, settings: Settings, quick: bool
) -> list[Path]:
    """Data folder of each client: one of the domains in turn, training documents in an order of its own."""
    path, sources = model_path(settings.model, quick=quick), _sources(domains, settings, quick)
    folders = [folder / f"client-{client}" for client in range(settings.num_clients)]
    for client, own in enumerate(folders):
        write_client_data(
            own,
            sources[client % len(sources)],
            path,
            train_tokens=settings.train_blocks * settings.block_size,
            valid_tokens=settings.valid_blocks * settings.block_size,
            seed=settings.num_clients * seed + client,
        )
    return folders


def _sources(domains: Sequence[str], settings: Settings, quick: bool) -> list[str]:
    """Data sources of domains; in a quick run, other ones for the domains before and after the switch."""
    every = (*settings.before, *settings.after)
    source = dict(zip(every, data_sources(every, quick=quick), strict=True))
    return [source[domain] for domain in domains]


def _result(summary: Mapping[str, Any], log_dir: Path, settings: Settings, quick: bool) -> dict[str, Any]:
    rounds = read_rounds(log_dir)
    check_all_used(rounds)
    perplexities = [{each["name"]: each["perplexity"] for each in row["clients"]} for row in rounds]
    perplexities.append({each["name"]: each["perplexity_after"] for each in summary["clients"]})
    changed = [f"client-{client}" for client in range(settings.changed)]
    folders = [log_dir / CHECKPOINTS / f"round-{number}" for number in (settings.switch, settings.rounds)]
    edits = Counter(edit["op"] for each in read_rewirings(log_dir) for edit in each["edits"])
    return {
        "losses": [fmean(math.log(each[name]) for name in changed) for each in perplexities],
        **{name: [row[name] for row in rounds] for name in ("bytes_up", "bytes_down", "drifted")},
        "client_alarms": [sum(client["drifted"] for client in row["clients"]) for row in rounds],
        "excess": [max(client["drift_loss"] for client in row["clients"]) for row in rounds],
        "divergence": [max(client["drift_routing"] or 0.0 for client in row["clients"]) for row in rounds],
        "old_loss": [_old_loss(folder, settings, quick) for folder in folders],
        "edits": dict(edits),
        "spawned_use": _spawned_use(folders[-1]),
        "attached": [row["attached"] for row in rounds],
    }


def _old_loss(checkpoint: Path, settings: Settings, quick: bool) -> float:
    """Mean over the first domains of a model's held-out loss, nats per token."""
    model, dense = load_graph(str(checkpoint)), model_path(settings.model, quick=quick)
    amount = {"block_size": settings.block_size, "max_blocks": settings.valid_blocks}
    texts = [
        domain_blocks(source, dense, split="valid", **amount)
        for source in _sources(settings.before, settings, quick)
    ]
    return fmean(evaluate_loss(model, text.input_ids, text.labels).mean for text in texts)


def _spawned_use(checkpoint: Path) -> float | None:
    """Visits of the attached experts of a layer over the mean of its experts, mean over layers; None without any.

    The visits are the moving average that the server keeps.
    """
    graph = read_graph(load_graph(str(checkpoint)))
    state = checkpoint.with_name(f"{checkpoint.name}.state.safetensors").read_bytes()
    loads = expert_loads(graph, FederationState.from_bytes(state).usage.counts)
    shares = [
        load[list(attached)].mean() / load.mean()
        for load, attached in zip(loads, graph.attached_per_layer, strict=True)
        if attached
    ]
    return fmean(shares) if shares else None
