"""Federated training of a really pretrained Llama: bytes to a given held-out loss, half of the experts active.

SmolLM2-135M-Instruct becomes a graph of 256 experts per layer, calibrated on a domain that no client has. Eight
clients, seven domains and wikimix, train it with three methods on the same blocks and batches, equally many steps a
round: ``half dense`` is FedAvg of all expert weights in bf16, ``half fedit`` is FedIT (LoRA r=8 on all linear maps),
and ``half ours`` is the ServerApp with the real ClientApp. All three start from the same graph, so that none of them
gains by repairing what another did not lose; ``dense`` is FedAvg of the FFNs of the dense model, for the perplexity
that the graph is compared with.

Learning rates and the settings of ours are chosen on one seed (of documents, clusters and batches) and reported on
others; on that seed a run of ours ends where it has reached the loss at which it is compared with FedAvg. Bytes are
those of the Flower messages up to the end of the first round in which the geometric mean of the clients' held-out
perplexities has reached 90 % of what FedAvg gains, and for FedIT its final one.

Sizes are chosen for jobs of about half an hour on one core of a processor without bf16 instructions, where a training
step of 256 tokens takes 3 to 5 s, as much on the graph as on the dense model. A client trains 4 steps of 2 blocks of
128 tokens a round, in fp32, for 6 rounds (ours: 8), and is evaluated on 4 blocks. Packing changes of 7,680 experts,
most of which move in every round, takes ours an estimated 25 s more a client and round. The clients of a run train one
after the other, so that memory holds one of them and the server; their state is on disk. Candidate rates are those
around the best of 12 steps on text of all domains (graph: 1e-4, 3e-4 and 1e-3; LoRA: 1e-3 and 3e-3); ours takes the
best one, and its settings are varied in place of the rate.

The graph has no edges and is not edited: along edges a walk of 128 visits is sequential, and a training step of 4
layers took 1.7 to 3.5 times as long; ``benchmarks.graph_vs_topk`` finds no difference in quality. Each job and the
clients of ours run in processes of their own, whose peak memory is measured, libraries included.

Every finished job is stored in a work folder and read from there or from ``benchmarks/results/real_llama_jobs``, and a
benchmark that was interrupted goes on with the next job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.support.material import REAL_MODEL
from benchmarks.support.quality.comparison import (
    Values,
    both_directions,
    byte_ratios,
    figure_notes,
    intervals,
    mean_figures,
    perplexities,
    target,
    uplink,
    worst_ratios,
)
from benchmarks.support.quality.jobs import Jobs
from benchmarks.support.quality.result import Run
from benchmarks.support.quality.runs import bootstrapped_graph
from benchmarks.support.quality.settings import FULL as SMALL_FULL
from benchmarks.support.quality.settings import QUICK as SMALL_QUICK
from benchmarks.support.quality.settings import Job, Settings
from benchmarks.support.runner import Measured, OnStep, QuickFlag, WorkFolder, report_resumable
from benchmarks.support.stored import work_folder
from configs.schema import RunConfig
from scripts.shared.options import JsonFlag

_BOOTSTRAP = {"router": "contribution", "features": "gate-activation", "edges_per_expert": 0}
FULL = replace(
    SMALL_FULL,
    model=REAL_MODEL,
    experts=256,
    bootstrap={**_BOOTSTRAP, "num_shared": 38, "default_rank": 64},
    calibration="dolly_shepherd",
    calibration_tokens=24_576,
    rounds=6,
    most_rounds=8,
    train_blocks=64,
    valid_blocks=4,
    batch_size=2,
    local_steps=4,
    seeds=(0,),
    half_seeds=(1,),
    learning_rates={
        "half dense": ((3e-4, "linear"), (6e-4, "linear")),
        "half ours": ((3e-4, "linear"),),
        "half fedit": ((3e-3, "constant"), (6e-3, "constant")),
        "dense": ((1e-4, "linear"),),
    },
    keys={"rho_max": 0},
    jobs=1,
    apart=True,
)
QUICK = replace(
    SMALL_QUICK,
    model=REAL_MODEL,
    experts=16,
    most_rounds=1,
    bootstrap={**_BOOTSTRAP, "num_shared": 2, "default_rank": 8},
    calibration="b",
    half_seeds=(1,),
    learning_rates={name: rates[:1] for name, rates in FULL.learning_rates.items()},
    keys=FULL.keys,
)
# Keys of the run configuration in which ours differs from the defaults, tried on the first seed.
TABLE: Sequence[Mapping[str, Any]] = (
    {"density": 0.003},
    {"server_learning_rate": 1.0},
)
# Largest ratio of the worst client's perplexity change to that under FedAvg with which settings are chosen.
WORST = 1.02

Runs = dict[str, list[Run]]


def measure(quick: bool, on_step: OnStep, *, work: Path | None = None, jobs: int | None = None) -> Measured:
    """Choose rates and settings on the first seed, and compare the methods on the others.

    Args:
        quick: whether to run the embedded model on little data.
        on_step: progress callback.
        work: folder of graphs and finished runs; None: a temporary one.
        jobs: runs side by side; None: those of the settings.
    """
    settings, table = (QUICK, TABLE[:1]) if quick else (FULL, TABLE)
    settings = replace(settings, jobs=jobs or settings.jobs)
    with work_folder(work) as folder:
        return _measured(settings, _all_runs(settings, table, quick, folder, on_step))


def _all_runs(
    settings: Settings, table: Sequence[Mapping[str, Any]], quick: bool, work: Path, on_step: OnStep
) -> Runs:
    """Runs on the first seed under ``tried`` and ``table``, and by method those on the other seeds."""
    methods, rates = list(settings.learning_rates), settings.learning_rates
    tuned, (seed,) = methods[:-1], settings.seeds
    total = sum(len(rates[name]) for name in tuned) + len(table) + len(methods) * len(settings.half_seeds)
    jobs = Jobs("real_llama", settings, quick, work, on_step, total)
    bootstrapped_graph(seed, settings, quick, work)
    dense = jobs.run([Job("half dense", seed, rate) for rate in rates["half dense"]])
    best = {"half dense": min(dense, key=attrgetter("loss"))}
    end = {"early_stop_loss": _end_loss(best["half dense"])}
    tried = jobs.run(
        [Job("half ours", seed, rate, end) for rate in rates["half ours"]]
        + [Job("half fedit", seed, rate) for rate in rates["half fedit"]]
    )
    best["half fedit"] = min((run for run in tried if run.method == "half fedit"), key=attrgetter("loss"))
    ours = chosen_row([run for run in tried if run.method == "half ours"], best["half dense"])
    best["half ours"] = ours
    rows = [ours, *jobs.run([Job("half ours", seed, ours.learning_rate, {**keys, **end}) for keys in table])]
    keys = {"half ours": _own_keys(chosen_row(rows, best["half dense"]))}
    for each in settings.half_seeds:
        bootstrapped_graph(each, settings, quick, work)
    reported = jobs.run(
        [
            Job(name, each, best[name].learning_rate if name in best else rates[name][0], keys.get(name, {}))
            for each in settings.half_seeds
            for name in methods
        ]
    )
    by_method = {name: [run for run in reported if run.method == name] for name in methods}
    return {**by_method, "tried": dense + tried, "table": rows, "table dense": [best["half dense"]]}


def _end_loss(dense: Run) -> float:
    """Loss at which a run of ours ends on the first seed: the target, rounded down, so that it is reached."""
    return math.floor(target(dense) * 1e4) / 1e4


def _own_keys(run: Run) -> dict[str, Any]:
    """Keys of a run apart from the one that ends it early."""
    return {name: value for name, value in run.keys.items() if name != "early_stop_loss"}


def chosen_row(rows: Sequence[Run], dense: Run) -> Run:
    """Run of the highest uplink ratio with a worst client within ``WORST``; without one, of the best worst client."""

    def rank(run: Run) -> tuple[bool, float]:
        worst, ratio = _row(run, dense)["worst_client_ratio"], _row(run, dense)["uplink_ratio_dense"]
        if worst is None or ratio is None:
            return False, -math.inf
        return worst <= WORST, ratio if worst <= WORST else -worst

    return max(rows, key=rank)


def _row(run: Run, dense: Run) -> dict[str, Any]:
    """Figures of one run of ours against FedAvg on the same seed."""
    found = _against_dense([dense], [run])
    return {name: values[0] for name, values in found.items()}


def _against_dense(dense: Sequence[Run], ours: Sequence[Run]) -> dict[str, Values]:
    goals = [target(run) for run in dense]
    return {
        "uplink_ratio_dense": byte_ratios(dense, ours, goals, uplink),
        "total_ratio_dense": byte_ratios(dense, ours, goals, both_directions),
        "worst_client_ratio": worst_ratios(ours, dense, goals),
    }


def _measured(settings: Settings, runs: Runs) -> Measured:
    graph, ours, fedit = runs["half dense"], runs["half ours"], runs["half fedit"]
    found = _against_dense(graph, ours) | {
        "uplink_ratio_fedit": byte_ratios(fedit, ours, [run.loss for run in fedit], uplink),
        "ppl_over_dense": [
            math.exp(one.loss - other.loss) for one, other in zip(ours, runs["dense"], strict=True)
        ],
        **_costs(ours, graph),
    }
    (reference,) = runs["table dense"]
    return Measured(
        figures=mean_figures(found),
        peers={
            "seeds": found,
            "intervals": intervals(found),
            "table": [{"keys": _own_keys(run), **_row(run, reference)} for run in runs["table"]],
            "perplexity": {name: [perplexities(run) for run in each] for name, each in runs.items()},
            "config": RunConfig().values(),
            "setting": vars(settings),
            "runs": {name: [vars(run) for run in each] for name, each in runs.items()},
        },
        notes=figure_notes(found, " apart from the one of the choices"),
        seconds=sum(run.seconds for name, each in runs.items() if name != "table dense" for run in each),
    )


def _costs(ours: Sequence[Run], graph: Sequence[Run]) -> dict[str, Values]:
    """Time of a round over that of FedAvg, and peak memory in MB of the processes; without a measurement, nothing."""
    if not all(run.peak_bytes for run in (*ours, *graph)):
        return {}
    return {
        "round_seconds_ratio": [
            _round_seconds(one) / _round_seconds(other) for one, other in zip(ours, graph, strict=True)
        ],
        "client_peak_mb": [run.peak_bytes["client"] / 1e6 for run in ours],
        "server_peak_mb": [run.peak_bytes["server"] / 1e6 for run in ours],
        "dense_peak_mb": [run.peak_bytes["server"] / 1e6 for run in graph],
    }


def _round_seconds(run: Run) -> float:
    return run.seconds / run.trajectory[-1]["round"]


def main(
    quick: QuickFlag = False,
    work: WorkFolder = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side, one core each.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure bytes to a given quality on a really pretrained Llama; goes on from the runs that are finished."""
    report_resumable("real_llama", partial(measure, jobs=jobs), quick=quick, work=work, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
