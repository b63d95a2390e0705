"""How many bytes does quality cost? Ours against dense FedAvg, FedIT, and the same graph under uncompressed FedAvg.

All methods train on the same batches, equally many steps a round, at a learning rate and with a schedule that are
tuned for each: the others' on the first seed for the lowest mean loss, ours on all seeds for the worst client, who
pays where few bytes are spent. A method's bytes are those of its Flower messages up to the end of the first round in
which the geometric mean of the clients' held-out perplexities has reached the target. Ours runs with the defaults of
the project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from joblib import Parallel, delayed

from benchmarks.support.quality_runs import (
    FULL,
    QUICK,
    Job,
    Rate,
    Run,
    Settings,
    bootstrap_graph,
    mean_loss,
    run_job,
)
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.support.statistics import interval
from configs.schema import RunConfig

# Of the log-perplexity that dense FedAvg gains in all its rounds.
GAIN_SHARE = 0.9
PEERS = ("dense", "fedit")
_CONFIG = (
    "density",
    "value-bits",
    "combine",
    "entry-score",
    "density-scope",
    "residual-decay",
    "server-learning-rate",
    "downlink-density",
)

# Of a job that is made at every rate that is tried.
_UNTUNED = (0.0, "")

Runs = dict[str, list[Run]]


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Run all methods and compare what they sent until they were as good."""
    settings = QUICK if quick else FULL
    with TemporaryDirectory() as folder:
        runs = _Runner(Path(folder), settings, quick, on_step).all_runs()
    return _measured(settings, runs)


def target(run: Run) -> float:
    """Mean loss at ``GAIN_SHARE`` of what a run gained."""
    start = mean_loss(run.trajectory[0])
    return start - GAIN_SHARE * (start - run.loss)


class _Runner:
    """Makes the runs, ``settings.jobs`` side by side."""

    def __init__(self, folder: Path, settings: Settings, quick: bool, on_step: OnStep) -> None:
        self._settings, self._quick, self._on_step = settings, quick, on_step
        self._graphs = {seed: bootstrap_graph(folder, seed, settings, quick) for seed in settings.seeds}
        self._done = 0
        # Of the peers all rates on the first seed, on the others what was best there; of ours all rates on all seeds.
        rates, seeds = settings.learning_rates, len(settings.seeds)
        peers = sum(len(rates[name]) + seeds - 1 for name in PEERS)
        self._total = peers + len(rates["ours"]) * seeds + 2 * len(settings.half_seeds)

    def all_runs(self) -> Runs:
        """The runs of each method, one per seed in order, and under ``tried`` all that were made to find a rate."""
        first, *others = self._settings.seeds
        tried = self._tune([Job(name, first, _UNTUNED) for name in PEERS])
        best = {name: min(_of(name, tried), key=lambda run: run.loss) for name in PEERS}
        runs = self._run(
            [Job(name, seed, best[name].learning_rate) for name in PEERS for seed in others]
            + [Job("half dense", seed, best["dense"].learning_rate) for seed in self._settings.half_seeds]
        )
        found = {name: [run, *_of(name, runs)] for name, run in best.items()}
        found["half dense"] = _of("half dense", runs)
        peers = zip(found["dense"], found["fedit"], strict=True)
        ours = self._tune(
            [Job("ours", dense.seed, _UNTUNED, (target(dense), fedit.loss)) for dense, fedit in peers]
        )
        by_rate = [_at(rate, ours) for rate in self._settings.learning_rates["ours"]]
        found["ours"] = min(by_rate, key=lambda runs: _mean_worst(runs, found["dense"]))
        rate = found["ours"][0].learning_rate
        found["half ours"] = self._run(
            [Job("half ours", run.seed, rate, (target(run),)) for run in found["half dense"]]
        )
        return {**found, "tried": tried + ours}

    def _tune(self, jobs: Sequence[Job]) -> list[Run]:
        """Each job at every learning rate that is tried for its method."""
        rates = self._settings.learning_rates
        return self._run([Job(j.method, j.seed, rate, j.goals) for j in jobs for rate in rates[j.method]])

    def _run(self, jobs: Sequence[Job]) -> list[Run]:
        results = []
        work = Parallel(n_jobs=self._settings.jobs, return_as="generator")(
            delayed(run_job)(job, self._settings, self._graphs[job.seed], self._quick) for job in jobs
        )
        for result in work:
            results.append(result)
            self._done += 1
            self._on_step("runs", self._done, self._total)
        return results


def _of(method: str, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.method == method]


def _at(rate: Rate, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.learning_rate == rate]


def _mean_worst(ours: Sequence[Run], dense: Sequence[Run]) -> float:
    """Mean over seeds of the worst client's ratio; infinite where a run does not reach the target."""
    ratios = _worst_ratios(ours, dense, [target(run) for run in dense])
    return fmean(math.inf if ratio is None else ratio for ratio in ratios)


def _measured(settings: Settings, runs: Runs) -> Measured:
    dense, ours, fedit = runs["dense"], runs["ours"], runs["fedit"]
    half, half_ours = runs["half dense"], runs["half ours"]
    goals = [target(run) for run in dense]
    found = {
        "uplink_ratio_dense": _ratios(dense, ours, goals, _uplink_bytes),
        "total_ratio_dense": _ratios(dense, ours, goals, _all_bytes),
        "uplink_ratio_half_active": _ratios(half, half_ours, [target(run) for run in half], _uplink_bytes),
        "uplink_ratio_fedit": _ratios(fedit, ours, [run.loss for run in fedit], _uplink_bytes),
        "worst_client_ratio": _worst_ratios(ours, dense, goals),
    }
    complete = {name: values for name, values in found.items() if None not in values}
    config = RunConfig().values()
    return Measured(
        figures={name: fmean(complete[name]) if name in complete else None for name in found},
        peers={
            "seeds": found,
            "intervals": {name: interval(values) for name, values in complete.items() if len(values) > 1},
            "perplexity": {name: [_perplexities(run) for run in each] for name, each in runs.items()},
            "config": {key: config[key] for key in _CONFIG},
            "setting": vars(settings),
            "runs": {name: [vars(run) for run in each] for name, each in runs.items()},
        },
        notes={
            name: (
                f"mean over seeds ({len(values)})"
                if name in complete
                else "not reached on every seed within the rounds there are"
            )
            for name, values in found.items()
        },
    )


def _ratios(ones: Sequence[Run], others: Sequence[Run], goals: Sequence[float], measure_at: Any) -> list:
    """By seed, ``measure_at`` where one run reaches the goal over the same of the other; None where it does not."""
    ratios = []
    for one, other, goal in zip(ones, others, goals, strict=True):
        entries = one.reached(goal), other.reached(goal)
        values = [measure_at(run, entry) for run, entry in zip((one, other), entries, strict=True) if entry]
        ratios.append(values[0] / values[1] if len(values) == 2 and values[1] else None)
    return ratios


def _worst_ratios(ones: Sequence[Run], others: Sequence[Run], goals: Sequence[float]) -> list:
    """By seed, the worst client's change of one over that of the other, both at the same mean loss."""
    changes = [
        [run.worst_change(goal) for run in pair] for *pair, goal in zip(ones, others, goals, strict=True)
    ]
    return [one / other if one is not None and other is not None else None for one, other in changes]


def _uplink_bytes(run: Run, entry: Mapping[str, Any]) -> float:
    return entry["up"]


def _all_bytes(run: Run, entry: Mapping[str, Any]) -> float:
    return entry["up"] + entry["down"]


def _perplexities(run: Run) -> dict[str, Any]:
    """Geometric mean over clients at the start and at the end of a run, and when that was."""
    start, end = (math.exp(mean_loss(run.trajectory[index])) for index in (0, -1))
    return {"start": start, "end": end, **{key: run.trajectory[-1][key] for key in ("round", "up", "down")}}


if __name__ == "__main__":
    run_benchmark("quality_per_byte", measure)
