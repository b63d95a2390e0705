"""Perplexity of a bootstrapped expert graph relative to its dense model, and time and memory of the bootstrap.

SmolLM2-135M-Instruct and a Llama of 7 M parameters (``small``) are bootstrapped layer by layer, with shared experts and
default outputs, on training documents of three text mixes; perplexity is that of validation documents. The options were
chosen on seed 0 of the first mix; here every mix has a seed of its own, of documents and clusters. Figures are
geometric means over the mixes.

``static_over_router_50`` compares with the best fixed half of the neurons of each layer, chosen and compensated on the
same text in the same way: by contribution, with a default output of the same rank. ``seconds_bootstrap`` and
``rss_over_weights`` are those of the command with its short report, libraries included, over the model's weights in
fp32. Cases that the same commit has measured are read from the user's cache folder.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from joblib import Parallel, delayed

from benchmarks.support.bootstrap.layerwise import FULL, MIXES, QUICK, cases, ratios, stored_perplexities
from benchmarks.support.material import REAL_MODEL, data_sources, model_path
from benchmarks.support.runner import Measured, OnStep, measured_apart, run_benchmark
from configs.paths import cache_folder
from models.checkpoints.load import load_dense

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
    return Measured(
        figures={name: statistics.geometric_mean(each) for name, each in values.items()} | _cost(quick),
        peers={"cases": [{**vars(case), **each} for case, each in found], "ratios": values},
        notes={
            name: f"{min(each):.3f} to {max(each):.3f}, {len(each)} runs" for name, each in values.items()
        },
    )


def _cost(quick: bool) -> dict[str, float]:
    """Seconds of ``fedgraft bootstrap`` and its peak memory over the weights of the dense model in fp32."""
    name = "mix7M" if quick else REAL_MODEL
    model, amounts = model_path(name, quick=quick), (QUICK if quick else FULL)[name]
    options = {
        "--experts": amounts.options.num_experts,
        "--calibration-tokens": amounts.calibration_blocks * amounts.block_size,
        "--evaluation-tokens": amounts.held_out_blocks * amounts.block_size,
        "--report": "short",
        "--model": model,
    }
    text = [["--calibration", source] for source in data_sources(MIXES["all"], quick=quick)]
    words = [str(word) for pair in [*options.items(), *text] for word in pair]
    found = measured_apart("bootstrap.process", words)
    weights = 4 * load_dense(model).num_parameters()
    return {"seconds_bootstrap": found["seconds"], "rss_over_weights": found["peak_bytes"] / weights}


if __name__ == "__main__":
    run_benchmark("bootstrap", measure)
