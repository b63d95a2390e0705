"""Uplink and total bytes to reach a given held-out loss: ours against dense FedAvg, FedIT and FedAvg of the same graph.

Ours runs the ServerApp's federation over an in-process Flower grid with the real ClientApp and the defaults of the
project, graph edits included. All methods train on the same blocks and batches, equally many steps a round. Of several
learning rates, dense FedAvg and FedIT take the one with the lowest mean loss, ours the one with the best worst client,
both over all seeds. The bytes of a method are those of its Flower messages up to the end of the first round in which
the geometric mean of the clients' held-out perplexities has reached the target.

Every finished run is stored in a work folder, and a benchmark that was interrupted goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks.support.quality.comparison import (
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
from benchmarks.support.quality.settings import FULL, QUICK, Job, Rate, Settings
from benchmarks.support.runner import Measured, OnStep, run_resumable
from benchmarks.support.stored import work_folder
from configs.schema import RunConfig

METHODS = ("dense", "ours", "fedit")
_CONFIG = (
    "density",
    "value-bits",
    "combine",
    "entry-score",
    "density-scope",
    "residual-decay",
    "server-learning-rate",
    "downlink-density",
    "rho-max",
    "merge-every",
)

Runs = dict[str, list[Run]]


def measure(quick: bool, on_step: OnStep, *, work: Path | None = None) -> Measured:
    """Run all methods and compare the bytes with which they reach the same losses.

    Args:
        quick: whether to run on little data.
        on_step: progress callback.
        work: folder of finished runs; None: a temporary one.
    """
    settings = QUICK if quick else FULL
    with work_folder(work) as folder:
        return _measured(settings, _all_runs(settings, quick, folder, on_step))


def _all_runs(settings: Settings, quick: bool, work: Path, on_step: OnStep) -> Runs:
    """Runs of each method at its chosen rate, one per seed, and under ``tried`` those at all rates."""
    rates = sum(len(settings.learning_rates[name]) for name in METHODS)
    total = rates * len(settings.seeds) + 2 * len(settings.half_seeds)
    jobs = Jobs("quality_per_byte", settings, quick, work, on_step, total)
    for seed in settings.seeds:
        bootstrapped_graph(seed, settings, quick, work)
    tried = jobs.run(
        [
            Job(name, seed, rate)
            for name in METHODS
            for rate in settings.learning_rates[name]
            for seed in settings.seeds
        ]
    )
    chosen: Runs = {}
    for name in METHODS:
        by_rate = [_at(rate, _of(name, tried)) for rate in settings.learning_rates[name]]
        worst = partial(_mean_worst, dense=chosen["dense"]) if name == "ours" else _mean_final
        chosen[name] = min(by_rate, key=worst)
    half = jobs.run(
        [
            Job(f"half {name}", seed, chosen[name][0].learning_rate)
            for name in ("dense", "ours")
            for seed in settings.half_seeds
        ]
    )
    return {
        **chosen,
        **{f"half {name}": _of(f"half {name}", half) for name in ("dense", "ours")},
        "tried": tried,
    }


def _of(method: str, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.method == method]


def _at(rate: Rate, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.learning_rate == rate]


def _mean_final(runs: Sequence[Run]) -> float:
    return fmean(run.loss for run in runs)


def _mean_worst(ours: Sequence[Run], dense: Sequence[Run]) -> float:
    """Mean over seeds of the worst client's ratio; infinite where a run does not reach the target."""
    ratios = worst_ratios(ours, dense, [target(run) for run in dense])
    return fmean(math.inf if ratio is None else ratio for ratio in ratios)


def _measured(settings: Settings, runs: Runs) -> Measured:
    dense, ours, fedit = runs["dense"], runs["ours"], runs["fedit"]
    half, half_ours = runs["half dense"], runs["half ours"]
    goals = [target(run) for run in dense]
    found = {
        "uplink_ratio_dense": byte_ratios(dense, ours, goals, uplink),
        "total_ratio_dense": byte_ratios(dense, ours, goals, both_directions),
        "uplink_ratio_half_active": byte_ratios(half, half_ours, [target(run) for run in half], uplink),
        "uplink_ratio_fedit": byte_ratios(fedit, ours, [run.loss for run in fedit], uplink),
        "worst_client_ratio": worst_ratios(ours, dense, goals),
    }
    searched = any(len(rates) > 1 for rates in settings.learning_rates.values())
    rates = "" if searched else "; learning rates of an earlier search"
    config = RunConfig().values()
    return Measured(
        figures=mean_figures(found),
        peers={
            "seeds": found,
            "intervals": intervals(found),
            "perplexity": {name: [perplexities(run) for run in each] for name, each in runs.items()},
            "config": {key: config[key] for key in _CONFIG},
            "setting": vars(settings),
            "runs": {name: [vars(run) for run in each] for name, each in runs.items()},
        },
        notes=figure_notes(found, rates),
        seconds=sum(run.seconds for name, each in runs.items() if name not in METHODS for run in each),
    )


if __name__ == "__main__":
    run_resumable("quality_per_byte", measure)
