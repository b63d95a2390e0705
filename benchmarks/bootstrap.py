"""Perplexity of a bootstrapped expert graph relative to its dense model, healed or not; its time and memory.

SmolLM2-135M-Instruct and a Llama of 7 M parameters (``small``) are bootstrapped layer by layer, with shared experts and
default outputs, on training documents of three text mixes; perplexity is that of validation documents. The options were
chosen on seed 0 of the first mix; here every mix has a seed of its own, of documents and clusters. Figures are
geometric means over the mixes.

``static_over_router_50`` compares with the best fixed half of the neurons of each layer, chosen and compensated on the
same text in the same way: by contribution, with a default output of the same rank. ``seconds_bootstrap`` and
``rss_over_weights`` are those of the command with its short report, libraries included, over the model's weights in
fp32. ``healed_50_over_dense`` is the held-out perplexity of that graph at half of the experts after ``fedgraft heal``
on training documents of the same domains, whose optimizer steps took ``core_minutes_healing``. Cases that the same
commit has measured are read from the user's cache folder.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from joblib import Parallel, delayed

from benchmarks.support.bootstrap.command import measure_commands
from benchmarks.support.bootstrap.layerwise import MIXES, cases, ratios, stored_perplexities
from benchmarks.support.material import REAL_MODEL
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from configs.paths import cache_folder

_SEEDS = (1, 2, 3)


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Measure the ratios of the real and the small model, and time and memory of the command.

    Args:
        quick: use the embedded model, one mix and little text.
        on_step: called with the stage, the number of steps done and their total.
    """
    models = ["mix7M"] if quick else [REAL_MODEL, "mix7M"]
    texts = list(zip(MIXES, _SEEDS, strict=True))
    wanted = cases(models, texts[:1] if quick else texts)
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        folder = Path(scratch) if quick else cache_folder() / "benchmarks" / "bootstrap"
        work = Parallel(n_jobs=1 if quick else 2, return_as="generator")(
            delayed(stored_perplexities)(case, quick, folder) for case in wanted
        )
        found = []
        for case, values in zip(wanted, work, strict=True):
            found.append((case, values))
            on_step("cases", len(found), len(wanted))
    values = {
        ("" if model == REAL_MODEL else "small_") + name: each
        for model in models
        for name, each in ratios(found, model).items()
    }
    commands = measure_commands(quick)
    return Measured(
        figures={name: statistics.geometric_mean(each) for name, each in values.items()} | commands.figures(),
        peers={
            "cases": [{**vars(case), **each} for case, each in found],
            "ratios": values,
            "commands": asdict(commands),
        },
        notes={
            name: f"{min(each):.3f} to {max(each):.3f}, {len(each)} runs" for name, each in values.items()
        },
    )


if __name__ == "__main__":
    run_benchmark("bootstrap", measure)
