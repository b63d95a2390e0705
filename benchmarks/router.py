"""Perplexity with the initial router, relative to other selections of equally many neurons.

A trained Llama is split into 16 experts per layer, and the router is fitted on text of domains inside and outside the
model's training data, or on text sampled from the model. Perplexity is that of held-out text of the same domains.

``gap_closed`` is ``(log ppl centroid - log ppl router) / (log ppl centroid - log ppl oracle)``, and
``static_over_router`` a ratio of perplexities: both with half of the experts active and a router fitted on text,
averaged over seeds (of the choice of documents, the sampled text and the clusters). The oracle selects by the true
contribution of every expert to each token.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.support.material import data_sources, mixed_blocks, model_path
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.support.statistics import interval
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

# Perplexity by share of active experts ("75", "50", "25") and name of the selection.
Table = dict[str, dict[str, float]]


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Perplexity of every selection of experts at every share, for routers fitted on text and on sampled text.

    Args:
        quick: use the embedded model, one seed and little text.
        on_step: called with the stage, the number of steps done and their total.
    """
    seeds = _SEEDS[:1] if quick else _SEEDS
    model = model_path("mix7M", quick=quick)
    dense = load_dense(model).float()
    runs = []
    for index, seed in enumerate(seeds):
        calibration, held_out = (mixed_text(model, split, seed, quick=quick) for split in ("train", "valid"))
        runs.append(seed_tables(dense, calibration[0], held_out, seed))
        on_step("seeds", index + 1, len(seeds))
    return summary(runs)


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
