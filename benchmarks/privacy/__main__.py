"""Perplexity against epsilon of client-level differential privacy, beside the same clients without it.

Clients with generated text of two domains that the demo model was not trained on train for a few rounds with the keys
of ``configs/private.toml`` and several noise multipliers, with clipping alone, and in the default configuration. The
models are compared on the same held-out text; epsilon is that of the run's log. Every finished federation is stored in
a work folder, and a benchmark that was interrupted goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.privacy.runs import run_or_read
from benchmarks.privacy.settings import FULL, QUICK, Arm, Settings
from benchmarks.support.runner import Measured, OnStep, run_resumable
from benchmarks.support.stored import work_folder


def measure(quick: bool, on_step: OnStep, *, work: Path | None = None) -> Measured:
    """Run all federations.

    Args:
        quick: whether to run on little data.
        on_step: progress callback.
        work: folder of finished federations; None: a temporary one.
    """
    settings = QUICK if quick else FULL
    results: dict[Arm, dict[str, Any]] = {}
    with work_folder(work) as folder:
        for arm in settings.arms:
            results[arm] = run_or_read(arm, settings, folder)
            on_step("federations", len(results), len(settings.arms))
    return measured(settings, results)


def measured(settings: Settings, results: Mapping[Arm, Mapping[str, Any]]) -> Measured:
    """Figures of finished federations: perplexity of each arm, and epsilon of those with a guarantee."""
    figures: dict[str, float | None] = {"ppl_start": next(iter(results.values()))["start"]}
    for arm, result in results.items():
        figures[f"ppl_{arm.name}"] = result["perplexity"]
        if arm.noise:
            figures[f"epsilon_{arm.name}"] = result["epsilon"]
    return Measured(
        figures=figures,
        peers={
            "arms": [asdict(arm) | dict(result) for arm, result in results.items()],
            "setting": {name: value for name, value in asdict(settings).items() if name != "arms"},
        },
        notes={
            "ppl_start": "perplexity before training",
            "ppl_default": "default configuration, without differential privacy",
            **{f"ppl_{arm.name}": _note(arm) for arm in results if arm.noise is not None},
        },
        seconds=sum(result["seconds"] for result in results.values()),
    )


def _note(arm: Arm) -> str:
    what = f"noise multiplier {arm.noise:g}" if arm.noise else "clipped, without noise: no guarantee"
    return f"{what}, {arm.clients} clients"


if __name__ == "__main__":
    run_resumable("privacy", measure)
