"""One run of one method of ``benchmarks.quality_per_byte``: who trains, on what, for how long."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.support.averaging import Averaging
from benchmarks.support.federated_methods import Client, Method, Schedule
from benchmarks.support.material import data_sources, domain_blocks, model_path
from benchmarks.support.sparse_experts import SparseExperts
from clients.training.trainer import LocalTraining
from configs.schema import RunConfig
from models.bootstrap.build import BootstrapOptions
from models.bootstrap.pipeline import bootstrap_checkpoint
from models.checkpoints.load import load_dense
from models.graph.runtime_settings import set_visits
from models.runtime.precision import autocast_to_bf16
from scripts.shared.console import quiet_libraries
from server.model.global_model import GlobalModel

DOMAINS = ("stories", "shakespeare", "law_dc", "medical_qa", "math_gsm8k", "code_algos", "recipes")


Rate = tuple[float, str]


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured.

    Attributes:
        domains: a client each; one more holds wikimix.
        experts: E of each layer.
        rounds: of the methods that ours is compared with.
        most_rounds: of ours, which stops where it has reached all targets.
        train_blocks: of a client.
        valid_blocks: of a client.
        block_size: tokens of a block.
        batch_size: blocks.
        local_steps: of a client in a round.
        seeds: of the order of the text and of the clusters.
        half_seeds: those with half of the experts active, which train four times as long: routers and gains, too.
        learning_rates: tried, by method, each with its schedule over the rounds; the half active take what all active
            did best with.
        calibration_tokens: sampled from the model, for the bootstrap.
        jobs: runs side by side, a thread each.
    """

    domains: Sequence[str]
    experts: int
    rounds: int
    most_rounds: int
    train_blocks: int
    valid_blocks: int
    block_size: int
    batch_size: int
    local_steps: int
    seeds: Sequence[int]
    half_seeds: Sequence[int]
    learning_rates: Mapping[str, Sequence[Rate]]
    calibration_tokens: int
    jobs: int


RATES: dict[str, Sequence[Rate]] = {
    "dense": ((1e-3, "constant"), (2e-3, "constant"), (2e-3, "linear")),
    "fedit": ((2e-3, "constant"), (5e-3, "constant"), (1e-2, "constant"), (5e-3, "linear")),
    "ours": ((5e-4, "linear"), (7e-4, "linear"), (1e-3, "linear")),
}
FULL = Settings(DOMAINS, 16, 12, 20, 400, 24, 128, 4, 10, (0, 1, 2), (0, 1, 2), RATES, 8192, 2)
QUICK = replace(
    FULL,
    domains=("a",),
    experts=4,
    rounds=1,
    most_rounds=2,
    train_blocks=4,
    valid_blocks=2,
    block_size=32,
    local_steps=1,
    seeds=(0, 1),
    half_seeds=(0,),
    learning_rates={name: rates[:1] for name, rates in RATES.items()},
    calibration_tokens=256,
    jobs=1,
)


@dataclass(frozen=True)
class Job:
    """A run to be made: it ends early where its mean loss has reached all of ``goals``, if there are any."""

    method: str
    seed: int
    learning_rate: Rate
    goals: Sequence[float] = ()


@dataclass(frozen=True)
class Run:
    """One method with one seed: ``trajectory`` holds, after each round, the bytes so far and every client's loss."""

    method: str
    seed: int
    learning_rate: Rate
    trajectory: list[dict[str, Any]]

    @property
    def loss(self) -> float:
        """Mean over clients of the loss at the end, nats per token."""
        return mean_loss(self.trajectory[-1])

    def worst_change(self, target: float) -> float | None:
        """Largest ratio over clients of a client's perplexity to that at the start, when the mean loss is ``target``.

        Interpolated between the two rounds around it: runs pass it by different steps, and the worst client of one that
        went further would look better. None where the run does not reach the target.
        """
        after = self.reached(target)
        if after is None:
            return None
        start, before = self.trajectory[0], self.trajectory[max(self.trajectory.index(after) - 1, 0)]
        passed = mean_loss(before) - mean_loss(after)
        share = (mean_loss(before) - target) / passed if passed > 0 else 0.0
        return max(
            math.exp((1 - share) * before["losses"][name] + share * loss - start["losses"][name])
            for name, loss in after["losses"].items()
        )

    def reached(self, target: float) -> dict[str, Any] | None:
        """The first entry of the trajectory with a mean loss of at most ``target``; None without one."""
        return next((entry for entry in self.trajectory if mean_loss(entry) <= target), None)


def run_job(job: Job, settings: Settings, graph: str, quick: bool) -> Run:
    """Train as ``job`` says, on the graph bootstrapped with its seed."""
    quiet_libraries()
    torch.set_num_threads(1)
    federation = _federation(job, settings, graph, quick)
    trajectory: list[dict[str, Any]] = []
    up = down = 0
    for server_round in range(_rounds(job, settings) + 1):
        if server_round:
            traffic = federation.train_round(server_round)
            up, down = up + traffic.up, down + traffic.down
        losses = {name: loss.mean for name, loss in federation.losses().items()}
        trajectory.append({"round": server_round, "up": up, "down": down, "losses": losses})
        if job.goals and mean_loss(trajectory[-1]) <= min(job.goals):
            break
    return Run(job.method, job.seed, job.learning_rate, trajectory)


def bootstrap_graph(folder: Path, seed: int, settings: Settings, quick: bool) -> str:
    """Bootstrap the graph of a seed into ``folder`` and return its path."""
    out = folder / f"graph-{seed}"
    bootstrap_checkpoint(
        source=model_path("mix7M", quick=quick),
        out=out,
        options=BootstrapOptions(settings.experts, seed=seed),
        calibration_ids=None,
        calibration_tokens=settings.calibration_tokens,
        evaluation_tokens=settings.calibration_tokens // 4,
    )
    return str(out)


def mean_loss(entry: Mapping[str, Any]) -> float:
    """Mean over clients of the loss in an entry of a trajectory: the log of the geometric mean of perplexities."""
    return fmean(entry["losses"].values())


def _rounds(job: Job, settings: Settings) -> int:
    return settings.most_rounds if job.method.endswith("ours") else settings.rounds


def _federation(job: Job, settings: Settings, graph: str, quick: bool) -> Method:
    clients, half = list(_clients(settings, job.seed, quick)), job.method.startswith("half")
    schedule = _schedule(job, settings, half)
    if job.method in ("dense", "fedit"):
        dense = load_dense(model_path("mix7M", quick=quick)).float()
        if job.method == "dense":
            ffn = {name: each for name, each in dense.named_parameters() if ".mlp." in name}
            return Averaging(dense, ffn, clients, schedule)
        torch.manual_seed(job.seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(dense, lora)
        factors = {name: each for name, each in model.named_parameters() if "lora_" in name}
        return Averaging(model, factors, clients, schedule)
    server = GlobalModel(graph)
    set_visits(server.model, settings.experts // 2 if half else settings.experts)
    if job.method == "half dense":
        layers = enumerate(server.model.expert_layers())
        experts = {f"{i}.{name}": each for i, layer in layers for name, each in layer.named_parameters()}
        return Averaging(server.model, experts, clients, schedule)
    return SparseExperts(server, clients, schedule, RunConfig(num_clients=len(clients)))


def _schedule(job: Job, settings: Settings, half: bool) -> Schedule:
    keys = RunConfig(
        local_steps=settings.local_steps,
        learning_rate=job.learning_rate[0],
        schedule=job.learning_rate[1],
        # With every expert active there is nothing to route.
        train="all" if half else "experts",
    )
    training = LocalTraining.of(keys.training, autocast=autocast_to_bf16("auto", "cpu"))
    return Schedule(training, _rounds(job, settings), settings.batch_size, job.seed)


def _clients(settings: Settings, seed: int, quick: bool) -> Iterator[Client]:
    path, size = model_path("mix7M", quick=quick), settings.block_size
    sources = [*data_sources(settings.domains, quick=quick), "wikimix"]
    for name, source in zip([*settings.domains, "wikimix"], sources, strict=True):
        train = domain_blocks(source, path, block_size=size, max_blocks=settings.train_blocks, seed=seed)
        valid = domain_blocks(source, path, split="valid", block_size=size, max_blocks=settings.valid_blocks)
        yield Client(name, train, valid)
