"""Perplexity with the initial router, relative to the dense model and to other selections of equally many neurons.

SmolLM2-135M-Instruct and a Llama of 7 M parameters (``small``) are bootstrapped layer by layer, with shared experts and
default outputs, on training documents of three text mixes; perplexity is that of validation documents. The static
selection of ``static_over_router_50`` is the best fixed half of the neurons with the same default output. Its options
were chosen on seed 0 of the first mix; the seeds here are others. ``seconds_bootstrap`` and ``rss_over_weights`` are
those of the command with its short report, libraries included, over the model's weights in fp32.

Without shared experts and default outputs, the small Llama is split into 16 experts per layer, and the router is fitted
on text of domains inside and outside the model's training data, or on text sampled from the model.

``gap_closed`` is ``(log ppl centroid - log ppl router) / (log ppl centroid - log ppl oracle)``, and
``static_over_router`` a ratio of perplexities: both with half of the experts active and a router fitted on text,
averaged over seeds (of the choice of documents, the sampled text and the clusters). The oracle selects by the true
contribution of every expert to each token.

Cases that the same commit has measured are read from the user's cache folder.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from joblib import Parallel, delayed
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.support.bootstrap.layerwise import FULL, MIXES, QUICK, cases, ratios, stored_perplexities
from benchmarks.support.material import REAL_MODEL, data_sources, mixed_blocks, model_path
from benchmarks.support.runner import Measured, OnStep, measured_apart, run_benchmark
from benchmarks.support.statistics import interval
from configs.paths import cache_folder
from models.bootstrap.build import BootstrapOptions, plan_experts
from models.bootstrap.calibration import Calibration
from models.bootstrap.pipeline import sample_calibration
from models.bootstrap.router_init import elimination_places, metric_root
from models.bootstrap.selection_report import (
    SHARES,
    NeuronSelection,
    baselines,
    linear_selection,
    select_neurons,
)
from models.checkpoints.load import load_dense
from models.runtime.perplexity import evaluate_loss

DOMAINS = (
    "shakespeare",
    "code_algos",
    "dolly_shepherd",
    "stories",
    "law_dc",
    "medical_qa",
    "math_gsm8k",
    "recipes",
)
_EXPERTS, _SEEDS, _BLOCK = 16, (0, 1, 2), 256
_LAYERWISE_SEEDS = (1, 2, 3)

# Perplexity by share of active experts ("75", "50", "25") and name of the selection.
Table = dict[str, dict[str, float]]


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Perplexity of graphs bootstrapped layer by layer, and of every selection of experts at every share.

    Args:
        quick: use the embedded model, one seed and little text.
        on_step: called with the stage, the number of steps done and their total.
    """
    seeds = _SEEDS[:1] if quick else _SEEDS
    model = model_path("mix7M", quick=quick)
    layerwise = _layerwise(quick, on_step)
    dense = load_dense(model).float()
    runs = []
    for index, seed in enumerate(seeds):
        calibration, held_out = (mixed_text(model, split, seed, quick=quick) for split in ("train", "valid"))
        runs.append(seed_tables(dense, calibration[0], held_out, seed))
        on_step("seeds", index + 1, len(seeds))
    found = summary(runs)
    return Measured(
        figures={**layerwise.figures, **found.figures},
        peers={**layerwise.peers, **found.peers},
        notes={**layerwise.notes, **found.notes},
    )


def _layerwise(quick: bool, on_step: OnStep) -> Measured:
    """Figures of graphs bootstrapped layer by layer: ratios of the real and the small model, time and memory."""
    models = ["mix7M"] if quick else [REAL_MODEL, "mix7M"]
    mixes, seeds = (list(MIXES)[:1], (1,)) if quick else (list(MIXES), _LAYERWISE_SEEDS)
    wanted = cases(models, mixes, seeds)
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        folder = Path(scratch) if quick else cache_folder() / "benchmarks" / "router"
        work = Parallel(n_jobs=1 if quick else 2, return_as="generator")(
            delayed(stored_perplexities)(case, quick, folder) for case in wanted
        )
        found = []
        for case, values in zip(wanted, work, strict=True):
            found.append((case, values))
            on_step("layerwise bootstraps", len(found), len(wanted))
    values = {
        ("" if model == REAL_MODEL else "small_") + name: each
        for model in models
        for name, each in ratios(found, model).items()
    }
    return Measured(
        figures={name: statistics.geometric_mean(each) for name, each in values.items()} | _cost(quick),
        peers={"layerwise": [{**vars(case), **each} for case, each in found], "layerwise_ratios": values},
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
        "--router": amounts.options.router,
        "--features": amounts.options.features,
        "--shared-experts": amounts.options.num_shared,
        "--default-rank": amounts.options.default_rank,
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


def mixed_text(model: str, split: str, seed: int, *, quick: bool) -> tuple[Tensor, Tensor]:
    """Equally many blocks of every domain: ``input_ids`` and ``labels``, each ``[N, S]``."""
    size, count = (64, 1) if quick else (_BLOCK, 4)
    sources = data_sources(DOMAINS, quick=quick)
    blocks = mixed_blocks(sources, model, split=split, block_size=size, max_blocks=count, seed=seed)
    return blocks.input_ids, blocks.labels


def seed_tables(dense: PreTrainedModel, text: Tensor, held_out: tuple[Tensor, Tensor], seed: int) -> dict:
    """Perplexity of the dense model and tables of routers fitted on ``text`` and on sampled text.

    Returns:
        ``{"dense": perplexity, "text": Table, "sampled": Table}``.
    """
    plan = BootstrapOptions(num_experts=_EXPERTS, seed=seed)
    tables: dict = {"dense": evaluate_loss(dense, *held_out).perplexity}
    for kind, ids in (("text", text), ("sampled", sample_calibration(dense, text.numel(), seed))):
        measured = Calibration(dense, ids)
        experts = plan_experts(dense, ids, plan, measured=measured)
        members = [torch.from_numpy(layer.clusters.members) for layer in experts]
        selections = {
            "router": linear_selection(members, [layer.router for layer in experts]),
            **baselines(measured, members),
            "elimination": elimination_selection(measured, members),
        }
        tables[kind] = perplexity_table(dense, selections, held_out)
    return tables


def elimination_selection(measured: Calibration, members: list[Tensor]) -> NeuronSelection:
    """Selection by the exact target of the ridge router: the experts that backward elimination removes last."""

    def score(rows: Tensor, root: Tensor) -> Callable:
        return lambda mlp, x_TD: -elimination_places(mlp, x_TD, rows, root)

    return NeuronSelection(
        members,
        [score(rows, metric_root(metric)) for rows, metric in zip(members, measured.metrics, strict=True)],
    )


def perplexity_table(
    dense: PreTrainedModel, selections: Mapping[str, NeuronSelection], held_out: tuple[Tensor, Tensor]
) -> Table:
    """Perplexity on ``held_out`` by share and selection."""
    table: Table = {}
    for share in SHARES:
        table[str(share)] = {}
        for name, selection in selections.items():
            with select_neurons(dense, selection, share):
                table[str(share)][name] = evaluate_loss(dense, *held_out).perplexity
    return table


def gap_closed(perplexity: Mapping[str, float]) -> float:
    """Share of the log-perplexity gap between centroid router and oracle; above 1 is better than the oracle."""
    router, centroid, oracle = (math.log(perplexity[name]) for name in ("router", "centroid", "oracle"))
    return (centroid - router) / (centroid - oracle)


def summary(runs: list[dict]) -> Measured:
    """Figures at half of the experts, all tables, and intervals if there are several seeds."""
    gaps = {kind: [gap_closed(run[kind]["50"]) for run in runs] for kind in ("text", "sampled")}
    statics = [run["text"]["50"]["static"] / run["text"]["50"]["router"] for run in runs]
    spread = {
        "gap_closed": gaps["text"],
        "gap_closed_sampled": gaps["sampled"],
        "static_over_router": statics,
    }
    intervals = {name: interval(values) for name, values in spread.items() if len(values) > 1}
    return Measured(
        figures={name: statistics.fmean(values) for name, values in spread.items()},
        peers={"seeds": runs, "mean": _mean(runs), "intervals_95": intervals},
        notes={name: f"95 % interval {low:.3f} to {high:.3f}" for name, (low, high) in intervals.items()},
    )


def _mean(runs: list[dict]) -> dict:
    """Geometric means over seeds, in the shape of one run."""
    if isinstance(runs[0], dict):
        return {key: _mean([run[key] for run in runs]) for key in runs[0]}
    return statistics.geometric_mean(runs)


if __name__ == "__main__":
    run_benchmark("router", measure)
