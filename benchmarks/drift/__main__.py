"""Recovery from a change of the clients' domain, with and without growth of the expert graph, at equal uplink bytes.

Eight clients train a graph of a small Llama on real text; after some rounds the training and held-out text of all of
them changes to domains that none had. ``recovery_rounds_without`` are the rounds from the switch until the loss on the
new text (mean over clients, the logarithm of the geometric-mean perplexity) has fallen by 90 % of what it finally falls
without growth; ``recovery_rounds_with`` are those to the same loss with growth, in rounds of equally many uplink bytes.
Every finished federation is stored in a work folder, and a benchmark that was interrupted goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.drift.recovery import SHARE, equal_byte_rounds, first_crossing, target_loss
from benchmarks.drift.runs import run_or_read
from benchmarks.drift.settings import ARMS, FULL, QUICK, WITH, WITHOUT, Job, Settings
from benchmarks.support.runner import Measured, OnStep, run_resumable
from benchmarks.support.statistics import interval
from benchmarks.support.stored import work_folder

Results = dict[tuple[str, int], dict[str, Any]]


def measure(quick: bool, on_step: OnStep, *, work: Path | None = None) -> Measured:
    """Run all federations and compare their recoveries.

    Args:
        quick: whether to run on little data.
        on_step: progress callback.
        work: folder of finished federations; None: a temporary one.
    """
    settings = QUICK if quick else FULL
    wanted = [(arm, seed) for seed in settings.seeds for arm in ARMS]
    results: Results = {}
    with work_folder(work) as folder:
        for each in wanted:
            results[each] = run_or_read(Job(*each), settings, quick, folder)
            on_step("federations", len(results), len(wanted))
    return measured(settings, results)


def measured(settings: Settings, results: Results) -> Measured:
    """Figures of finished federations, by arm and seed: means over seeds."""
    recoveries = {arm: [_recovery(settings, results, arm, seed) for seed in settings.seeds] for arm in ARMS}
    figures: dict[str, float | None] = {}
    for arm, rounds in recoveries.items():
        runs = [results[arm, seed] for seed in settings.seeds]
        figures[f"recovery_rounds_{arm}"] = _mean(rounds)
        figures[f"new_ppl_{arm}"] = math.exp(fmean(run["losses"][-1] for run in runs))
        figures[f"old_ppl_ratio_{arm}"] = math.exp(
            fmean(run["old_loss"][1] - run["old_loss"][0] for run in runs)
        )
        figures[f"detection_delay_{arm}"] = _mean([_delay(run, settings) for run in runs])
        figures[f"false_alarms_{arm}"] = fmean(sum(run["drifted"][: settings.switch]) for run in runs)
    for op in ("spawn", "retire"):
        figures[f"{op}s"] = fmean(_edits(results[WITH, seed], op) for seed in settings.seeds)
    figures["spawned_use"] = _mean([results[WITH, seed]["spawned_use"] for seed in settings.seeds])
    return Measured(
        figures=figures,
        peers={
            "recoveries": recoveries,
            "intervals": {arm: _interval(rounds) for arm, rounds in recoveries.items()},
            "arms": ARMS,
            "setting": vars(settings),
            "runs": [{"arm": arm, "seed": seed} | result for (arm, seed), result in results.items()],
        },
        notes=_notes(settings),
        seconds=sum(result["seconds"] for result in results.values()),
    )


def _recovery(settings: Settings, results: Results, arm: str, seed: int) -> float | None:
    """Rounds until the target loss of the seed's run without growth; None where it is not reached."""
    reference, run = results[WITHOUT, seed], results[arm, seed]
    losses, plain = run["losses"][settings.switch :], reference["losses"][settings.switch :]
    positions = equal_byte_rounds(
        run["bytes_up"][settings.switch :], fmean(reference["bytes_up"][settings.switch :])
    )
    return first_crossing(positions, losses, target_loss(plain))


def _delay(run: Mapping[str, Any], settings: Settings) -> float | None:
    """Rounds from the first one with the new text to the one in which the federation's drift is detected."""
    after = run["drifted"][settings.switch :]
    return float(after.index(True)) if True in after else None


def _edits(run: Mapping[str, Any], kind: str) -> int:
    return sum(count for op, count in run["edits"].items() if op.startswith(kind))


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean over seeds; None where one is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _interval(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return interval(known) if len(known) == len(values) > 1 else None


def _notes(settings: Settings) -> dict[str, str]:
    return {
        "recovery_rounds_without": f"rounds until {SHARE:.0%} of the final decrease of the loss on the new text",
        "recovery_rounds_with": "to the same loss, in rounds of equal uplink; - where a seed does not reach it",
        "new_ppl_without": f"geometric-mean perplexity of the new text, {settings.rounds} rounds",
        "old_ppl_ratio_without": "perplexity of the old text at the end over that at the switch",
        "detection_delay_without": "rounds after the first one with the new text; - where a seed has no alarm",
        "false_alarms_without": f"rounds with an alarm of the federation in the {settings.switch} before the switch",
        "spawned_use": "visits of a spawned expert over the mean of all at the end; - where a seed has none",
    }


if __name__ == "__main__":
    run_resumable("drift", measure)
