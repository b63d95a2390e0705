"""Perplexity after federated training with 20 % hostile clients over that of training without them, by attack.

Ten clients with equal parts of five domains of real text train a graph of a small Llama with robust aggregation; two of
them are hostile. The perplexity is the geometric mean over the honest clients of the held-out perplexity of the
final model. The aggregation without caps and clipping is beside. Every finished federation is stored in a work folder,
and a benchmark that was interrupted goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.support.robustness.runs import run_or_read
from benchmarks.support.robustness.settings import AGGREGATIONS, FULL, QUICK, Job, Settings
from benchmarks.support.runner import Measured, OnStep, run_resumable
from benchmarks.support.stored import work_folder

Results = dict[tuple[str, str, int], dict[str, Any]]


def measure(quick: bool, on_step: OnStep, *, work: Path | None = None) -> Measured:
    """Run all federations and compare their perplexities.

    Args:
        quick: whether to run on little data.
        on_step: progress callback.
        work: folder of finished federations; None: a temporary one.
    """
    settings = QUICK if quick else FULL
    with work_folder(work) as folder:
        return _measured(settings, _results(settings, quick, folder, on_step))


def _results(settings: Settings, quick: bool, work: Path, on_step: OnStep) -> Results:
    wanted = [
        (aggregation, attack, seed)
        for seed in settings.seeds
        for attack in ("", *settings.attacks)
        for aggregation in AGGREGATIONS
    ]
    found: Results = {}
    for done, each in enumerate(wanted):
        found[each] = run_or_read(Job(*each), settings, quick, work)
        on_step("federations", done + 1, len(wanted))
    return found


def _measured(settings: Settings, results: Results) -> Measured:
    ratios = {
        name: {attack: _ratio(results, settings.seeds, name, attack) for attack in settings.attacks}
        for name in AGGREGATIONS
    }
    clean = [
        results["robust", "", seed]["perplexity"] / results["mean", "", seed]["perplexity"]
        for seed in settings.seeds
    ]
    return Measured(
        figures={f"ppl_ratio_{name}": _worst(list(each.values())) for name, each in ratios.items()}
        | {"clean_cost": fmean(clean)},
        peers={
            "ratios": ratios,
            "clean": clean,
            "aggregations": AGGREGATIONS,
            "setting": vars(settings),
            "runs": [
                {"aggregation": name, "attack": attack, "seed": seed} | result
                for (name, attack, seed), result in results.items()
            ],
        },
        notes={
            "ppl_ratio_robust": f"largest of {len(settings.attacks)} attacks, mean over seeds",
            "ppl_ratio_mean": "the same without caps and clipping; - where a perplexity is not finite",
            "clean_cost": "perplexity without attackers over that without caps and clipping",
        },
        seconds=sum(result["seconds"] for result in results.values()),
    )


def _ratio(results: Results, seeds: Sequence[int], aggregation: str, attack: str) -> float | None:
    """Mean over seeds of the perplexity over that of clean training in the same aggregation; None if not finite."""
    attacked = [results[aggregation, attack, seed]["perplexity"] for seed in seeds]
    clean = [results[aggregation, "", seed]["perplexity"] for seed in seeds]
    if None in attacked:
        return None
    return fmean(one / other for one, other in zip(attacked, clean, strict=True))


def _worst(ratios: Sequence[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return max(known) if len(known) == len(ratios) else None


if __name__ == "__main__":
    run_resumable("robustness", measure)
