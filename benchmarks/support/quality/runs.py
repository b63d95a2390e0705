"""Training of one job: one federated method with one seed, on the data of all clients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.support.averaging import Averaging
from benchmarks.support.federated_methods import Client, Method, Schedule
from benchmarks.support.federation_run import run_in_process
from benchmarks.support.material import data_sources, domain_blocks, model_path, write_client_data
from benchmarks.support.process_peak import peak_bytes
from benchmarks.support.quality.client_process import ClientProcess
from benchmarks.support.quality.graph_lora import graph_factors
from benchmarks.support.quality.result import Run
from benchmarks.support.quality.settings import Job, Settings
from benchmarks.support.stored import digest
from clients.data_stream import client_documents, pack_client
from clients.training.trainer import LocalTraining
from configs.choices import Report
from configs.schema import RunConfig
from federated.data.blocks import take
from models.bootstrap.build import BootstrapOptions
from models.bootstrap.pipeline import bootstrap_checkpoint
from models.checkpoints.load import load_dense, load_graph, load_tokenizer
from models.graph.runtime_settings import set_visits
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.precision import autocast_to_bf16
from scripts.shared.console import quiet_libraries

# FedIT: LoRA on every linear map of the model.
_LORA = {"rank": 8, "alpha": 16}
_EDGES = ("edge_gain", "edge_affinity")


def run_job(job: Job, settings: Settings, quick: bool, work: Path) -> Run:
    """Train a job; the folder ``work`` holds the bootstrapped graphs."""
    quiet_libraries()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        config = _config(job, settings, Path(scratch), quick, work)
        folders = _write_data(Path(scratch), job.seed, settings, quick)
        if job.method.endswith("ours"):
            facts = _ours(config, folders, settings.apart)
        else:
            facts = {
                "trajectory": _averaged(_baseline(job, config, folders, settings, quick), settings.rounds)
            }
    return Run(
        job.method,
        job.seed,
        job.learning_rate,
        seconds=round(time.perf_counter() - started, 1),
        keys=dict(job.keys),
        **({"peak_bytes": {"server": peak_bytes()}} | facts if settings.apart else facts),
    )


def _ours(config: RunConfig, folders: Mapping[str, Path], apart: bool) -> dict[str, Any]:
    with ClientProcess() if apart else nullcontext() as clients:
        result = run_in_process(config, list(folders), list(folders.values()), client_app=clients)
        facts = {"trajectory": result.trajectory, "edits": result.edits}
        if clients is None:
            return facts
        peaks = {"server": peak_bytes(), "client": clients.peak_bytes()}
        return facts | {"peak_bytes": peaks, "client_seconds": round(clients.seconds, 1)}


def bootstrapped_graph(seed: int, settings: Settings, quick: bool, work: Path) -> Path:
    """Folder in ``work`` of the graph of a seed, bootstrapped where it is absent."""
    facts = [seed, settings.experts, settings.calibration_tokens, quick, settings.model, settings.calibration]
    out = work / f"graph-{seed}-{digest([*facts, dict(settings.bootstrap)])}"
    if not out.is_dir():
        bootstrap_checkpoint(
            source=model_path(settings.model, quick=quick),
            out=out,
            options=BootstrapOptions(settings.experts, seed=seed, **settings.bootstrap),
            calibration_ids=_calibration_ids(seed, settings, quick),
            calibration_tokens=settings.calibration_tokens,
            evaluation_tokens=settings.calibration_tokens // 4,
            report=Report.NONE,
        )
    return out


def _calibration_ids(seed: int, settings: Settings, quick: bool) -> Tensor | None:
    """Blocks ``[N, S]`` of the calibration domain; None without one."""
    if not settings.calibration:
        return None
    source = data_sources([settings.calibration], quick=quick)[0]
    size = 2 * settings.block_size
    blocks = -(-settings.calibration_tokens * 5 // 4 // size) + 1
    model = model_path(settings.model, quick=quick)
    return domain_blocks(source, model, block_size=size, max_blocks=blocks, seed=seed).input_ids


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
        **{**settings.keys, **job.keys},
    )


def _write_data(scratch: Path, seed: int, settings: Settings, quick: bool) -> dict[str, Path]:
    """Data folder of each client, by its name."""
    path, size = model_path(settings.model, quick=quick), settings.block_size
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


def _baseline(
    job: Job, config: RunConfig, folders: Mapping[str, Path], settings: Settings, quick: bool
) -> Method:
    path = model_path(settings.model, quick=quick)
    clients = list(packed_clients(config, folders, path))
    training = LocalTraining.of(config.training, autocast=autocast_to_bf16("auto", "cpu"))
    schedule = Schedule(training, config.num_rounds, config.batch_size, config.seed)
    if job.method.startswith("half"):
        graph = load_graph(config.graph).float()
        set_visits(graph, config.experts_per_token)
        if job.method == "half dense":
            return Averaging(graph, graph_parameters(graph), clients, schedule)
        return Averaging(graph, graph_factors(graph, **_LORA, seed=job.seed), clients, schedule)
    dense = load_dense(path).float()
    if job.method == "dense":
        ffn = {name: each for name, each in dense.named_parameters() if ".mlp." in name}
        return Averaging(dense, ffn, clients, schedule)
    torch.manual_seed(job.seed)
    lora = LoraConfig(
        r=_LORA["rank"], lora_alpha=_LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(dense, lora)
    factors = {name: each for name, each in model.named_parameters() if "lora_" in name}
    return Averaging(model, factors, clients, schedule)


def graph_parameters(graph: FedGraftForCausalLM) -> dict[str, nn.Parameter]:
    """Parameters of all expert layers by name; gains and affinities of edges only in layers that have edges."""
    return {
        f"{index}.{name}": parameter
        for index, layer in enumerate(graph.expert_layers())
        for name, parameter in layer.named_parameters()
        if name not in _EDGES or layer.edges.triu(1).any()
    }


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
