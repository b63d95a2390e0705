"""How many bytes does quality cost? Ours against dense FedAvg, FedIT, and the same graph under uncompressed FedAvg.

All methods train on the same batches, equally many steps a round; each has its learning rate tuned on the first seed.
A method's bytes are those of its Flower messages up to the end of the first round in which the geometric mean of the
clients' held-out perplexities reaches the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from joblib import Parallel, delayed
from peft import LoraConfig, get_peft_model

from benchmarks.federated_methods import Averaging, Client, Method, Schedule, SparseExperts
from benchmarks.material import data_sources, domain_blocks, model_path
from benchmarks.runner import Measured, OnStep, run_benchmark
from benchmarks.statistics import interval
from clients.trainer import LocalTraining
from configs.schema import RunConfig
from models.bootstrap import BootstrapPlan
from models.bootstrap_checkpoint import bootstrap_checkpoint
from models.llama_loader import load_dense
from models.precision import autocast_to_bf16
from models.settings import set_visits
from scripts.console import quiet_libraries
from server.global_model import GlobalModel

DOMAINS = ("stories", "shakespeare", "law_dc", "medical_qa", "math_gsm8k", "code_algos", "recipes")
GAIN_SHARE = 0.9


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
        learning_rates: tried on the first seed, by method; the half active take what all active did best with.
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
    learning_rates: Mapping[str, Sequence[float]]
    calibration_tokens: int
    jobs: int


RATES = {"dense": (1e-3, 2e-3), "fedit": (2e-3, 5e-3), "ours": (1e-3, 2e-3)}
FULL = Settings(DOMAINS, 16, 12, 24, 400, 24, 128, 4, 10, (0, 1, 2), RATES, 8192, 2)
QUICK = replace(
    FULL,
    domains=("a",),
    experts=4,
    rounds=2,
    most_rounds=2,
    train_blocks=4,
    valid_blocks=2,
    block_size=32,
    local_steps=1,
    seeds=(0, 1),
    learning_rates={name: rates[:1] for name, rates in RATES.items()},
    calibration_tokens=256,
    jobs=1,
)
# Those at half the experts start from a learning rate tuned with all of them.
_TUNED_AS = {"dense": "dense", "fedit": "fedit", "ours": "ours", "half dense": "dense", "half ours": "ours"}


@dataclass(frozen=True)
class Run:
    """One method with one seed: ``trajectory`` holds, after each round, the bytes so far and every client's loss."""

    method: str
    seed: int
    learning_rate: float
    trajectory: list[dict[str, Any]]

    @property
    def loss(self) -> float:
        """Mean over clients of the loss at the end, nats per token."""
        return _mean_loss(self.trajectory[-1])

    def reached(self, target: float) -> dict[str, Any] | None:
        """The first entry of the trajectory with a mean loss of at most ``target``; None without one."""
        return next((entry for entry in self.trajectory if _mean_loss(entry) <= target), None)


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Run all methods and compare what they sent until they were as good."""
    settings = QUICK if quick else FULL
    with TemporaryDirectory() as folder:
        graphs = {seed: _graph(Path(folder), seed, settings, quick) for seed in settings.seeds}
        runs = _run_all(settings, graphs, quick, on_step)
    return _measured(settings, runs)


def targets(dense: Run) -> float:
    """Mean loss at ``GAIN_SHARE`` of what a run gained."""
    start = _mean_loss(dense.trajectory[0])
    return start - GAIN_SHARE * (start - dense.loss)


def worst_change(run: Run, entry: Mapping[str, Any]) -> float:
    """Largest ratio over clients of a client's perplexity at ``entry`` to that at the start."""
    start = run.trajectory[0]["losses"]
    return max(math.exp(loss - start[name]) for name, loss in entry["losses"].items())


def _run_all(
    settings: Settings, graphs: Mapping[int, str], quick: bool, on_step: OnStep
) -> dict[str, list[Run]]:
    """The runs of each method, one per seed, at the learning rate that was best on the first seed."""
    first, *others = settings.seeds
    found: dict[str, list[Run]] = {}
    total = sum(map(len, settings.learning_rates.values())) + 2 + len(others) * len(_TUNED_AS)

    def run(jobs: list[tuple]) -> list[Run]:
        done = sum(map(len, found.values()))
        results = []
        work = Parallel(n_jobs=settings.jobs, return_as="generator")(delayed(_run)(*job) for job in jobs)
        for result in work:
            results.append(result)
            on_step("runs", done + len(results), total)
        return results

    rates: dict[str, float] = {}
    tried = run(
        [
            (name, first, rate, settings, graphs[first], quick, ())
            for name in ("dense", "fedit")
            for rate in settings.learning_rates[name]
        ]
    )
    for name in ("dense", "fedit"):
        best = min((each for each in tried if each.method == name), key=lambda each: each.loss)
        rates[name], found[name] = best.learning_rate, [best]
    goals = (targets(found["dense"][0]), found["fedit"][0].loss)
    tried += run(
        [
            ("ours", first, rate, settings, graphs[first], quick, goals)
            for rate in settings.learning_rates["ours"]
        ]
    )
    ours = [each for each in tried if each.method == "ours"]
    best = min(ours, key=lambda each: _uplink(each, goals[0]))
    rates["ours"], found["ours"] = best.learning_rate, [best]
    found["tried"] = tried
    for name in ("dense", "fedit"):
        found[name] += run([(name, seed, rates[name], settings, graphs[seed], quick, ()) for seed in others])
    found["half dense"] = run(
        [("half dense", seed, rates["dense"], settings, graphs[seed], quick, ()) for seed in settings.seeds]
    )
    jobs = [
        ("ours", seed, rates["ours"], settings, graphs[seed], quick, (targets(dense), fedit.loss))
        for seed, dense, fedit in zip(others, found["dense"][1:], found["fedit"][1:], strict=True)
    ] + [
        ("half ours", seed, rates["ours"], settings, graphs[seed], quick, (targets(half),))
        for seed, half in zip(settings.seeds, found["half dense"], strict=True)
    ]
    results = run(jobs)
    found["ours"] += [each for each in results if each.method == "ours"]
    found["half ours"] = [each for each in results if each.method == "half ours"]
    return found


def _uplink(run: Run, target: float) -> tuple[float, float]:
    entry = run.reached(target)
    return (entry["up"] if entry else math.inf, run.loss)


def _measured(settings: Settings, runs: Mapping[str, list[Run]]) -> Measured:
    goals = [targets(run) for run in runs["dense"]]
    half_goals = [targets(run) for run in runs["half dense"]]
    both = ("up", "down")
    found = {
        "uplink_ratio_dense": _ratios(runs["dense"], runs["ours"], goals, ("up",)),
        "total_ratio_dense": _ratios(runs["dense"], runs["ours"], goals, both),
        "uplink_ratio_half_active": _ratios(runs["half dense"], runs["half ours"], half_goals, ("up",)),
        "uplink_ratio_fedit": _ratios(
            runs["fedit"], runs["ours"], [run.loss for run in runs["fedit"]], ("up",)
        ),
        "worst_client_ratio": _worst_ratios(runs["dense"], runs["ours"], goals),
    }
    reason = f"not reached within {settings.most_rounds} rounds"
    return Measured(
        figures={name: fmean(values) if None not in values else None for name, values in found.items()},
        peers={
            "seeds": found,
            "intervals": {name: interval(values) for name, values in found.items() if None not in values},
            "perplexity": {
                name: [[round(math.exp(_mean_loss(run.trajectory[i])), 3) for i in (0, -1)] for run in each]
                for name, each in runs.items()
            },
            "runs": {name: [vars(run) for run in each] for name, each in runs.items()},
            "setting": {**vars(settings), "config": _changed_config()},
        },
        notes={name: "mean over seeds" if None not in values else reason for name, values in found.items()},
    )


def _ratios(
    peers: Sequence[Run], ours: Sequence[Run], goals: Sequence[float], ways: Sequence[str]
) -> list[float | None]:
    """Bytes of a peer over ours until both reach the goal, by seed; None where ours does not."""
    ratios: list[float | None] = []
    for peer, own, goal in zip(peers, ours, goals, strict=True):
        reached, of_peer = own.reached(goal), peer.reached(goal)
        assert of_peer is not None
        ratios.append(
            sum(of_peer[way] for way in ways) / sum(reached[way] for way in ways)
            if reached and reached["round"]
            else None
        )
    return ratios


def _worst_ratios(peers: Sequence[Run], ours: Sequence[Run], goals: Sequence[float]) -> list[float | None]:
    ratios: list[float | None] = []
    for peer, own, goal in zip(peers, ours, goals, strict=True):
        reached, of_peer = own.reached(goal), peer.reached(goal)
        assert of_peer is not None
        ratios.append(worst_change(own, reached) / worst_change(peer, of_peer) if reached else None)
    return ratios


def _run(
    method: str,
    seed: int,
    learning_rate: float,
    settings: Settings,
    graph: str,
    quick: bool,
    goals: Sequence[float],
) -> Run:
    """Train until the last round, or until all ``goals``, where there are any, are reached."""
    quiet_libraries()
    torch.set_num_threads(1)
    clients = list(_clients(settings, seed, quick))
    federation = _federation(method, seed, learning_rate, settings, graph, quick, clients)
    trajectory: list[dict[str, Any]] = []
    up = down = 0
    rounds = settings.most_rounds if goals else settings.rounds
    for server_round in range(rounds + 1):
        if server_round:
            traffic = federation.train_round(server_round)
            up, down = up + traffic.up, down + traffic.down
        losses = {name: loss.mean for name, loss in federation.losses().items()}
        trajectory.append({"round": server_round, "up": up, "down": down, "losses": losses})
        if goals and _mean_loss(trajectory[-1]) <= min(goals):
            break
    return Run(method, seed, learning_rate, trajectory)


def _federation(
    method: str,
    seed: int,
    learning_rate: float,
    settings: Settings,
    graph: str,
    quick: bool,
    clients: Sequence[Client],
) -> Method:
    half = method.startswith("half")
    training = LocalTraining(
        steps=settings.local_steps,
        learning_rate=learning_rate,
        autocast=autocast_to_bf16("auto", "cpu"),
        # With every expert active there is nothing to route.
        train="all" if half else "experts",
    )
    rounds = settings.most_rounds if method.endswith("ours") else settings.rounds
    schedule = Schedule(training, rounds, settings.batch_size, seed)
    path = model_path("mix7M", quick=quick)
    if method == "fedit":
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_dense(path).float(), lora)
        factors = {name: each for name, each in model.named_parameters() if "lora_" in name}
        return Averaging(model, factors, clients, schedule)
    if method == "dense":
        model = load_dense(path).float()
        ffn = {name: each for name, each in model.named_parameters() if ".mlp." in name}
        return Averaging(model, ffn, clients, schedule)
    server = GlobalModel(graph)
    set_visits(server.model, settings.experts // 2 if half else settings.experts)
    if method == "half dense":
        layers = enumerate(server.model.expert_layers())
        experts = {f"{i}.{name}": each for i, layer in layers for name, each in layer.named_parameters()}
        return Averaging(server.model, experts, clients, schedule)
    return SparseExperts(server, clients, schedule, _config(len(clients)))


def _config(num_clients: int) -> RunConfig:
    """The project's defaults."""
    return RunConfig(num_clients=num_clients)


def _changed_config() -> dict[str, Any]:
    wanted = ("density", "value-bits", "combine", "entry-score", "residual-decay", "server-learning-rate")
    values = RunConfig().values()
    return {key: values[key] for key in wanted}


def _clients(settings: Settings, seed: int, quick: bool) -> Iterator[Client]:
    path, size = model_path("mix7M", quick=quick), settings.block_size
    sources = [*data_sources(settings.domains, quick=quick), "wikimix"]
    for name, source in zip([*settings.domains, "wikimix"], sources, strict=True):
        train = domain_blocks(source, path, block_size=size, max_blocks=settings.train_blocks, seed=seed)
        valid = domain_blocks(source, path, split="valid", block_size=size, max_blocks=settings.valid_blocks)
        yield Client(name, train, valid)


def _graph(folder: Path, seed: int, settings: Settings, quick: bool) -> str:
    out = folder / f"graph-{seed}"
    bootstrap_checkpoint(
        source=model_path("mix7M", quick=quick),
        out=out,
        plan=BootstrapPlan(settings.experts, seed=seed),
        calibration_ids=None,
        calibration_tokens=settings.calibration_tokens,
        evaluation_tokens=settings.calibration_tokens // 4,
    )
    return str(out)


def _mean_loss(entry: Mapping[str, Any]) -> float:
    return fmean(entry["losses"].values())


if __name__ == "__main__":
    run_benchmark("quality_per_byte", measure)
