"""Training of one job of ``benchmarks.quality_per_byte``, with a stored result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.support.averaging import Averaging
from benchmarks.support.federated_methods import Client, Method, Schedule
from benchmarks.support.federation_run import run_in_process
from benchmarks.support.material import data_sources, model_path, write_client_data
from benchmarks.support.quality.result import Run
from benchmarks.support.quality.settings import Job, Settings
from clients.data_stream import client_documents, pack_client
from clients.training.trainer import LocalTraining
from configs.output import write_json
from configs.schema import RunConfig
from federated.data.blocks import take
from models.bootstrap.build import BootstrapOptions
from models.bootstrap.pipeline import bootstrap_checkpoint
from models.checkpoints.load import load_dense, load_graph, load_tokenizer
from models.graph.runtime_settings import set_visits
from models.runtime.precision import autocast_to_bf16
from scripts.shared.console import quiet_libraries


def stored_run(job: Job, settings: Settings, quick: bool, work: Path) -> Run:
    """Result of a job, read from the folder ``work`` or trained and stored there."""
    path = work / f"{job.method.replace(' ', '-')}-{job.seed}-{_key(job, settings, quick)}.json"
    if not path.is_file():
        write_json(path, vars(_run_job(job, settings, quick, work)))
    values = json.loads(path.read_text(encoding="utf-8"))
    return Run(**{**values, "learning_rate": job.learning_rate})


def _run_job(job: Job, settings: Settings, quick: bool, work: Path) -> Run:
    quiet_libraries()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        config = _config(job, settings, Path(scratch), quick, work)
        folders = _write_data(Path(scratch), job.seed, settings, quick)
        if job.method.endswith("ours"):
            result = run_in_process(config, list(folders), list(folders.values()))
            trajectory, edits = result.trajectory, result.edits
        else:
            trajectory, edits = _averaged(_baseline(job, config, folders, quick), settings.rounds), 0
    return Run(
        job.method, job.seed, job.learning_rate, trajectory, round(time.perf_counter() - started, 1), edits
    )


def bootstrapped_graph(seed: int, settings: Settings, quick: bool, work: Path) -> Path:
    """Folder in ``work`` of the graph of a seed, bootstrapped where it is absent."""
    facts = [seed, settings.experts, settings.calibration_tokens, quick]
    out = work / f"graph-{seed}-{_digest(facts)}"
    if not out.is_dir():
        bootstrap_checkpoint(
            source=model_path("mix7M", quick=quick),
            out=out,
            options=BootstrapOptions(settings.experts, seed=seed),
            calibration_ids=None,
            calibration_tokens=settings.calibration_tokens,
            evaluation_tokens=settings.calibration_tokens // 4,
        )
    return out


def _key(job: Job, settings: Settings, quick: bool) -> str:
    """Digest of everything that a result depends on: settings, method, seed, rate, defaults of the configuration."""
    several = ("seeds", "half_seeds", "learning_rates", "jobs")
    amounts = {name: value for name, value in vars(settings).items() if name not in several}
    return _digest([vars(job), amounts, quick, RunConfig().values()])


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _config(job: Job, settings: Settings, scratch: Path, quick: bool, work: Path) -> RunConfig:
    """Run configuration of a job; all methods take their local training, data and seed from it."""
    half, rounds = job.method.startswith("half"), settings.rounds
    return RunConfig(
        graph=(
            ""
            if job.method in ("dense", "fedit")
            else str(bootstrapped_graph(job.seed, settings, quick, work))
        ),
        log_dir=str(scratch / "logs"),
        num_clients=len(settings.domains) + 1,
        num_rounds=settings.most_rounds if job.method.endswith("ours") else rounds,
        experts_per_token=settings.experts // 2 if half else settings.experts,
        eval_blocks=settings.valid_blocks,
        block_size=settings.block_size,
        batch_size=settings.batch_size,
        local_steps=settings.local_steps,
        learning_rate=job.learning_rate[0],
        schedule=job.learning_rate[1],
        # With every expert active there is nothing to route.
        train="all" if half else "experts",
        seed=job.seed,
        device="cpu",
    )


def _write_data(scratch: Path, seed: int, settings: Settings, quick: bool) -> dict[str, Path]:
    """Data folder of each client, by its name."""
    path, size = model_path("mix7M", quick=quick), settings.block_size
    sources = [*data_sources(settings.domains, quick=quick), "wikimix"]
    folders = {}
    for name, source in zip([*settings.domains, "wikimix"], sources, strict=True):
        folders[name] = scratch / "data" / name
        train, valid = settings.train_blocks * size, settings.valid_blocks * size
        write_client_data(folders[name], source, path, train_tokens=train, valid_tokens=valid, seed=seed)
    return folders


def packed_clients(config: RunConfig, folders: Mapping[str, Path], model: str) -> Iterator[Client]:
    """Clients of the baselines, with the blocks that ``clients.participant`` packs from the same folders.

    Args:
        config: run configuration.
        folders: data folder of each client, by its name, in the order of the partitions.
        model: folder of the model whose tokenizer is used.
    """
    tokenizer = load_tokenizer(model)
    for partition, (name, folder) in enumerate(folders.items()):
        documents = client_documents(config, partition, data_dir=str(folder))
        train, valid = pack_client(documents, tokenizer, config.block_size, config.block_size)
        yield Client(name, partition, train, take(valid, config.eval_blocks))


def _baseline(job: Job, config: RunConfig, folders: Mapping[str, Path], quick: bool) -> Method:
    path = model_path("mix7M", quick=quick)
    clients = list(packed_clients(config, folders, path))
    training = LocalTraining.of(config.training, autocast=autocast_to_bf16("auto", "cpu"))
    schedule = Schedule(training, config.num_rounds, config.batch_size, config.seed)
    if job.method == "half dense":
        graph = load_graph(config.graph).float()
        set_visits(graph, config.experts_per_token)
        layers = enumerate(graph.expert_layers())
        experts = {f"{i}.{name}": each for i, layer in layers for name, each in layer.named_parameters()}
        return Averaging(graph, experts, clients, schedule)
    dense = load_dense(path).float()
    if job.method == "dense":
        ffn = {name: each for name, each in dense.named_parameters() if ".mlp." in name}
        return Averaging(dense, ffn, clients, schedule)
    torch.manual_seed(job.seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(dense, lora)
    factors = {name: each for name, each in model.named_parameters() if "lora_" in name}
    return Averaging(model, factors, clients, schedule)


def _averaged(method: Method, rounds: int) -> list[dict[str, Any]]:
    trajectory: list[dict[str, Any]] = []
    up = down = 0
    for server_round in range(rounds + 1):
        if server_round:
            traffic = method.train_round(server_round)
            up, down = up + traffic.up, down + traffic.down
        losses = {name: loss.mean for name, loss in method.losses().items()}
        trajectory.append({"round": server_round, "up": up, "down": down, "losses": losses})
    return trajectory
