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
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from joblib import Parallel, delayed

from benchmarks.support.quality.result import Run, mean_loss
from benchmarks.support.quality.runs import bootstrapped_graph, stored_run
from benchmarks.support.quality.settings import FULL, QUICK, Job, Rate, Settings
from benchmarks.support.runner import Measured, OnStep, report
from benchmarks.support.statistics import interval
from configs.paths import cache_folder
from configs.schema import RunConfig
from scripts.shared.console import quiet_libraries, stderr
from scripts.shared.options import JsonFlag

# Share of the log-perplexity gain of dense FedAvg over all its rounds that is the target.
GAIN_SHARE = 0.9
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
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        return _measured(settings, _Runner(work, settings, quick, on_step).all_runs())
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        return _measured(settings, _Runner(Path(folder), settings, quick, on_step).all_runs())


def target(run: Run) -> float:
    """Mean loss at which a run has made ``GAIN_SHARE`` of its gain."""
    start = mean_loss(run.trajectory[0])
    return start - GAIN_SHARE * (start - run.loss)


class _Runner:
    """Runner of all jobs, ``settings.jobs`` side by side."""

    def __init__(self, work: Path, settings: Settings, quick: bool, on_step: OnStep) -> None:
        self._work, self._settings, self._quick, self._on_step = work, settings, quick, on_step
        rates = sum(len(settings.learning_rates[name]) for name in METHODS)
        self._done, self._total = 0, rates * len(settings.seeds) + 2 * len(settings.half_seeds)

    def all_runs(self) -> Runs:
        """Runs of each method at its chosen rate, one per seed, and under ``tried`` those at all rates."""
        settings = self._settings
        for seed in settings.seeds:
            bootstrapped_graph(seed, settings, self._quick, self._work)
        tried = self._run(
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
        half = self._run(
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

    def _run(self, jobs: Sequence[Job]) -> list[Run]:
        results = []
        work = Parallel(n_jobs=self._settings.jobs, return_as="generator")(
            delayed(stored_run)(job, self._settings, self._quick, self._work) for job in jobs
        )
        for run in work:
            results.append(run)
            self._done += 1
            self._on_step("runs", self._done, self._total)
            stderr.print(_line(run), highlight=False, markup=False, soft_wrap=True)
        return results


def _line(run: Run) -> str:
    end = run.trajectory[-1]
    return (
        f"{run.method}, seed {run.seed}, {run.learning_rate[0]:g} {run.learning_rate[1]}: loss "
        f"{mean_loss(run.trajectory[0]):.4f} to {run.loss:.4f} in {end['round']} rounds, "
        f"{end['up'] / 1e6:.3f} MB up, {end['down'] / 1e6:.3f} MB down, {run.edits} edits, {run.seconds:.0f} s"
    )


def _of(method: str, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.method == method]


def _at(rate: Rate, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.learning_rate == rate]


def _mean_final(runs: Sequence[Run]) -> float:
    return fmean(run.loss for run in runs)


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
    searched = any(len(rates) > 1 for rates in settings.learning_rates.values())
    rates = "" if searched else "; learning rates of an earlier search"
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
                f"mean over seeds ({len(values)}){rates}"
                if name in complete
                else "not reached on every seed within the rounds there are"
            )
            for name, values in found.items()
        },
        seconds=sum(run.seconds for name, each in runs.items() if name not in METHODS for run in each),
    )


def _ratios(ones: Sequence[Run], others: Sequence[Run], goals: Sequence[float], measure_at: Any) -> list:
    """Per seed, the ratio of ``measure_at`` of two runs where each reaches the goal; None where one does not."""
    ratios = []
    for one, other, goal in zip(ones, others, goals, strict=True):
        entries = one.reached(goal), other.reached(goal)
        values = [measure_at(run, entry) for run, entry in zip((one, other), entries, strict=True) if entry]
        ratios.append(values[0] / values[1] if len(values) == 2 and values[1] else None)
    return ratios


def _worst_ratios(ones: Sequence[Run], others: Sequence[Run], goals: Sequence[float]) -> list:
    """Per seed, the ratio of the two runs' worst-client perplexity changes, both at the same mean loss."""
    changes = [
        [run.worst_change(goal) for run in pair] for *pair, goal in zip(ones, others, goals, strict=True)
    ]
    return [one / other if one is not None and other is not None else None for one, other in changes]


def _uplink_bytes(run: Run, entry: Mapping[str, Any]) -> float:
    return entry["up"]


def _all_bytes(run: Run, entry: Mapping[str, Any]) -> float:
    return entry["up"] + entry["down"]


def _perplexities(run: Run) -> dict[str, Any]:
    """Geometric mean perplexity over clients at the start and at the end of a run, and its rounds and bytes."""
    start, end = (math.exp(mean_loss(run.trajectory[index])) for index in (0, -1))
    return {"start": start, "end": end, **{key: run.trajectory[-1][key] for key in ("round", "up", "down")}}


def main(
    quick: Annotated[bool, typer.Option(help="Smoke test under a minute; writes no result.")] = False,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of finished runs, which are reused; for a full run in the user's cache folder."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure bytes to a given quality; a full run that was interrupted goes on from its finished runs."""
    quiet_libraries()
    folder = work if work or quick else cache_folder() / "benchmarks" / "quality_per_byte"
    report("quality_per_byte", partial(measure, work=folder), quick=quick, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
